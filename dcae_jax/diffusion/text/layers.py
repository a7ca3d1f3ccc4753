"""What the text encoders are made of: tables, attention under a mask, MLP.

Tokens are `[b, n, d]`. Linear layers multiply in the compute dtype; norms,
softmax and the sum that runs through the layers are float32.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dcae_jax.nn import transformer

_HIDDEN = -1e30  # the score of a token out of sight


def embedded(
  ids: Int[Array, "b n"], count: int, width: int, dtype: DTypeLike, name: str
) -> Float[Array, "b n d"]:
  """The rows of a table, in float32; to be called in a module."""
  return nn.Embed(count, width, dtype=dtype, name=name)(ids).astype(jnp.float32)


class Attention(nn.Module):
  """Multi-head self-attention, of tokens to those that they see.

  Attributes:
    heads: of the queries.
    key_heads: of keys and values; neighbouring heads share one.
    head_width: channels of a head.
    scale: of the products of queries and keys.
    dtype: in which linear layers multiply.
    use_bias: whether they have one.
    soft_cap: what scores approach but do not pass; 0: no such thing.
  """

  heads: int
  key_heads: int
  head_width: int
  scale: float
  dtype: DTypeLike
  use_bias: bool = False
  soft_cap: float = 0.0

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    sees: Bool[Array, "b i n"],
    bias: Float[Array, "heads n n"] | None = None,
    turned: Callable[[Array], Array] = lambda x: x,
  ) -> Float[Array, "b n d"]:
    """The result, without `x` itself.

    Args:
      x: tokens.
      sees: which tokens, the last axis, each one sees; one row: all the same.
      bias: added to the scores.
      turned: of queries and of keys `[b, n, heads, d]`, what is multiplied.
    """

    def linear(name, features):
      return transformer.Linear(
        features, self.use_bias, dtype=self.dtype, name=name
      )

    def split(name, heads):
      y = linear(name, heads * self.head_width)(x)
      return rearrange(y, "b n (heads d) -> b n heads d", heads=heads)

    q = turned(split("query", self.heads)).astype(self.dtype)
    k = turned(split("key", self.key_heads)).astype(self.dtype)
    v = split("value", self.key_heads)
    q = rearrange(q, "b n (k r) d -> b n k r d", k=self.key_heads)
    scores = self.scale * jnp.einsum(
      "bikrd,bjkd->bkrij", q, k, preferred_element_type=jnp.float32
    )
    if self.soft_cap:
      scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
    if bias is not None:
      scores += rearrange(bias, "(k r) i j -> 1 k r i j", k=self.key_heads)
    scores = jnp.where(sees[:, None, None], scores, _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
    y = jnp.einsum("bkrij,bjkd->bikrd", weights, v)
    y = rearrange(y, "b n k r d -> b n (k r d)")
    return linear("project", x.shape[-1])(y)


class GatedMLP(nn.Module):
  """One linear layer through a GELU (its tanh formula) times another."""

  hidden: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    def linear(name, features):
      return transformer.Linear(features, False, dtype=self.dtype, name=name)

    gate = jax.nn.gelu(linear("gate", self.hidden)(x), approximate=True)
    y = gate * linear("up", self.hidden)(x)
    return linear("down", x.shape[-1])(y)
