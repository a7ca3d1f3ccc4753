"""Images of any source to a record shard, with the rows of its index.

What cannot be decoded is left out, with its reason. Pixels are as they were, or
reduced and encoded anew.
"""

import dataclasses
import hashlib
import io
import itertools
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dcae_jax import errors
from dcae_jax.data import array_records, headers, images, index, sources
from dcae_jax.data import captions as image_captions
from dcae_jax.data import decoding as image_decoding

_SAVED = {  # by `Encoding.kind`
  "jpeg": {"format": "JPEG", "subsampling": 0},
  "webp_lossless": {"format": "WEBP", "lossless": True},
}
_VERIFIED_AT = 16  # pixels: all of a JPEG is read, and little is computed
# Images that tell how large they are: so many that follow each other, which are
# perhaps read together, in so many places.
_NEIGHBOURS, _PLACES = 8, 8


@dataclasses.dataclass(frozen=True)
class Encoding:
  """How images are stored.

  Attributes:
    kind: "jpeg", "webp_lossless", or "": their files as they are.
    shorter_side: larger images are reduced to it, and only these are encoded
      anew; 0: all of them are, at their size.
    quality: of JPEG, 1 to 100; without chroma subsampling.
    max_megapixels: larger images are left out.
  """

  kind: str = ""
  shorter_side: int = 0
  quality: int = 95
  max_megapixels: float = 89.0

  def __post_init__(self):
    if self.kind not in ("", *_SAVED):
      raise errors.UserError(
        f"unknown config.encoding={self.kind!r}; use {', '.join(_SAVED)}, "
        "or '' to keep the files as they are"
      )
    if self.shorter_side and not self.kind:
      raise errors.UserError(
        f"config.shorter_side={self.shorter_side} needs images to be encoded "
        "anew: set config.encoding to jpeg or webp_lossless"
      )


class Prepared(NamedTuple):
  """The bytes of an image, and its width and height as it is shown."""

  encoded: bytes
  width: int
  height: int


class Member(NamedTuple):
  """A source that is prepared.

  Attributes:
    split: what its images are called, "" for no name.
    labels: in the store, by its own; None: the same.
  """

  source: sources.Source
  split: str
  labels: tuple[int, ...] | None = None


class Shard(NamedTuple):
  """Images of a member, from `start` to `stop`, that go into a file."""

  number: int
  member: int
  start: int
  stop: int

  @property
  def name(self) -> str:
    return f"shards/{self.number:05d}.array_record"


def prepared(encoded: bytes, encoding: Encoding) -> Prepared:
  """Of an image file; raises whatever `decode` does if it cannot be decoded."""
  limit = image_decoding.Decoding(max_megapixels=encoding.max_megapixels)
  width, height = headers.shown_size(io.BytesIO(encoded))
  side = encoding.shorter_side
  if not encoding.kind or min(width, height) <= side:
    image_decoding.decode(
      encoded, dataclasses.replace(limit, shorter_side=_VERIFIED_AT)
    )
    return Prepared(encoded, width, height)
  image = image_decoding.decode(
    encoded, dataclasses.replace(limit, shorter_side=side)
  )
  saved = dict(_SAVED[encoding.kind])
  if encoding.kind == "jpeg":
    saved["quality"] = encoding.quality
  buffer = io.BytesIO()
  image.save(buffer, **saved)
  return Prepared(buffer.getvalue(), *image.size)


def plan(
  members: Sequence[Member], encoding: Encoding, shard_bytes: float
) -> list[Shard]:
  """Shards of about that size, estimated from some images of each member."""
  shards: list[Shard] = []
  for number, member in enumerate(members):
    total = len(member.source)
    starts = np.linspace(0, max(total - _NEIGHBOURS, 0), _PLACES).astype(int)
    chosen = np.unique(starts[:, None] + np.arange(_NEIGHBOURS))
    chosen = chosen[chosen < total]
    sizes = [
      len(loaded.encoded)
      for i in chosen.tolist()
      if isinstance(loaded := _load(member.source, i, encoding)[1], Prepared)
    ]
    if not sizes:
      raise errors.UserError(
        f"none of {len(chosen)} images that were tried can be used, the first "
        f"{member.source.name(0)}: {_load(member.source, 0, encoding)[1]}"
      )
    count = max(1, round(shard_bytes / max(np.mean(sizes), 1)))
    count = -(-total // -(-total // count))  # shards of about the same size
    for start in range(0, total, count):
      shards.append(
        Shard(len(shards), number, start, min(start + count, total))
      )
  return shards


def _load(
  source: sources.Source, i: int, encoding: Encoding
) -> tuple[sources.Record | None, Prepared | str]:
  """A record and its image; or why it cannot be used."""
  try:
    record = images.read_record(source, i)
  except images.UnusableError as error:
    return None, str(error)
  try:
    return record, prepared(record.encoded, encoding)
  except MemoryError:
    raise
  except Exception as error:  # Pillow raises anything
    return record, " ".join(str(error).split()) or type(error).__name__


def write(
  shard: Shard, member: Member, encoding: Encoding, threads: int, path: str
) -> tuple[pa.Table, dict[str, str]]:
  """Writes the file of a shard; its rows of the index, and what was left out.

  That is by split and key, with the reason.
  """
  columns: dict[str, list] = {name: [] for name in index.SCHEMA.names}
  left_out: dict[str, str] = {}

  def records() -> Iterator[bytes]:
    load = lambda i: _load(member.source, i, encoding)
    loaded = _ahead(load, range(shard.start, shard.stop), threads)
    for i, (record, image) in loaded:
      key = member.source.key(i)
      if isinstance(image, str):
        left_out["/".join(filter(None, (member.split, key)))] = image
        continue
      label = record.label
      if member.labels and label >= 0:  # hubs note -1 where they tell none
        label = member.labels[label]
      row = {
        "key": key,
        "label": label,
        "captions": image_captions.joined(record.captions),
        "split": member.split,
        "width": image.width,
        "height": image.height,
        "file": shard.number,
        "position": len(columns["key"]),
        "bytes": len(image.encoded),
        "crc32": zlib.crc32(image.encoded),
        "sha256": hashlib.sha256(image.encoded).digest(),
      }
      for name, value in row.items():
        columns[name].append(value)
      yield image.encoded

  columns["offset"] = array_records.write(path, records())
  return pa.table(columns, schema=index.SCHEMA), left_out


def _ahead(
  load: Callable[[int], tuple], numbers: Sequence[int], threads: int
) -> Iterator[tuple[int, tuple]]:
  """Numbers with what is loaded of them, in order, some ahead of their use."""
  with futures.ThreadPoolExecutor(threads) as pool:
    waiting, left = deque(), iter(numbers)
    for number in itertools.islice(left, 2 * threads):
      waiting.append((number, pool.submit(load, number)))
    while waiting:
      number, future = waiting.popleft()
      yield number, future.result()
      for following in itertools.islice(left, 1):
        waiting.append((following, pool.submit(load, following)))


def in_order(tables: Sequence[pa.Table]) -> pa.Table:
  """All rows in the order of their images' digests, see `sources.Records`."""
  order = ("sha256", "label", "captions", "split", "key")
  return pa.concat_tables(tables).sort_by([(x, "ascending") for x in order])
