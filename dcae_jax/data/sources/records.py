"""Record shards with an index, as the task `prepare` makes them.

What is asked of an image but its pixels is looked up in the index; reading one
is one request. The images are in the order of their digests, whatever they were
prepared from: a fair shuffle, the same for the same images.
"""

import errno
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dcae_jax import errors
from dcae_jax.data import array_records, index, listings
from dcae_jax.data import captions as image_captions
from dcae_jax.data.sources import protocol
from dcae_jax.runs import json_types, resumable_store, storage

INDEX = "index.parquet"
FORMAT = {"format": "dcae_jax.records", "format_version": 1}
_TYPES = {  # of what is read of the manifest
  "format": str, "format_version": int, "classes": [str], "count": int,
  "index_sha256": str, "shards": [{"name": str, "bytes": int}],
}  # fmt: skip
_ADVICE = "prepare the images again, or copy all of it again"


class Records:
  """Images of prepared record shards, local or `gs://`.

  Attributes:
    classes: names, by label.
  """

  def __init__(
    self,
    path: str,
    split: str = "",
    classes: tuple[str | int, ...] = (),
    captions: bool = False,
  ):
    """Reads the index, of which the rows are kept that are asked for.

    Args:
      path: of the directory, which holds an index and the shards.
      split: as the images were prepared with; "": all of them.
      classes: names or numbers of those that are kept; (): all.
      captions: give them, too.

    Raises:
      UserError: it is no such directory, or its parts do not belong together.
    """
    if not path:
      raise errors.UserError(
        "config.source.path is empty; name what the task prepare has made"
      )
    self._place = storage.Storage(path)
    manifest = _manifest(self._place)
    self.classes = manifest["classes"]
    self._shards = [shard["name"] for shard in manifest["shards"]]
    self._has_captions = captions
    self._check_shards(manifest["shards"])
    self._rows = index.Index(self._table(manifest, split, classes))

  def _table(
    self, manifest: dict[str, Any], split: str, classes: tuple[str | int, ...]
  ) -> pa.Table:
    """The rows of the index that are kept."""
    data, path = self._place.read(INDEX), f"{self._place.path}/{INDEX}"
    if data is None:
      raise errors.UserError(f"{path} is gone; {_ADVICE}")
    if index.sha256(data) != manifest["index_sha256"]:
      raise errors.UserError(
        f"{path} is not the index of these shards, or damaged; {_ADVICE}"
      )
    table = index.from_parquet(data, path)
    table = _of_split(table, split, self._place.path)
    table = _of_classes(table, classes, self.classes, self._place.path)
    if self._has_captions and not index.has_captions(table):
      raise errors.UserError(
        f"{self._place.path} was prepared without captions; set "
        "config.source.captions=False, or prepare it with them"
      )
    return table

  def _check_shards(self, shards: list[dict[str, Any]]) -> None:
    """Raises UserError where one is missing, or of another size."""
    sizes = listings.files(f"{self._place.path}/shards")
    for shard in shards:
      name, size = shard["name"], None
      if (path := f"{self._place.path}/{name}") in sizes:
        size = listings.size(path, sizes[path])
      if size != shard["bytes"]:
        there = "is gone" if size is None else f"has {size:,} bytes"
        raise errors.UserError(
          f"{self._place.path}/{name} {there}, where the index needs "
          f"{shard['bytes']:,}; {_ADVICE}"
        )

  def __len__(self) -> int:
    return len(self._rows)

  def name(self, index: int) -> str:
    return f"{self._place.path}:{self.key(index)}"

  def key(self, index: int) -> str:
    """What it was called where it was prepared from."""
    return self._rows.text("key", index)

  def sizes(self) -> np.ndarray | None:
    return self._rows.sizes()

  def draws(self) -> np.ndarray:
    """By the images themselves: equal ones are on the same side."""
    return self._rows.digests() / 2.0**64

  def fingerprint(self) -> str:
    """sha256 of what the images are, not of where they are stored."""
    return self._rows.digest("key", "label", "captions", "split", "sha256")

  def __getitem__(self, index: int) -> protocol.Record:
    rows, name = self._rows, self.name(index)
    file, offset, size, crc32, label = rows.of_row(
      index, "file", "offset", "bytes", "crc32", "label"
    )
    shard = self._shards[file]
    stop = array_records.stop(offset, size)
    data = self._place.read_range(shard, offset, stop)
    if data is None:
      raise FileNotFoundError(
        errno.ENOENT, "it is gone", f"{self._place.path}/{shard}"
      )
    encoded = array_records.without_headers(data, offset)
    if zlib.crc32(encoded) != crc32:
      raise errors.UserError(
        f"{name} is not what was indexed: {self._place.path}/{shard} was "
        f"changed, or is damaged; {_ADVICE}"
      )
    captions = ()
    if self._has_captions:
      captions = tuple(image_captions.split(rows.text("captions", index)))
    return protocol.Record(name, encoded, label, captions)


def _manifest(place: storage.Storage) -> dict[str, Any]:
  name = resumable_store.MANIFEST
  manifest, path = place.read_json(name), f"{place.path}/{name}"
  if manifest is None:
    raise errors.UserError(
      f"{place.path} has no {name}: the task prepare has not made it, or "
      "has not finished; run it again, which goes on where it was"
    )
  json_types.check(path, manifest, _TYPES, _ADVICE)
  if {key: manifest[key] for key in FORMAT} != FORMAT:
    raise errors.UserError(
      f"{path} is of {manifest['format']}, version "
      f"{manifest['format_version']}, not of {FORMAT['format']}, version "
      f"{FORMAT['format_version']}"
    )
  return manifest


def _of_split(table: pa.Table, split: str, path: str) -> pa.Table:
  if not split:
    return table
  kept = table.filter(pc.equal(table["split"], split))
  if not len(kept):
    known = sorted(filter(None, pc.unique(table["split"]).to_pylist()))
    raise errors.UserError(
      f"{path} has no split {split!r}; there are {', '.join(known) or 'none'}"
    )
  return kept


def _of_classes(
  table: pa.Table, wanted: tuple[str | int, ...], names: list[str], path: str
) -> pa.Table:
  """The rows of classes by name or number; their labels stay."""
  if not wanted:
    return table
  numbers = {name: label for label, name in enumerate(names)}
  labels = [numbers.get(name, name) for name in map(str, wanted)]
  there = set(map(str, pc.unique(table["label"]).to_pylist()))
  if unknown := [x for x in labels if str(x) not in there]:
    shown = ", ".join([*names[:5], "..."] if names else sorted(there)[:5])
    raise errors.UserError(
      f"{path} has no images of the class {unknown[0]!r}; there are {shown}"
    )
  kept = pa.array([int(x) for x in labels], pa.int32())
  return table.filter(pc.is_in(table["label"], kept))
