"""EfficientViT blocks: multi-scale linear attention, then a gated MBConv.

DC-AE (arXiv 2410.10733) section 3.3 uses them in the deep stages. Attention is
global over the image, and keeps height and width as separate axes so that a
mesh may split image rows.
"""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dcae_jax.nn import convolution, linear_attention, normalization

HEAD_DIM = 32
_EXPANSION = 4  # a GLUMBConv's channels after the gate, over its input's


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
    y = linear_attention.relu_linear_attention(q, k, v).astype(self.dtype)
    y = rearrange(y, "b h w n d -> b h w (n d)")
    y = conv("project", channels)(y)
    return normalization.NORMS[self.norm](name="norm")(y)


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
    local = linear_attention.GLUMBConv(
      _EXPANSION * x.shape[-1], dtype=self.dtype, name="local"
    )
    x = x + attention(x)
    return x + local(x)
