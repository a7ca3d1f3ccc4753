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
from dcae_jax.runs import differences, json_types, lease, storage

_FIRST = "first_sha256"  # of a shard's first rows
_PROBE = "progress.probe_"
_PROGRESS = (
  _PROBE, "progress/survey/", "progress/shards/", store_layout.IDENTITY,
)  # fmt: skip
_OF_SHARD = {"rows": int, "sha256": dict}  # a record


class LatentStore:
  """Fills a store; any number of processes may, each with shards of its own."""

  def __init__(
    self,
    path: str,
    *,
    retries: int = storage.RETRIES,
    kind: str = "latents",
  ):
    self.storage = storage.Storage(path, retries=retries)
    self._format = store_layout.format_of(kind)
    self._arrays: dict[str, Any] = {}

  def check_writable(self, process_index: int = 0) -> None:
    """Finds out whether this process may write here.

    Raises:
      OSError: no such bucket, no permission, no answer.
      UserError: the place holds something else.
    """
    if self._described() is None:
      keys = self.storage.list_keys()
      own = (*_PROGRESS, lease.DIRECTORY)
      foreign = [key for key in keys if not key.startswith(own)]
      if foreign:
        raise errors.UserError(
          f"{self.storage.path} holds {min(foreign)} of something else; choose "
          "another config.output"
        )
    self.storage.check_writable(f"{_PROBE}{process_index}")

  def _described(self) -> dict[str, Any] | None:
    manifest = self.manifest()
    if manifest is not None:
      return manifest
    return self.storage.read_json(store_layout.IDENTITY)

  def check_identity(self, identity: dict[str, Any], begun: bool) -> None:
    """Raises UserError if the place holds latents of another export.

    Args:
      identity: what must be the same; None: the export computes it.
      begun: this export must be there. If False, another one that has no
        finished shard does not count.
    """
    before = self._described()
    if before is None and begun:
      raise errors.UserError(
        f"{self.storage.path} is not the same place for all processes; use a "
        "bucket, or a directory that all of them share, as config.output"
      )
    if before is None or not (
      begun or "count" in before or self.storage.list_keys("progress/shards/")
    ):
      return
    identity = self._format | identity
    if "count" in before:  # a manifest, which has what the export computed
      identity = {k: v for k, v in identity.items() if v is not None}
    compared = differences.flat(identity)
    flat = differences.flat(before).items()
    differences.check_same(
      {key: value for key, value in flat if key in compared},
      compared,
      f"{self.storage.path} holds latents of another export",
      "choose another config.output, or the same settings to go on with it",
    )

  def write_identity(self, identity: dict[str, Any]) -> None:
    """Called by one process, after `check_identity` and before all else."""
    before, identity = self._described(), self._format | identity
    if before is None or ("count" not in before and before != identity):
      arrays = self.storage.list_keys()
      arrays = {k.partition("/")[0] for k in arrays if k.endswith("/zarr.json")}
      for name in sorted(arrays):
        self.storage.delete(f"{name}/")
      self.remove_progress()
      self.storage.write_sealed_json(store_layout.IDENTITY, identity)

  def manifest(self) -> dict[str, Any] | None:
    """None unless the store is finished."""
    return self.storage.read_json(store_layout.MANIFEST)

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
      "attributes": self._format,
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
      store_layout.MANIFEST,
      self._format
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

  def remove_progress(self) -> None:
    """Once more, where the last process was killed before it could."""
    for prefix in _PROGRESS:
      self.storage.delete(prefix)
    if not self.storage.list_keys("progress/"):
      self.storage.delete("progress/")  # a local folder, if it is empty


def _survey_key(block: int) -> str:
  return f"progress/survey/{block:06d}.json"


def _record_key(shard: int) -> str:
  return f"progress/shards/{shard:06d}.json"
