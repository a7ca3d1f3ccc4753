"""ReLU linear attention and the gated MBConv that stands behind it.

EfficientViT has them (arXiv 2205.14756), and from there DC-AE and SANA. Neither
forms all pairs of positions: their cost is linear in the positions of an image.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dcae_jax.nn import convolution, normalization


def relu_linear_attention(
  q: Float[Array, "b h w n d"],
  k: Float[Array, "b h w n d"],
  v: Float[Array, "b h w n d"],
  epsilon: float = 1e-15,
) -> Float[Array, "b h w n d"]:
  """Attention with the kernel `relu(q) relu(k)`, linear in the image's pixels.

  With at most `d` positions the quadratic form is cheaper; it gives the same
  result up to the place of the epsilon. Positions whose query, or all of whose
  keys, are zero give zero, with finite gradients. All of it, and the result,
  is float32. `epsilon` is added to what the sums are divided by.
  """
  dtype, highest = jnp.float32, jax.lax.Precision.HIGHEST
  q = jax.nn.relu(q.astype(dtype))
  k = jax.nn.relu(k.astype(dtype))
  v = v.astype(dtype)
  if q.shape[1] * q.shape[2] <= q.shape[-1]:
    scores = jnp.einsum("bhwnd,bijnd->bnhwij", q, k, precision=highest)
    total = jnp.sum(scores, axis=(-2, -1), keepdims=True)
    scores = scores / (total + epsilon)
    return jnp.einsum("bnhwij,bijne->bhwne", scores, v, precision=highest)
  outer = jnp.einsum("bhwnd,bhwne->bnde", k, v, precision=highest)
  numerator = jnp.einsum("bhwnd,bnde->bhwne", q, outer, precision=highest)
  total = jnp.einsum(
    "bhwnd,bnd->bhwn", q, jnp.sum(k, axis=(1, 2)), precision=highest
  )
  # One reciprocal for each head and position: a division for each channel
  # would take XLA:TPU longer to compile than the rest of the attention.
  return numerator * (1 / (total + epsilon))[..., None]


class GLUMBConv(nn.Module):
  """Inverted bottleneck, depthwise convolution and gated linear unit.

  Attributes:
    hidden: channels after the gate.
    norm: normalise what comes out, as DC-AE does and SANA does not.
    dtype: of the convolutions.
  """

  hidden: int
  norm: bool = True
  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    hidden = 2 * self.hidden
    inverted = convolution.Conv(hidden, 1, dtype=self.dtype, name="inverted")
    depthwise = convolution.Conv(
      hidden, groups=hidden, dtype=self.dtype, name="depthwise"
    )
    point = convolution.Conv(
      x.shape[-1], 1, use_bias=False, dtype=self.dtype, name="point"
    )
    y = depthwise(jax.nn.silu(inverted(x)))
    value, gate = jnp.split(y, 2, axis=-1)
    y = point(value * jax.nn.silu(gate))
    return normalization.RMSNorm(name="norm")(y) if self.norm else y
