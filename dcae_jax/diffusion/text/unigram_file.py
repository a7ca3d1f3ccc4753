"""Sentencepiece's own files, such as the `spiece.model` of T5.

A protocol buffer with the pieces of a unigram model, their scores, and a table
that normalises characters. What `tokenizers` reads is built of these.
"""

import pathlib
import struct
from collections.abc import Iterator

from dcae_jax import errors

# Numbers of fields: of the file, of a piece, of the settings.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_CHARACTERS = 2
# Settings that must have these values; absent ones have them.
_TRAINER_SETTINGS = {3: 1, 24: 0, 35: 0}  # unigram, no suffixes, no bytes
_NORMALIZER_SETTINGS = {3: 1, 4: 1, 5: 1}  # how spaces are treated
_UNKNOWN = 2  # the kind of the piece for characters without one
_SPACE = "▁"


def to_json(file: pathlib.Path) -> str:
  """The text of the equivalent `tokenizer.json`; UserError for other models."""
  import tokenizers  # of an extra, as in tokenizer.py
  from tokenizers import models, normalizers, pre_tokenizers

  advice = (
    "where transformers is installed, make a tokenizer.json of it: python -c "
    f'"from transformers import AutoTokenizer as T; p = {str(file.parent)!r}; '
    'T.from_pretrained(p).save_pretrained(p)"'
  )
  try:
    fields = list(_fields(file.read_bytes()))
    pieces = [dict(_fields(value)) for n, value in fields if n == _PIECE]
    settings = {n: dict(_fields(v)) for n, v in fields if n != _PIECE}
    vocabulary = [
      (piece[_TEXT].decode(), struct.unpack("<f", piece[_SCORE])[0])
      for piece in pieces
    ]
    unknown = [piece.get(_KIND) for piece in pieces].index(_UNKNOWN)
    trainer, normalizer = settings[_TRAINER], settings[_NORMALIZER]
  except (ValueError, KeyError, IndexError, AttributeError, struct.error):
    raise errors.UserError(
      f"{file} is no sentencepiece file, or damaged; copy it again"
    ) from None
  if not (
    _holds(trainer, _TRAINER_SETTINGS)
    and _holds(normalizer, _NORMALIZER_SETTINGS)
  ):
    raise errors.UserError(f"{file} is no unigram model as T5's; {advice}")
  tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unknown))
  steps = [
    normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
    normalizers.Strip(),
  ]
  if normalizer.get(_CHARACTERS):
    steps.insert(0, normalizers.Precompiled(normalizer[_CHARACTERS]))
  tokenizer.normalizer = normalizers.Sequence(steps)
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "always")
  return tokenizer.to_str()


def _holds(settings: dict[int, int | bytes], expected: dict[int, int]) -> bool:
  return all(settings.get(n, value) == value for n, value in expected.items())


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
  """The fields of a protocol buffer: their numbers and values, in order."""
  place = 0

  def number() -> int:
    nonlocal place
    value = shift = 0
    while True:
      byte = data[place]
      place += 1
      value |= (byte & 0x7F) << shift
      shift += 7
      if byte < 0x80:
        return value

  while place < len(data):
    key = number()
    kind = key & 7
    if kind == 0:
      yield key >> 3, number()
      continue
    size = {1: lambda: 8, 2: number, 5: lambda: 4}[kind]()
    if place + size > len(data):
      raise ValueError("it ends inside a field")
    yield key >> 3, data[place : place + size]
    place += size
