"""Captions of a latent store as a training reads them: tokens, or states.

States are a text encoder's, in a store of their own: those of the tokens of all
texts one after the other, without padding. A text that is the caption of
several images is there once.

  states/        [tokens, d] bfloat16, sharded
  offsets/       [texts + 1] int64: where the states of each text begin
  texts/         [captions] int64: which text each caption is
  images/        [images + 1] int64: where the captions of each image begin
  manifest.json  of which captions and which encoder; written last
  progress/      until then

A shard of states is written once, by one process, which encodes all texts that
have tokens in it.
"""

import collections
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcae_jax.data import captions
from dcae_jax.latents import layout, store
from dcae_jax.runs import differences, storage

KIND = "captions"  # of a store
_WHERE = ("images", "texts", "offsets")
_SHARD_ROWS = 2**17
_IN_FLIGHT = 2  # batches on the devices
_TYPES = {  # of what is read of the manifest
  "count": int, "shape": [int], "dtype": str, "views": [str],
  "captions": str, "encoder": dict, "shards": [dict],
}  # fmt: skip
Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


class Tokens:
  """What a batch brings: the tokens of a caption of each image."""

  def __init__(self, tokenize: Tokenize):
    self._tokenize = tokenize

  def __call__(
    self, rows: np.ndarray, images: np.ndarray, uniforms: np.ndarray
  ) -> dict[str, np.ndarray]:
    del images
    texts = []
    for row, uniform in zip(rows, uniforms, strict=True):
      of_image = captions.split(row)
      texts.append(of_image[_drawn(of_image, uniform)].text)
    ids, mask = self._tokenize(texts)
    return {"ids": ids, "mask": mask}


class States:
  """What a batch brings: the states of a caption of each image."""

  def __init__(
    self,
    path: str,
    tokens: int,
    *,
    cache_megabytes: float = 64,
    retries: int = storage.RETRIES,
  ):
    """Opens a finished store; captions are filled up to so many tokens.

    Raises UserError if there is none.
    """
    self._place = storage.Storage(
      path, retries=retries, cache_megabytes=cache_megabytes
    )
    self.manifest = layout.read_manifest(self._place, KIND, _TYPES)
    self._tokens = tokens
    self._images, self._texts, self._offsets = map(self._read, _WHERE)
    self._array = None

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_array": None}  # a worker opens its own

  def check(self, rows: np.ndarray, encoder: dict[str, Any]) -> None:
    """Raises UserError unless they are of these captions and this encoder."""
    differences.check_same(
      {key: self.manifest[key] for key in ("captions", "encoder")},
      identity(rows, encoder),
      f"{self._place.path} holds states of other captions, or of another "
      "encoder",
      "encode them again with configs/encode_captions.py, or name the encoder "
      "that did with config.text",
    )

  def __call__(
    self, rows: np.ndarray, images: np.ndarray, uniforms: np.ndarray
  ) -> dict[str, np.ndarray]:
    numbers = [
      self._images[image] + _drawn(captions.split(row), uniform)
      for row, image, uniform in zip(rows, images, uniforms, strict=True)
    ]
    return self.read(self._texts[numbers])

  def read(self, texts: np.ndarray) -> dict[str, np.ndarray]:
    """States [b, l, d] in bfloat16, and mask [b, l], of texts by number."""
    (width,) = self.manifest["shape"]
    bfloat16 = layout.DTYPES["bfloat16"]
    states = np.zeros((len(texts), self._tokens, width), bfloat16)
    mask = np.zeros(states.shape[:2], bool)
    with self._place.errors():
      if self._array is None:
        self._array = self._place.open_array("states")
      parts = [
        self._array[self._offsets[i] : self._offsets[i + 1]].read()
        for i in texts
      ]
      for i, part in enumerate(parts):
        part = part.result().view(bfloat16)
        states[i, : len(part)] = part
        mask[i, : len(part)] = True
    return {"states": states, "mask": mask}

  def _read(self, name: str) -> np.ndarray:
    with self._place.errors():
      return self._place.open_array(name).read().result()


def _drawn(of_image: list[captions.Caption], uniform: float) -> int:
  return captions.drawn([caption.weight for caption in of_image], uniform)


def fingerprint(rows: np.ndarray) -> str:
  """Sha256 of all captions of a store."""
  digest = hashlib.sha256()
  for row in rows:
    digest.update(row.encode("utf-8", "backslashreplace") + b"\0")
  return digest.hexdigest()


class Encoder(NamedTuple):
  """A text encoder, as far as its states are kept.

  Attributes:
    tokenize: texts to ids [b, n] and mask [b, n].
    states: `(ids, mask) -> [b, l, d]`, of `batch_size` captions at once.
    kept: the mask of tokens to that of states.
    width: d.
    batch_size: captions that are encoded at once.
  """

  tokenize: Tokenize
  states: Callable[[np.ndarray, np.ndarray], Any]
  kept: Callable[[np.ndarray], np.ndarray]
  width: int
  batch_size: int


