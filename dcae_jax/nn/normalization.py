"""The two norms of DC-AE, and that of SD-VAE, all computed in float32.

RMS norm over channels with weight and bias (encoders, deep decoder stages),
batch norm (shallow decoder stages of the paper's models), and group norm.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPSILON = 1e-5
GROUP_EPSILON = 1e-6
_MOMENTUM = 0.9  # weight of the old running statistics of batch norm


class RMSNorm(nn.Module):
  """Divides each pixel by its root mean square over channels, then scales.

  Unlike `flax.linen.RMSNorm` it has a bias, and the epsilon of the paper's
  models, 1e-5.
  """

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    y = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(mean_square + EPSILON)
    y = y * scale[None, None, None] + bias[None, None, None]
    return y.astype(x.dtype)


class BatchNorm(nn.Module):
  """Batch norm whose mode follows the `batch_stats` collection.

  Where the caller makes that collection mutable (phase 1), the batch's own
  statistics normalise, and the running ones move towards them; elsewhere the
  running statistics normalise. As in the models' original framework, and unlike
  `flax.linen.BatchNorm`, the running variance is the unbiased estimate.
  Statistics are over the global batch wherever it is sharded.
  """

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    running_mean = self.variable(
      "batch_stats", "mean", jnp.zeros, (channels,), jnp.float32
    )
    running_variance = self.variable(
      "batch_stats", "var", jnp.ones, (channels,), jnp.float32
    )
    y = x.astype(jnp.float32)
    if self.is_mutable_collection("batch_stats"):
      mean = jnp.mean(y, axis=(0, 1, 2))
      variance = jnp.mean(
        jnp.square(y - mean[None, None, None]), axis=(0, 1, 2)
      )
      if not self.is_initializing():
        count = y.size // channels
        unbiased = variance * (count / max(count - 1, 1))
        keep, move = _MOMENTUM, 1 - _MOMENTUM
        running_mean.value = keep * running_mean.value + move * mean
        running_variance.value = keep * running_variance.value + move * unbiased
    else:
      mean, variance = running_mean.value, running_variance.value
    factor = scale * jax.lax.rsqrt(variance + EPSILON)
    offset = bias - mean * factor
    y = y * factor[None, None, None] + offset[None, None, None]
    return y.astype(x.dtype)


class GroupNorm(nn.Module):
  """Normalises groups of consecutive channels over each whole image."""

  groups: int  # a divisor of the channels

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    y = x.astype(jnp.float32)

    def group_mean(of_channels):
      groups = of_channels.reshape(-1, self.groups, channels // self.groups)
      mean = jnp.mean(groups, axis=-1)
      mean = jnp.repeat(mean, channels // self.groups, axis=-1)
      return mean[:, None, None]

    y = y - group_mean(jnp.mean(y, axis=(1, 2)))
    variance = group_mean(jnp.mean(jnp.square(y), axis=(1, 2)))
    factor = scale[None, None, None] * jax.lax.rsqrt(variance + GROUP_EPSILON)
    return (y * factor + bias[None, None, None]).astype(x.dtype)


# Of DC-AE, by their names in its configs.
NORMS = {"rms_norm": RMSNorm, "batch_norm": BatchNorm}
