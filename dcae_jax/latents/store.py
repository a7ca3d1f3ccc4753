"""Filling a latent store, by any number of processes and starts.

A shard is written by one process. It is finished when its record says so, which
is written after its objects: a process that is killed at any moment leaves
finished shards and others, never half of one.

A shard has gaps where images turn out to be unusable when they are decoded: it
has fewer rows than its place, or none; `placement` closes them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dcae_jax import errors
from dcae_jax.latents import layout as store_layout
from dcae_jax.runs import json_types, resumable_store, storage

_FIRST = "first_sha256"  # of a shard's first rows
_SURVEY = "progress/survey/"  # that earlier versions began with
_EMPTY, _SHARDS = "progress/empty/", "progress/shards/"
_MOVED, _CLOSED = "progress/moved/", "progress/closed.json"
_OF_SHARD = {"rows": int, "sha256": dict}  # a record
_RECORD = _OF_SHARD | {"unusable?": dict}


class LatentStore(resumable_store.ResumableStore):
  """Fills a store; any number of processes may, each with shards of its own."""

  progress = (
    resumable_store.PROBE, _SURVEY, _EMPTY, _SHARDS, _MOVED, _CLOSED,
    resumable_store.IDENTITY,
  )  # fmt: skip

  def __init__(
    self,
    path: str,
    *,
    retries: int = storage.RETRIES,
    kind: str = "latents",
  ):
    super().__init__(
      path,
      what="latents of another export",
      description=store_layout.format_of(kind),
      retries=retries,
    )
    self._options = {"retries": retries, "kind": kind}
    self._arrays: dict[str, Any] = {}

  def clear(self) -> None:
    arrays = self.storage.list_keys()
    arrays = {k.partition("/")[0] for k in arrays if k.endswith("/zarr.json")}
    for name in sorted(arrays):
      self.storage.delete(f"{name}/")

  def moved(self) -> "LatentStore":
    """A store beside this one, until it is finished: of rows that move."""
    return LatentStore(f"{self.storage.path}/{_MOVED}", **self._options)

  def discard_moved(self) -> None:
    self.storage.delete(_MOVED)

  def surveyed(self) -> dict[int, str]:
    """Unusable images, with the reason, that an earlier version has found.

    It tried all of them before it wrote its first shard.
    """
    return self._unusable(sorted(self.storage.list_keys(_SURVEY)))

  def closed(self) -> dict[int, str] | None:
    """What `write_closed` wrote, if it did."""
    there = self.storage.list_keys(_CLOSED)
    return self._unusable([_CLOSED]) if there else None

  def write_closed(self, unusable: Mapping[int, str]) -> None:
    """By one process, when all rows are in `moved` that have to move.

    From then on, shards may be overwritten.
    """
    self._write_unusable(_CLOSED, unusable)

  def empty(self) -> dict[int, dict[int, str]]:
    """The shards without rows, with their unusable images and the reasons."""
    keys = sorted(self.storage.list_keys(_EMPTY))
    parts = zip(keys, self.storage.read_all_json(keys), strict=True)
    return {
      int(key.removeprefix(_EMPTY).removesuffix(".json")): self._indices(
        key, part
      )
      for key, part in parts
    }

  def write_empty(self, shard: int, unusable: Mapping[int, str]) -> None:
    """Of a shard, none of whose images can be used: it has no objects."""
    self._write_unusable(_empty_key(shard), unusable)

  def gaps(self, shards: int) -> list[dict[int, str]]:
    """The unusable images of each shard, all of which are finished."""
    empty = self.empty()
    others = [i for i in range(shards) if i not in empty]
    found = {
      i: self._indices(_record_key(i), record.get("unusable", {}))
      for i, record in zip(others, self.records(others), strict=True)
    }
    return [empty.get(i, found.get(i)) for i in range(shards)]

  def _write_unusable(self, key: str, unusable: Mapping[int, str]) -> None:
    values = {str(index): reason for index, reason in unusable.items()}
    self.storage.write_sealed_json(key, values)

  def _unusable(self, keys: list[str]) -> dict[int, str]:
    found = {}
    for key, part in zip(keys, self.storage.read_all_json(keys), strict=True):
      found |= self._indices(key, part)
    return found

  def _indices(self, key: str, unusable: Mapping[str, str]) -> dict[int, str]:
    for index in unusable:
      if not index.isdecimal():
        raise errors.UserError(
          f"{self.storage.path}/{key} is damaged: {index} is no number of an "
          "image; remove it, and run again"
        )
    return {int(index): reason for index, reason in unusable.items()}

  def create_arrays(self, layout: store_layout.Layout) -> None:
    """Writes the arrays' metadata, by one process; again does no harm."""
    group = {
      "zarr_format": 3,
      "node_type": "group",
      "attributes": self.description,
    }
    self.storage.write_json("zarr.json", group)
    for name, metadata in layout.arrays().items():
      self.storage.open_array(name, metadata)
    for name in layout.strings:
      self.storage.write_json(f"{name}/zarr.json", layout.strings_array())

  def finished(self, layout: store_layout.Layout) -> list[int]:
    """The shards that have a record, and all their objects."""
    there = self.storage.list_keys()
    return [
      shard
      for shard in range(layout.shards)
      if {_record_key(shard), *layout.objects(shard)} <= there
    ]

  def write_shard(
    self,
    layout: store_layout.Layout,
    shard: int,
    arrays: Mapping[str, np.ndarray],
    keys: list[str],
    record: dict[str, Any],
  ) -> None:
    """Writes the rows of one shard by array, then its record.

    The record is what `records` returns; some keys of it are filled in here.
    There are no keys in a layout without them.
    """
    parts = {
      view: store_layout.as_stored(arrays[view]) for view in layout.views
    }
    rows = len(arrays[layout.views[0]])
    for name, column in layout.conditions.items():
      if name not in layout.strings:
        parts[name] = np.asarray(arrays[name], column.dtype)
    for name, part in parts.items():
      self.storage.write_rows(
        self._array(name), shard * layout.shard_rows, part
      )
    for name in layout.strings:
      texts = keys if name == "keys" else list(arrays[name])
      parts[name] = store_layout.encode_strings(texts, layout.shard_rows)
      self.storage.write(f"{name}/c/{shard}", parts[name])
    checksums = {
      "sha256": {name: store_layout.sha256(x) for name, x in parts.items()},
      _FIRST: {
        view: store_layout.sha256(parts[view][: store_layout.CHUNK_ROWS])
        for view in layout.views
      },
    }
    self.storage.write_sealed_json(
      _record_key(shard), record | {"rows": rows} | checksums
    )

  def _array(self, name: str) -> Any:
    if name not in self._arrays:
      self._arrays[name] = self.storage.open_array(name)
    return self._arrays[name]

  def records(self, shards: Iterable[int]) -> list[dict[str, Any]]:
    """The records of some shards, which are finished."""
    keys = [_record_key(i) for i in shards]
    records = self.storage.read_all_json(keys)
    for key, record in zip(keys, records, strict=True):
      path = f"{self.storage.path}/{key}"
      json_types.check(path, record, _RECORD, "remove it, and run again")
    return records

  def read_rows(
    self, layout: store_layout.Layout, rows: np.ndarray
  ) -> dict[str, Any]:
    """Rows [n] of finished shards by array, "keys" among them.

    Raises UserError where strings are damaged; numbers have checksums of their
    own, and then it is an OSError.
    """
    with self.storage.errors():
      parts = {x: self._array(x)[rows].read() for x in layout.arrays()}
      parts = {name: part.result() for name, part in parts.items()}
    for view in layout.views:
      parts[view] = parts[view].view(store_layout.DTYPES[layout.dtype])
    where, at = np.divmod(rows, layout.shard_rows)
    shards = np.unique(where).tolist()
    records = self.records(shards)
    for name in layout.strings:
      keys = [f"{name}/c/{shard}" for shard in shards]
      texts = {}
      for shard, key, record, data in zip(
        shards, keys, records, self.storage.read_all(keys), strict=True
      ):
        if store_layout.sha256(data) != record["sha256"].get(name):
          raise errors.UserError(
            f"{self.storage.path}/{key} is damaged: it is not what was "
            "written; remove it, and run again"
          )
        texts[shard] = store_layout.decode_strings(data)
      parts[name] = [texts[i][j] for i, j in zip(where, at, strict=True)]
    return parts

  def take_metadata(
    self, layout: store_layout.Layout, other: "LatentStore"
  ) -> None:
    """The arrays' metadata of another store, by one process."""
    self._take(layout.metadata_keys, other)

  def take_shard(
    self, layout: store_layout.Layout, shard: int, other: "LatentStore"
  ) -> None:
    """Another store's shard, byte for byte, which is then not finished there.

    Again does no harm, as long as it is finished there.
    """
    record = _record_key(shard)
    self._take([*sorted(layout.objects(shard)), record], other)
    other.storage.delete_all([record])

  def _take(self, keys: list[str], other: "LatentStore") -> None:
    for key, data in zip(keys, other.storage.read_all(keys), strict=True):
      self.storage.write(key, data)

  def remove_shards(
    self, layout: store_layout.Layout, shards: Iterable[int]
  ) -> None:
    """The objects of some shards, by one process."""
    objects = set().union(*map(layout.objects, shards))
    self.storage.delete_all(objects & self.storage.list_keys())

  def finish(
    self, layout: store_layout.Layout, manifest: dict[str, Any]
  ) -> None:
    """Writes the manifest, with the arrays added, and removes the progress."""
    keys = layout.metadata_keys
    metadata = zip(keys, self.storage.read_all(keys), strict=True)
    self.storage.write_sealed_json(
      resumable_store.MANIFEST,
      self.description
      | manifest
      | {
        "count": layout.rows,
        "shape": list(layout.shape),
        "dtype": layout.dtype,
        "views": list(layout.views),
        "conditions": list(layout.conditions),
        "shard_rows": layout.shard_rows,
        "shards": [
          # Begun before records had all, an export goes on.
          {k: record[k] for k in (*_OF_SHARD, _FIRST) if k in record}
          for record in self.records(range(layout.shards))
        ],
        "metadata_sha256": {
          key: store_layout.sha256(data) for key, data in metadata
        },
      },
    )
    self.remove_progress()


def _empty_key(shard: int) -> str:
  return f"{_EMPTY}{shard:06d}.json"


def _record_key(shard: int) -> str:
  return f"{_SHARDS}{shard:06d}.json"
