"""Filling a latent store, by any number of processes and starts.

A shard is written by one process. It is finished when its record says so, which
is written after its objects: a process that is killed at any moment leaves
finished shards and others, never half of one.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from typing import Any

import numpy as np

from dcae_jax import errors
from dcae_jax.latents import layout as store_layout
from dcae_jax.runs import json_types, resumable_store, storage

_FIRST = "first_sha256"  # of a shard's first rows
_OF_SHARD = {"rows": int, "sha256": dict}  # a record


class LatentStore(resumable_store.ResumableStore):
  """Fills a store; any number of processes may, each with shards of its own."""

  progress = (*resumable_store.ResumableStore.progress, "progress/survey/")

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
    self._arrays: dict[str, Any] = {}

  def clear(self) -> None:
    arrays = self.storage.list_keys()
    arrays = {k.partition("/")[0] for k in arrays if k.endswith("/zarr.json")}
    for name in sorted(arrays):
      self.storage.delete(f"{name}/")

  def survey_blocks(self, total: int) -> dict[int, range]:
    """The blocks of images that were not tried yet, by number."""
    size = store_layout.block_size(total)
    done = self.storage.list_keys("progress/survey/")
    return {
      block: range(block * size, min(total, (block + 1) * size))
      for block in range(-(-total // size))
      if _survey_key(block) not in done
    }

  def survey(
    self,
    blocks: Mapping[int, range],
    reason: Callable[[int], str | None],
    threads: int,
  ) -> Iterable[int]:
    """Tries the images of some blocks; yields their number, block by block.

    `reason` tells why an image cannot be used; None if it can.
    """
    with futures.ThreadPoolExecutor(threads) as pool:
      for block, images in blocks.items():
        reasons = zip(images, pool.map(reason, images), strict=True)
        unusable = {str(i): why for i, why in reasons if why is not None}
        self.storage.write_sealed_json(_survey_key(block), unusable)
        yield len(images)

  def unusable(self, total: int) -> dict[int, str]:
    """Index to reason, when the survey is complete."""
    blocks = -(-total // store_layout.block_size(total))
    keys = [_survey_key(block) for block in range(blocks)]
    found = {}
    for key, block in zip(keys, self.storage.read_all_json(keys), strict=True):
      for index, reason in block.items():
        if not index.isdecimal():
          raise errors.UserError(
            f"{self.storage.path}/{key} is damaged: {index} is no number of an "
            "image; remove it, and run again"
          )
        found[int(index)] = reason
    return found

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
      if name not in self._arrays:
        self._arrays[name] = self.storage.open_array(name)
      self.storage.write_rows(
        self._arrays[name], shard * layout.shard_rows, part
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

  def records(self, shards: int) -> list[dict[str, Any]]:
    """The records of all shards, which are finished."""
    keys = [_record_key(i) for i in range(shards)]
    records = self.storage.read_all_json(keys)
    for key, record in zip(keys, records, strict=True):
      path = f"{self.storage.path}/{key}"
      json_types.check(path, record, _OF_SHARD, "remove it, and run again")
    return records

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
          for record in self.records(layout.shards)
        ],
        "metadata_sha256": {
          key: store_layout.sha256(data) for key, data in metadata
        },
      },
    )
    self.remove_progress()


def _survey_key(block: int) -> str:
  return f"progress/survey/{block:06d}.json"


def _record_key(shard: int) -> str:
  return f"progress/shards/{shard:06d}.json"
