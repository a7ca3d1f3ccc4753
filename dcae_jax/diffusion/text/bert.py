"""BERT (arXiv 1810.04805), in the size of MiniLM: small, with real weights in a
package. Each norm comes after the sum with what a layer adds.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dcae_jax import errors
from dcae_jax.diffusion.text import layers, weights
from dcae_jax.nn import transformer

SIZES = {
  "minilm": {
    "vocabulary": 30522, "positions": 512, "segments": 2, "width": 384,
    "depth": 6, "heads": 12, "hidden": 1536, "epsilon": 1e-12,
  },
}  # fmt: skip
_LAYER = "encoder.layer.#"
NAMES = weights.Names(
  modules={
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "layer_#/attention/query": f"{_LAYER}.attention.self.query",
    "layer_#/attention/key": f"{_LAYER}.attention.self.key",
    "layer_#/attention/value": f"{_LAYER}.attention.self.value",
    "layer_#/attention/project": f"{_LAYER}.attention.output.dense",
    "layer_#/attention_norm": f"{_LAYER}.attention.output.LayerNorm",
    "layer_#/expand": f"{_LAYER}.intermediate.dense",
    "layer_#/contract": f"{_LAYER}.output.dense",
    "layer_#/norm": f"{_LAYER}.output.LayerNorm",
  },
  older=((r"^bert\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
  ignored=r"pooler\..*|cls\..*|embeddings\.position_ids",
)


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
  """Those of `Bert`, of the values in a config.json."""
  activation = config.get("hidden_act", "gelu")
  kind = config.get("position_embedding_type", "absolute")
  if activation != "gelu" or kind != "absolute":
    raise errors.UserError(
      f"hidden_act={activation!r} and position_embedding_type={kind!r} are "
      "not gelu and absolute, the only ones that are built here"
    )
  return {
    "vocabulary": config["vocab_size"],
    "positions": config["max_position_embeddings"],
    "segments": config["type_vocab_size"],
    "width": config["hidden_size"],
    "depth": config["num_hidden_layers"],
    "heads": config["num_attention_heads"],
    "hidden": config["intermediate_size"],
    "epsilon": config["layer_norm_eps"],
  }


class Bert(nn.Module):
  """The states of the last layer.

  Attributes:
    vocabulary: number of tokens.
    positions: the most tokens of a text.
    segments: kinds of text; all tokens here are of the first.
    width: d of the states.
    depth: number of layers.
    heads: of the attention.
    hidden: channels in the middle of an MLP.
    epsilon: of the norms.
    dtype: of the linear layers.
  """

  vocabulary: int
  positions: int
  segments: int
  width: int
  depth: int
  heads: int
  hidden: int
  epsilon: float
  dtype: DTypeLike = "float32"

  @property
  def longest(self) -> int:
    return self.positions

  @nn.compact
  def __call__(
    self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]
  ) -> Float[Array, "b n d"]:
    def table(name, count, ids):
      return layers.embedded(ids, count, self.width, self.dtype, name)

    places = jnp.arange(ids.shape[1])[None]
    x = table("words", self.vocabulary, ids)
    position = table("positions", self.positions, places)
    segment = table("segments", self.segments, jnp.zeros_like(places))
    x = transformer.LayerNorm(self.epsilon, name="norm")(x + position + segment)
    for i in range(self.depth):
      x = _Layer(
        self.heads, self.hidden, self.epsilon, self.dtype, name=f"layer_{i}"
      )(x, mask)
    return x.astype(self.dtype)


class _Layer(nn.Module):
  heads: int
  hidden: int
  epsilon: float
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"]
  ) -> Float[Array, "b n d"]:
    def linear(name, features):
      return transformer.Linear(features, dtype=self.dtype, name=name)

    head_width = x.shape[-1] // self.heads
    y = layers.Attention(
      heads=self.heads,
      key_heads=self.heads,
      head_width=head_width,
      scale=head_width**-0.5,
      use_bias=True,
      dtype=self.dtype,
      name="attention",
    )(x, mask[:, None])
    x = transformer.LayerNorm(self.epsilon, name="attention_norm")(x + y)
    y = jax.nn.gelu(linear("expand", self.hidden)(x), approximate=False)
    y = linear("contract", x.shape[-1])(y)
    return transformer.LayerNorm(self.epsilon, name="norm")(x + y)
