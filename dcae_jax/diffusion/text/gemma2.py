"""Gemma 2 (arXiv 2408.00118) without its head, the text encoder of SANA.

A token sees itself and those before it; the last layer's states are taken.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dcae_jax import errors
from dcae_jax.diffusion.text import layers, weights
from dcae_jax.nn import transformer

SIZES = {
  "gemma-2-2b": {
    "vocabulary": 256_000, "width": 2304, "depth": 26, "heads": 8,
    "key_heads": 4, "head_width": 256, "hidden": 9216, "query_scale": 256,
    "soft_cap": 50.0, "period": 10_000.0, "window": 4096, "epsilon": 1e-6,
  },
}  # fmt: skip
_LAYER = "layers.#"
NAMES = weights.Names(
  modules={
    "words": "embed_tokens",
    "layer_#/attention_norm": f"{_LAYER}.input_layernorm",
    "layer_#/attention/query": f"{_LAYER}.self_attn.q_proj",
    "layer_#/attention/key": f"{_LAYER}.self_attn.k_proj",
    "layer_#/attention/value": f"{_LAYER}.self_attn.v_proj",
    "layer_#/attention/project": f"{_LAYER}.self_attn.o_proj",
    "layer_#/after_attention_norm": f"{_LAYER}.post_attention_layernorm",
    "layer_#/mlp_norm": f"{_LAYER}.pre_feedforward_layernorm",
    "layer_#/mlp/gate": f"{_LAYER}.mlp.gate_proj",
    "layer_#/mlp/up": f"{_LAYER}.mlp.up_proj",
    "layer_#/mlp/down": f"{_LAYER}.mlp.down_proj",
    "layer_#/after_mlp_norm": f"{_LAYER}.post_feedforward_layernorm",
    "norm": "norm",
  },
  older=((r"^model\.", ""),),
  ignored=r"lm_head\..*",
)


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
  """Those of `Gemma2`, of the values in a config.json."""
  activation = config.get("hidden_activation", "gelu_pytorch_tanh")
  if activation != "gelu_pytorch_tanh" or config.get("attention_bias"):
    raise errors.UserError(
      "only a Gemma 2 with hidden_activation gelu_pytorch_tanh, and without "
      "attention_bias, is built here"
    )
  rotation = config.get("rope_parameters") or config  # since transformers 5
  return {
    "vocabulary": config["vocab_size"],
    "width": config["hidden_size"],
    "depth": config["num_hidden_layers"],
    "heads": config["num_attention_heads"],
    "key_heads": config["num_key_value_heads"],
    "head_width": config["head_dim"],
    "hidden": config["intermediate_size"],
    "query_scale": config["query_pre_attn_scalar"],
    "soft_cap": config["attn_logit_softcapping"] or 0.0,
    "period": rotation["rope_theta"],
    "window": config["sliding_window"],
    "epsilon": config["rms_norm_eps"],
  }


def turned(
  x: Float[Array, "b n heads d"], period: float
) -> Float[Array, "b n heads d"]:
  """Each pair of channels i and i + d / 2, turned by an angle.

  It is the token's position times a frequency, which falls geometrically over
  the pairs from 1 towards 1 / `period`.
  """
  half = x.shape[-1] // 2
  frequencies = period ** -(np.arange(half) / half)
  angles = np.arange(x.shape[1])[:, None] * frequencies
  cosine, sine = (
    jnp.asarray(f(angles), jnp.float32)[None, :, None] for f in (np.cos, np.sin)
  )
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  parts = a * cosine - b * sine, b * cosine + a * sine
  return jnp.concatenate(parts, axis=-1)


class Gemma2(nn.Module):
  """The states of the last layer, normalised.

  Attributes:
    vocabulary: number of tokens.
    width: d of the states.
    depth: number of layers.
    heads: of the queries.
    key_heads: of keys and values.
    head_width: channels of a head.
    hidden: channels in the middle of an MLP.
    query_scale: the square of what scores are divided by.
    soft_cap: which scores do not pass; 0: they may.
    period: of the positions, see `turned`.
    window: how far every other layer sees. Longer texts are not encoded.
    epsilon: of the norms.
    dtype: of the linear layers.
  """

  vocabulary: int
  width: int
  depth: int
  heads: int
  key_heads: int
  head_width: int
  hidden: int
  query_scale: int
  soft_cap: float
  period: float
  window: int
  epsilon: float
  dtype: DTypeLike = "float32"

  @property
  def longest(self) -> int:
    return self.window

  @nn.compact
  def __call__(
    self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]
  ) -> Float[Array, "b n d"]:
    n = ids.shape[1]
    sees = mask[:, None] & np.tri(n, dtype=bool)[None]
    x = layers.embedded(ids, self.vocabulary, self.width, self.dtype, "words")
    x *= self.width**0.5
    for i in range(self.depth):
      x = _Layer(
        heads=self.heads,
        key_heads=self.key_heads,
        head_width=self.head_width,
        hidden=self.hidden,
        query_scale=self.query_scale,
        soft_cap=self.soft_cap,
        period=self.period,
        epsilon=self.epsilon,
        dtype=self.dtype,
        name=f"layer_{i}",
      )(x, sees)
    return _norm(self.epsilon, "norm")(x).astype(self.dtype)


class _Layer(nn.Module):
  heads: int
  key_heads: int
  head_width: int
  hidden: int
  query_scale: int
  soft_cap: float
  period: float
  epsilon: float
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], sees: Bool[Array, "b n n"]
  ) -> Float[Array, "b n d"]:
    y = _norm(self.epsilon, "attention_norm")(x)
    y = layers.Attention(
      heads=self.heads,
      key_heads=self.key_heads,
      head_width=self.head_width,
      scale=self.query_scale**-0.5,
      soft_cap=self.soft_cap,
      dtype=self.dtype,
      name="attention",
    )(y, sees, turned=functools.partial(turned, period=self.period))
    x += _norm(self.epsilon, "after_attention_norm")(y)
    y = _norm(self.epsilon, "mlp_norm")(x)
    y = layers.GatedMLP(self.hidden, self.dtype, name="mlp")(y)
    return x + _norm(self.epsilon, "after_mlp_norm")(y)


def _norm(epsilon: float, name: str) -> transformer.RMSNorm:
  return transformer.RMSNorm(epsilon, offset=1.0, name=name)
