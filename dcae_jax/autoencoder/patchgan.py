"""PatchGAN discriminator (arXiv 1611.07004) of the third phase.

It judges overlapping patches, one logit each. Batch norm always uses the
batch's own statistics, so that it has no state; real and reconstructed images
go through it as separate batches. It exists for training only.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_EPSILON = 1e-5


def smallest_side(layers: int) -> int:
  """The smallest image side, in pixels, that leaves a logit."""
  return 3 * 2**layers


class _BatchStandardise(nn.Module):
  """Batch norm without running statistics; scale starts around 1."""

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    around_one = lambda *args: 1 + nn.initializers.normal(0.02)(*args)
    channels = x.shape[-1]
    scale = self.param("scale", around_one, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    mean = jnp.mean(x, axis=(0, 1, 2), keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2), keepdims=True)
    y = (x - mean) * jax.lax.rsqrt(variance + _EPSILON)
    return y * scale[None, None, None] + bias[None, None, None]


class PatchGAN(nn.Module):
  """Images in [-1, 1] to a grid of logits, larger for real.

  Attributes:
    width: channels of the first layer.
    layers: of stride 2; the receptive field is 70 pixels with 3.
  """

  width: int = 64
  layers: int = 3

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"]
  ) -> Float[Array, "b h2 w2 1"]:
    conv = functools.partial(
      nn.Conv,
      kernel_size=(4, 4),
      padding=1,
      precision="highest",
      kernel_init=nn.initializers.normal(0.02),
    )
    x = conv(self.width, strides=2, name="conv_0")(images.astype(jnp.float32))
    x = jax.nn.leaky_relu(x, 0.2)
    for i in range(1, self.layers + 1):
      channels = self.width * min(2**i, 8)
      stride = 2 if i < self.layers else 1
      x = conv(channels, strides=stride, use_bias=False, name=f"conv_{i}")(x)
      x = jax.nn.leaky_relu(_BatchStandardise(name=f"norm_{i}")(x), 0.2)
    return conv(1, name="logits")(x)
