"""Texts to token ids, with the marks that a text encoder wants around them.

Nothing here needs JAX, and a tokenizer goes to other processes as the text of
its file and its numbers: loaders make ids of the captions that they read.
"""

import hashlib
import logging
import pathlib
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dcae_jax import errors
from dcae_jax.diffusion.text import unigram_file

_LOG = logging.getLogger(__name__)


class Marks(NamedTuple):
  """Tokens that are no text: padding, and what begins and ends one, or ""."""

  pad: str
  begin: str = ""
  end: str = ""


def find(folders: Sequence[pathlib.Path]) -> str:
  """The text of a `tokenizer.json` in the first folder that holds one.

  A sentencepiece file without it is converted. Raises UserError if there is
  neither, or if it is of a kind that only other libraries convert.
  """
  for folder in folders:
    file = folder / "tokenizer.json"
    if file.is_file():
      try:
        return file.read_bytes().decode()
      except UnicodeDecodeError as error:
        raise errors.UserError(f"{file} is damaged ({error})") from error
    for name in ("spiece.model", "tokenizer.model"):
      if (folder / name).is_file():
        return unigram_file.to_json(folder / name)
  raise errors.UserError(
    f"{folders[0]} has no tokenizer.json, and no spiece.model; copy the one of "
    "the model there"
  )


class Tokenizer:
  """Ids of a fixed number of tokens, padded on the right.

  Attributes:
    vocabulary: number of tokens that there are.
    max_tokens: the most of a text, marks included, that the encoder's states
      are of.
    length: of the rows of ids: `max_tokens`, but for an instruction, of which
      all tokens but the first and the last go before.
    instruction: a text before each text, but the empty one, which is no
      caption.
    cut: how many texts were longer so far, and lost their end.
  """

  def __init__(
    self, file: str, marks: Marks, max_tokens: int, instruction: str = ""
  ):
    """Reads the text of a `tokenizer.json`; UserError if it does not fit."""
    import tokenizers  # of an extra: `encoders.load` asks for it

    self._file, self._marks = file, marks
    self.max_tokens, self.instruction = max_tokens, instruction
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(file)
    except Exception as error:  # it has no class of its own
      raise errors.UserError(
        f"tokenizer.json is damaged ({errors.first_line(error)})"
      ) from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.vocabulary = self._tokenizer.get_vocab_size()
    self._pad, self._begin, self._end = map(self._mark, marks)
    least = len(self._begin) + len(self._end) + 1
    if max_tokens < least:
      raise errors.UserError(
        f"max_tokens={max_tokens} is below {least}: a token, and the marks "
        "around it"
      )
    self.length = max_tokens
    if instruction:
      before = len(self._begin) + len(self._encode([instruction])[0])
      self.length += max(before - 2, 0)
    self.cut = self._seen = 0
    self._lock = threading.Lock()

  @property
  def fingerprint(self) -> str:
    """The sha256 of the file."""
    return hashlib.sha256(self._file.encode()).hexdigest()

  def __reduce__(self) -> tuple[Any, ...]:
    fields = self._file, self._marks, self.max_tokens, self.instruction
    return Tokenizer, fields

  def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int32 [b, length], and which of them are tokens, bool."""
    rows = self._encode([text and self.instruction + text for text in texts])
    room = self.length - len(self._begin) - len(self._end)
    ids = np.full((len(rows), self.length), self._pad, np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
      tokens = [*self._begin, *row[:room], *self._end]
      ids[i, : len(tokens)] = tokens
      mask[i, : len(tokens)] = True
    self._count(len(rows), sum(len(row) > room for row in rows))
    return ids, mask

  def _encode(self, texts: list[str]) -> list[list[int]]:
    encodings = self._tokenizer.encode_batch_fast(
      texts, add_special_tokens=False
    )
    return [encoding.ids for encoding in encodings]

  def _mark(self, token: str) -> list[int]:
    number = self._tokenizer.token_to_id(token) if token else None
    if token and number is None:
      raise errors.UserError(
        f"tokenizer.json has no token {token}: it is of another model"
      )
    return [number] if token else []

  def _count(self, texts: int, cut: int) -> None:
    with self._lock:
      is_first = cut and not self.cut
      self._seen += texts
      self.cut += cut
      seen, cut = self._seen, self.cut
    if is_first:
      _LOG.warning(
        "%d of %d texts so far have more than %d tokens, and lose their end; "
        "this is said once",
        cut,
        seen,
        self.max_tokens,
      )
