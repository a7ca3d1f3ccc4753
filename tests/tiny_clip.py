"""A small CLIP with random tensors and a tokenizer of letters."""

import pathlib
import zlib

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from dcae_jax.evaluation.networks import clip, pretrained

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
_START, _END = "<|startoftext|>", "<|endoftext|>"
SIZE = clip.Size(
  vision=clip.Transformer(layers=3, width=128, tokens=10),
  text=clip.Transformer(layers=2, width=64, tokens=16),
  patch=8,
  vocabulary=len(_WORDS) + 2,
  features=48,
)


def _tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Norms and biases too are random; attention is far from even."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  if name.endswith("bias"):
    return rng.normal(size=shape) * 0.3
  if name.endswith("embedding.weight"):
    return rng.normal(size=shape)
  if len(shape) == 1:
    return rng.uniform(0.5, 1.5, shape)
  return rng.normal(size=shape) * 1.5 / np.prod(shape[1:]) ** 0.5


def parameters(size: clip.Size = SIZE) -> dict[str, np.ndarray]:
  return {
    name: _tensor(name, shape).astype(np.float32)
    for name, shape in clip.parameter_shapes(size).items()
  }


def write_tokenizer(folder: pathlib.Path) -> None:
  """As CLIP's is, without pairs of letters to be merged."""
  vocabulary = {word: i for i, word in enumerate((*_WORDS, _START, _END))}
  tokenizer = tokenizers.Tokenizer(
    models.BPE(vocabulary, [], unk_token=_END, end_of_word_suffix="</w>")
  )
  tokenizer.normalizer = normalizers.Lowercase()
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.post_processor = processors.RobertaProcessing(
    (_END, vocabulary[_END]), (_START, vocabulary[_START])
  )
  tokenizer.save(str(folder / clip.TOKENIZER))


def weights(folder: pathlib.Path) -> pretrained.Pretrained:
  """As `clip.load` returns them; the file is not there, its tokenizer is."""
  write_tokenizer(folder)
  return pretrained.Pretrained(
    parameters(), str(folder / clip.FILE), "0", False
  )
