"""Folders of tiny text encoders with random weights, as others store them."""

import json
import pathlib

import jax
import numpy as np
import safetensors.numpy
import tokenizers

from dcae_jax.diffusion.text import encoders
from dcae_jax.training import freezing

MARKS = ["<pad>", "<bos>", "</s>", "[PAD]", "[CLS]", "[SEP]", "<unk>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz "
CONFIGS = {
  "minilm": {
    "model_type": "bert", "vocab_size": 40, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
  },
  "t5": {
    "model_type": "t5", "vocab_size": 40, "d_model": 16, "num_layers": 2,
    "num_heads": 4, "d_kv": 8, "d_ff": 24, "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu",
  },
  "gemma2": {
    "model_type": "gemma2", "vocab_size": 40, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 24, "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 50.0, "rope_theta": 10_000.0,
    "sliding_window": 64, "rms_norm_eps": 1e-6,
  },
}  # fmt: skip


def letters() -> str:
  """The text of a `tokenizer.json` whose tokens are letters."""
  words = MARKS + list(LETTERS)
  model = tokenizers.models.WordLevel(
    {word: i for i, word in enumerate(words)}, "<unk>"
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  return tokenizer.to_str()


def tensors(kind: str, seed: int = 0) -> dict[str, np.ndarray]:
  """Random values under the names that files have."""
  rng = np.random.default_rng(seed)
  row = encoders.KINDS[kind]
  model = row.module(**row.fields(CONFIGS[kind]))
  ids = np.zeros((1, 4), np.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), ids, ids == 0)
  result = {}
  for keys, leaf in jax.tree.leaves_with_path(shapes["params"]):
    values = rng.normal(size=leaf.shape[::-1]) / leaf.shape[0] ** 0.5
    name = row.names.of(freezing.path_of(keys))
    is_kernel = keys[-1].key == "kernel"
    result[name] = (values if is_kernel else values.T).astype(np.float32)
  return result


def save(folder: pathlib.Path, kind: str, **changes) -> pathlib.Path:
  """A folder that `encoders.load` reads; `changes` are of its config."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(CONFIGS[kind] | changes))
  (folder / "tokenizer.json").write_text(letters())
  safetensors.numpy.save_file(tensors(kind), folder / "model.safetensors")
  return folder
