"""What denoisers are made of: patches, time, linear layers, attention.

Tokens are `[b, n, d]`. Linear layers multiply in the compute dtype. Norms,
attention and the sum that runs through the blocks are float32, as they are
under the mixed precision that DC-AE's authors train with.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from dcae_jax import errors

_MAX_PERIOD = 10_000.0
_MOST_BLOCKS, _MOST_HIDDEN = 1000, 2**16
MLP_RATIO = 4


def check_sizes(depth: int, hidden: int, heads: int, divisor: int) -> None:
  """Raises UserError for a transformer that cannot be.

  `divisor` is what sines and cosines need `hidden` to be a multiple of.
  """
  if heads < 1 or hidden < 1 or hidden % heads:
    raise errors.UserError(
      f"hidden={hidden} is not divisible by heads={heads}; change one of them"
    )
  if hidden % divisor:
    below = hidden // divisor * divisor
    raise errors.UserError(
      f"hidden={hidden} is not divisible by {divisor}, as the sines and "
      f"cosines need it; use {below} or {below + divisor}"
    )
  if hidden > _MOST_HIDDEN:
    raise errors.UserError(f"hidden={hidden} is above {_MOST_HIDDEN}")
  if depth < 1:
    raise errors.UserError(f"depth={depth} is below 1, the fewest blocks")
  if depth > _MOST_BLOCKS:
    raise errors.UserError(f"depth={depth} is above {_MOST_BLOCKS}")


def time_features(t: Float[Array, " b"], features: int) -> Float[Array, "b d"]:
  """Cosines, then sines of `t` at `features / 2` frequencies, in float32.

  The frequencies fall geometrically from 1 radian per unit of `t` towards
  1/10000, which they do not reach. `features` is even.
  """
  half = features // 2
  frequencies = np.exp(-math.log(_MAX_PERIOD) / half * np.arange(half))
  frequencies = jnp.asarray(frequencies, jnp.float32)
  angles = t.astype(jnp.float32)[:, None] * frequencies[None]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def to_patches(
  z: Float[Array, "b h w c"], patch_size: int
) -> Float[Array, "b n d"]:
  """Tokens in rows of the image; channels are the fastest axis in each."""
  p = patch_size
  return rearrange(z, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)


def from_patches(
  tokens: Float[Array, "b n d"], height: int, width: int, patch_size: int
) -> Float[Array, "b h w c"]:
  """The inverse of `to_patches`; height and width in latent positions."""
  return rearrange(
    tokens,
    "b (h w) (p q c) -> b (h p) (w q) c",
    h=height // patch_size,
    w=width // patch_size,
    p=patch_size,
    q=patch_size,
  )


def attention(
  q: Float[Array, "b heads n d"],
  k: Float[Array, "b heads l d"],
  v: Float[Array, "b heads l d"],
  mask: Bool[Array, "b l"] | None = None,
) -> Float[Array, "b heads n d"]:
  """Softmax attention over tokens; all of it, and the result, in float32.

  A mask tells which tokens there are to attend to, all of them without one.
  Where it has none, the result is zero. The products keep at least ten bits of
  a factor: on hardware that multiplies narrower numbers by default, as TPUs do,
  more than one pass makes them.
  """
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  high = jax.lax.Precision.HIGH
  scores = jnp.einsum("bhid,bhjd->bhij", q, k, precision=high)
  scores = scores * q.shape[-1] ** -0.5
  if mask is None:
    weights = jax.nn.softmax(scores, axis=-1)
  else:
    mask = mask[:, None, None]
    # Not minus infinity: a mask without tokens would make NaN on the way.
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0)
  return jnp.einsum("bhij,bhjd->bhid", weights, v, precision=high)


def normalized(
  x: Float[Array, "b n d"], epsilon: float
) -> Float[Array, "b n d"]:
  """Each token with mean 0 and variance 1 over its channels, in float32."""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(variance + epsilon)


class Linear(nn.Module):
  """A linear layer; parameters, and the sum with the bias, are float32."""

  features: int
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
  bias_init: nn.initializers.Initializer = nn.initializers.zeros
  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... d"]:
    channels = x.shape[-1]
    kernel = self.param(
      "kernel", self.kernel_init, (channels, self.features), jnp.float32
    )
    # Tokens of all images as rows of one matrix: twice as fast on the CPU.
    rows = x.reshape(-1, channels).astype(self.dtype)
    y = jnp.dot(rows, kernel.astype(self.dtype))
    if self.use_bias:  # in float32: its gradient sums over all tokens
      bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
      y = (y.astype(jnp.float32) + bias[None]).astype(self.dtype)
    return y.reshape(*x.shape[:-1], self.features)


class LayerNorm(nn.Module):
  """`normalized`, then a scale and a bias for each channel."""

  epsilon: float

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    shape = x.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
    return normalized(x, self.epsilon) * scale[None, None] + bias[None, None]


class RMSNorm(nn.Module):
  """Divides tokens by their root mean square, then scales them, in float32.

  The scales are `offset` more than the parameters.
  """

  epsilon: float
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  offset: float = 0.0

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    scale = self.param("scale", self.scale_init, x.shape[-1:], jnp.float32)
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(mean_square + self.epsilon)
    return x * (self.offset + scale)[None, None]


class Attention(nn.Module):
  """Multi-head self-attention; the projection holds q, k, v one after another.

  The projection of the result has a bias; that to q, k, v may have one.
  """

  heads: int
  qkv_bias: bool
  kernel_init: nn.initializers.Initializer
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    d = x.shape[-1]

    def linear(name, features, use_bias):
      return Linear(
        features, use_bias, self.kernel_init, dtype=self.dtype, name=name
      )

    q, k, v = rearrange(
      linear("qkv", 3 * d, self.qkv_bias)(x),
      "b n (three heads d) -> three b heads n d",
      three=3,
      heads=self.heads,
    )
    y = rearrange(attention(q, k, v), "b heads n d -> b n (heads d)")
    return linear("project", d, True)(y)


class CrossAttention(nn.Module):
  """Multi-head attention of tokens to others; q, k, v have biases.

  Attributes:
    kernel_init: of the projections to q, and to k and v one after the other.
    project_init: of the projection of the result.
    norm_epsilon: of an RMS norm of q and of k, over all heads; None: no norm.
  """

  heads: int
  kernel_init: nn.initializers.Initializer
  project_init: nn.initializers.Initializer
  dtype: DTypeLike
  norm_epsilon: float | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    states: Float[Array, "b l c"],
    mask: Bool[Array, "b l"],
  ) -> Float[Array, "b n d"]:
    d = x.shape[-1]

    def linear(name, features, kernel_init):
      return Linear(
        features, kernel_init=kernel_init, dtype=self.dtype, name=name
      )

    def of_heads(x):
      return rearrange(x, "b n (heads d) -> b heads n d", heads=self.heads)

    q = linear("q", d, self.kernel_init)(x)
    k, v = jnp.split(linear("kv", 2 * d, self.kernel_init)(states), 2, axis=-1)
    if self.norm_epsilon is not None:
      q = RMSNorm(self.norm_epsilon, name="q_norm")(q)
      k = RMSNorm(self.norm_epsilon, name="k_norm")(k)
    y = attention(of_heads(q), of_heads(k), of_heads(v), mask)
    y = rearrange(y, "b heads n d -> b n (heads d)")
    return linear("project", d, self.project_init)(y)


class MLP(nn.Module):
  """Two linear layers with a GELU between them, `MLP_RATIO` times as wide."""

  approximate: bool  # GELU by its tanh formula
  kernel_init: nn.initializers.Initializer
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    d = x.shape[-1]
    settings = {"kernel_init": self.kernel_init, "dtype": self.dtype}
    y = Linear(MLP_RATIO * d, name="expand", **settings)(x)
    y = jax.nn.gelu(y, approximate=self.approximate)
    return Linear(d, name="contract", **settings)(y)


def block_macs(tokens: int, hidden: int) -> int:
  """Multiply-accumulates of one image in attention and MLP."""
  linear = (4 + 2 * MLP_RATIO) * hidden**2
  return tokens * (linear + 2 * tokens * hidden)


def cross_attention_macs(tokens: int, others: int, hidden: int) -> int:
  """Multiply-accumulates of `tokens` that attend to `others`."""
  return 2 * hidden * (tokens * hidden + others * (hidden + tokens))


def check_latents(
  z: Float[Array, "b h w c"], channels: int, patch_size: int
) -> None:
  """Raises UserError for latents that do not make whole patches."""
  if z.shape[-1] != channels:
    raise errors.UserError(
      f"latents have {z.shape[-1]} channels; this model takes {channels}, the "
      "latent channels of its autoencoder"
    )
  for side in z.shape[1:3]:
    if side < 1 or side % patch_size:
      raise errors.UserError(
        f"latent side {side} is not divisible by {patch_size}, the patch size "
        "of this model; use images of another size, or patch size 1"
      )
