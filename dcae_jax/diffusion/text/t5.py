"""The encoder of T5 v1.1 (arXiv 1910.10683, 2002.05202), as PixArt uses it.

Positions are known by a bias of the scores alone, which all layers share.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dcae_jax import errors
from dcae_jax.diffusion.text import layers, weights
from dcae_jax.nn import transformer

_COMMON = {
  "vocabulary": 32128, "head_width": 64, "buckets": 32, "max_distance": 128,
  "epsilon": 1e-6,
}  # fmt: skip
SIZES = {
  f"t5-v1_1-{name}": _COMMON
  | {"width": width, "depth": depth, "heads": heads, "hidden": hidden}
  for name, width, depth, heads, hidden in (
    ("small", 512, 8, 6, 1024),
    ("base", 768, 12, 12, 2048),
    ("large", 1024, 24, 16, 2816),
    ("xl", 2048, 24, 32, 5120),
    ("xxl", 4096, 24, 64, 10240),
  )
}
_ATTENTION = "encoder.block.#.layer.0"
_MLP = "encoder.block.#.layer.1"
NAMES = weights.Names(
  modules={
    "words": "shared",
    "distances": f"{_ATTENTION}.SelfAttention.relative_attention_bias".replace(
      "#", "0"
    ),
    "layer_#/attention_norm": f"{_ATTENTION}.layer_norm",
    "layer_#/attention/query": f"{_ATTENTION}.SelfAttention.q",
    "layer_#/attention/key": f"{_ATTENTION}.SelfAttention.k",
    "layer_#/attention/value": f"{_ATTENTION}.SelfAttention.v",
    "layer_#/attention/project": f"{_ATTENTION}.SelfAttention.o",
    "layer_#/mlp_norm": f"{_MLP}.layer_norm",
    "layer_#/mlp/gate": f"{_MLP}.DenseReluDense.wi_0",
    "layer_#/mlp/up": f"{_MLP}.DenseReluDense.wi_1",
    "layer_#/mlp/down": f"{_MLP}.DenseReluDense.wo",
    "norm": "encoder.final_layer_norm",
  },
  older=((r"^encoder\.embed_tokens\.", "shared."),),
  ignored=r"decoder\..*|lm_head\..*",
)


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
  """Those of `T5Encoder`, of the values in a config.json."""
  form = config.get("feed_forward_proj", "relu")
  if form != "gated-gelu":
    raise errors.UserError(
      f"feed_forward_proj={form!r} is that of the first T5; only v1.1, with "
      "gated-gelu, is built here"
    )
  return {
    "vocabulary": config["vocab_size"],
    "width": config["d_model"],
    "depth": config["num_layers"],
    "heads": config["num_heads"],
    "head_width": config["d_kv"],
    "hidden": config["d_ff"],
    "buckets": config["relative_attention_num_buckets"],
    "max_distance": config.get("relative_attention_max_distance", 128),
    "epsilon": config["layer_norm_epsilon"],
  }


def buckets(
  length: int, count: int, max_distance: int
) -> Int[np.ndarray, "n n"]:
  """The bucket of the way from each token (a row) to each other one.

  Half of them are for ways forward. In either half, half of them are for one
  distance each, and the others get wider up to `max_distance`.
  """
  ways = np.arange(length)[None] - np.arange(length)[:, None]
  half, exact = count // 2, count // 4
  distances = np.abs(ways)
  # In float32, and in this order, as those rounded who trained it.
  octaves = np.log(np.maximum(distances, exact).astype(np.float32) / exact)
  octaves = octaves / np.float32(math.log(max_distance / exact))
  wide = exact + (octaves * (half - exact)).astype(int)
  bucket = np.where(distances < exact, distances, np.minimum(wide, half - 1))
  return bucket + half * (ways > 0)


class T5Encoder(nn.Module):
  """The states of the last layer, normalised.

  Attributes:
    vocabulary: number of tokens.
    width: d of the states.
    depth: number of layers.
    heads: of the attention.
    head_width: channels of a head; together they may be more than `width`.
    hidden: channels in the middle of an MLP.
    buckets: kinds of distance between tokens.
    max_distance: from which on all are of one kind.
    epsilon: of the norms.
    dtype: of the linear layers.
  """

  vocabulary: int
  width: int
  depth: int
  heads: int
  head_width: int
  hidden: int
  buckets: int
  max_distance: int
  epsilon: float
  dtype: DTypeLike = "float32"

  @property
  def longest(self) -> float:
    return math.inf

  @nn.compact
  def __call__(
    self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]
  ) -> Float[Array, "b n d"]:
    distances = buckets(ids.shape[1], self.buckets, self.max_distance)
    bias = layers.embedded(
      jnp.asarray(distances), self.buckets, self.heads, self.dtype, "distances"
    )
    bias = rearrange(bias, "i j heads -> heads i j")
    x = layers.embedded(ids, self.vocabulary, self.width, self.dtype, "words")
    for i in range(self.depth):
      x = _Layer(
        heads=self.heads,
        head_width=self.head_width,
        hidden=self.hidden,
        epsilon=self.epsilon,
        dtype=self.dtype,
        name=f"layer_{i}",
      )(x, mask, bias)
    return transformer.RMSNorm(self.epsilon, name="norm")(x).astype(self.dtype)


class _Layer(nn.Module):
  heads: int
  head_width: int
  hidden: int
  epsilon: float
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    mask: Bool[Array, "b n"],
    bias: Float[Array, "heads n n"],
  ) -> Float[Array, "b n d"]:
    y = transformer.RMSNorm(self.epsilon, name="attention_norm")(x)
    x += layers.Attention(
      heads=self.heads,
      key_heads=self.heads,
      head_width=self.head_width,
      scale=1.0,
      dtype=self.dtype,
      name="attention",
    )(y, mask[:, None], bias)
    y = transformer.RMSNorm(self.epsilon, name="mlp_norm")(x)
    return x + layers.GatedMLP(self.hidden, self.dtype, name="mlp")(y)
