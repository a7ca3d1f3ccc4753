"""EfficientViT blocks: ReLU linear attention and a gated MBConv.

DC-AE (arXiv 2410.10733) section 3.3 uses them in the deep stages. Attention is
global over the image, in float32 whatever the compute dtype, and keeps height
and width as separate axes so that a mesh may split image rows.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dcae_jax.nn import convolution, normalization

HEAD_DIM = 32
_EXPANSION = 4  # a GLUMBConv's channels after the gate, over its input's
_EPSILON = 1e-15


def relu_linear_attention(
  q: Float[Array, "b h w n d"],
  k: Float[Array, "b h w n d"],
  v: Float[Array, "b h w n d"],
) -> Float[Array, "b h w n d"]:
  """Attention with the kernel `relu(q) relu(k)`, linear in the image's pixels.

  With at most `d` positions the quadratic form is cheaper; it gives the same
  result up to the place of the epsilon. Positions whose query, or all of whose
  keys, are zero give zero, with finite gradients. The result is float32.
  """
  dtype, highest = jnp.float32, jax.lax.Precision.HIGHEST
  q = jax.nn.relu(q.astype(dtype))
  k = jax.nn.relu(k.astype(dtype))
  v = v.astype(dtype)
  if q.shape[1] * q.shape[2] <= q.shape[-1]:
    scores = jnp.einsum("bhwnd,bijnd->bnhwij", q, k, precision=highest)
    total = jnp.sum(scores, axis=(-2, -1), keepdims=True)
    scores = scores / (total + _EPSILON)
    return jnp.einsum("bnhwij,bijne->bhwne", scores, v, precision=highest)
  outer = jnp.einsum("bhwnd,bhwne->bnde", k, v, precision=highest)
  numerator = jnp.einsum("bhwnd,bnde->bhwne", q, outer, precision=highest)
  total = jnp.einsum(
    "bhwnd,bnd->bhwn", q, jnp.sum(k, axis=(1, 2)), precision=highest
  )
  # One reciprocal for each head and position: a division for each channel
  # would take XLA:TPU longer to compile than the rest of the attention.
  return numerator * (1 / (total + _EPSILON))[..., None]


class LinearAttention(nn.Module):
  """Multi-scale ReLU linear attention.

  Each head owns `3 * head_dim` consecutive channels of the projection: query,
  key, value. There are as many heads as fit into the channels of the input.

  Attributes:
    scales: kernel sizes of the depthwise convolutions that aggregate the
      projection over neighbours; each adds as many heads again.
    norm: of the output, a key of `normalization.NORMS`.
    head_dim: channels of a head.
  """

  scales: tuple[int, ...] = ()
  norm: str = "rms_norm"
  head_dim: int = HEAD_DIM
  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    channels = x.shape[-1]
    heads = channels // self.head_dim
    inner = 3 * heads * self.head_dim

    def conv(name, channels, size=1, groups=1):
      return convolution.Conv(
        channels,
        size,
        groups=groups,
        use_bias=False,
        dtype=self.dtype,
        name=name,
      )

    qkv = conv("qkv", inner)(x)
    scales = [qkv]
    for i, size in enumerate(self.scales):
      depthwise = conv(f"aggregate_{i}", inner, size, groups=inner)
      mix = conv(f"aggregate_{i}_mix", inner, groups=3 * heads)
      scales.append(mix(depthwise(qkv)))
    q, k, v = rearrange(
      jnp.concatenate(scales, axis=-1),
      "b h w (n three d) -> three b h w n d",
      three=3,
      d=self.head_dim,
    )
    y = relu_linear_attention(q, k, v).astype(self.dtype)
    y = rearrange(y, "b h w n d -> b h w (n d)")
    y = conv("project", channels)(y)
    return normalization.NORMS[self.norm](name="norm")(y)


class GLUMBConv(nn.Module):
  """Inverted bottleneck, depthwise convolution and gated linear unit."""

  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    channels = x.shape[-1]
    hidden = 2 * _EXPANSION * channels
    inverted = convolution.Conv(hidden, 1, dtype=self.dtype, name="inverted")
    depthwise = convolution.Conv(
      hidden, groups=hidden, dtype=self.dtype, name="depthwise"
    )
    point = convolution.Conv(
      channels, 1, use_bias=False, dtype=self.dtype, name="point"
    )
    y = depthwise(jax.nn.silu(inverted(x)))
    value, gate = jnp.split(y, 2, axis=-1)
    y = point(value * jax.nn.silu(gate))
    return normalization.RMSNorm(name="norm")(y)


class EfficientViTBlock(nn.Module):
  """Residual linear attention (context), then a residual GLUMBConv (local).

  Its fields are those of `LinearAttention`.
  """

  scales: tuple[int, ...] = ()
  norm: str = "rms_norm"
  head_dim: int = HEAD_DIM
  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    attention = LinearAttention(
      self.scales, self.norm, self.head_dim, self.dtype, name="context"
    )
    local = GLUMBConv(dtype=self.dtype, name="local")
    x = x + attention(x)
    return x + local(x)