class Encoding:
  """The states of all captions of a latent store, as shards to be written."""

  def __init__(
    self, target: store.LatentStore, rows: np.ndarray, encoder: Encoder
  ):
    """Tokenises all captions: where their states are follows from that."""
    self._store, self._encoder = target, encoder
    by_image = [captions.split(row) for row in rows]
    of_captions = [text for image in by_image for text, _ in image]
    self._texts = list(dict.fromkeys(of_captions))
    numbers = {text: i for i, text in enumerate(self._texts)}
    size = encoder.batch_size
    self._offsets = _starts(
      length
      for i in range(0, len(self._texts), size)
      for length in self._lengths(self._texts[i : i + size])
    )
    self._where = (
      _starts(map(len, by_image)),
      np.array([numbers[text] for text in of_captions], np.int64),
      self._offsets,
    )
    total = int(self._offsets[-1])
    row_bytes = 2 * encoder.width
    self.layout = layout.Layout(
      total,
      (encoder.width,),
      "bfloat16",
      ("states",),
      layout.block_size(total, row_bytes, _SHARD_ROWS),
      {},
      has_keys=False,
    )

  def _lengths(self, texts: list[str]) -> np.ndarray:
    _, mask = self._encoder.tokenize(texts)
    return np.sum(np.asarray(self._encoder.kept(mask)), axis=1)

  def create_arrays(self) -> None:
    """Writes the arrays' metadata and where texts are, by one process."""
    self._store.create_arrays(self.layout)
    place = self._store.storage
    for name, numbers in zip(_WHERE, self._where, strict=True):
      metadata = {
        "shape": [len(numbers)],
        "data_type": "int64",
        "chunk_grid": layout.grid(len(numbers)),
      }
      place.write_rows(place.open_array(name, metadata), 0, numbers)

  def missing(self) -> list[int]:
    finished = set(self._store.finished(self.layout))
    return [i for i in range(self.layout.shards) if i not in finished]

  def tokens(self, shard: int) -> int:
    """Of a shard."""
    first = shard * self.layout.shard_rows
    return min(self.layout.shard_rows, self.layout.rows - first)

  def fill(
    self, shards: Sequence[int], stopped: Callable[[], bool]
  ) -> Iterator[int]:
    """Encodes and writes shards; yields the tokens of each."""
    for shard in shards:
      if stopped():
        return
      first = shard * self.layout.shard_rows
      count = self.tokens(shard)
      begin = np.searchsorted(self._offsets, first, "right") - 1
      end = np.searchsorted(self._offsets, first + count, "left")
      states = np.concatenate(list(self._states(self._texts[begin:end])))
      states = states[first - self._offsets[begin] :][:count]
      if not np.isfinite(states.astype(np.float32)).all():
        raise FloatingPointError(
          f"states of {self._texts[begin]!r} or later are not finite; use "
          "config.text.dtype=float32, or another encoder"
        )
      states = states.astype(layout.DTYPES["bfloat16"])
      self._store.write_shard(self.layout, shard, {"states": states}, [], {})
      yield count

  def _states(self, texts: list[str]) -> Iterator[np.ndarray]:
    """States [tokens, d] of texts; the devices have the next batch."""
    size, in_flight = self._encoder.batch_size, collections.deque()

    def fetch():
      states, kept = in_flight.popleft()
      return np.asarray(states)[: len(kept)][kept]

    for i in range(0, len(texts), size):
      part = texts[i : i + size]
      ids, mask = self._encoder.tokenize(part + [""] * (size - len(part)))
      states = self._encoder.states(ids, mask)
      kept = np.asarray(self._encoder.kept(mask))[: len(part)]
      in_flight.append((states, kept))
      if len(in_flight) == _IN_FLIGHT:
        yield fetch()
    while in_flight:
      yield fetch()

  @property
  def numbers(self) -> dict[str, int]:
    """For people."""
    images, of_captions, _ = self._where
    return {
      "images": len(images) - 1,
      "captions": len(of_captions),
      "texts": len(self._texts),
      "tokens": self.layout.rows,
      "bytes": 2 * self.layout.rows * self._encoder.width,
    }


def _starts(lengths: Any) -> np.ndarray:
  return np.concatenate([[0], np.cumsum([*lengths], dtype=np.int64)])


def store_of(path: str, retries: int) -> store.LatentStore:
  """A place for states, which need not be there."""
  return store.LatentStore(path, retries=retries, kind=KIND)


def identity(rows: np.ndarray, encoder: dict[str, Any]) -> dict[str, Any]:
  """What must be the same to go on with a store of states."""
  return {"captions": fingerprint(rows), "encoder": encoder}
