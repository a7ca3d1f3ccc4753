"""The latent store: its layout, how it is filled, how it is checked.

  zarr.json        a zarr3 group of arrays, each row an image, in dataset order:
  latents/         [n, h / f, w / f, c] not scaled, sharded
  latents_flipped/ the same of the mirrored images, if they were asked for
  labels/          [n] int32
  keys/            [n] file names or ids, strings
  manifest.json    what it is; written last: without it nothing is finished
  progress/        until then: what is exported, which images can be read,
                   which shards are finished

A shard is an object of each array, and written by one process. It is finished
when its record says so, which is written after its objects: a process that is
killed at any moment leaves finished shards and others, never half of one.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any

import ml_dtypes
import numpy as np

from dcae_jax.runs import differences, storage

FORMAT = {"format": "dcae_jax.latents", "format_version": 1}
VIEWS = ("latents", "latents_flipped")
DTYPES = {
  "float32": np.dtype(np.float32),
  "float16": np.dtype(np.float16),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
CHUNK_ROWS = 16  # read at once
_SHARD_ROWS = 1024  # written at once: 16 MB of f64c128 at 512 px
_SHARD_BYTES = 2**26
_IDENTITY = "progress/identity.json"
_MANIFEST = "manifest.json"
# What readers rely on, of a manifest and of a shard's record.
_NEEDED = (
  "count", "shape", "dtype", "views", "classes", "shards", "scaling_factor",
  "shift_factor", "metadata_sha256",
)  # fmt: skip
_OF_SHARD = ("rows", "sha256", "moments")


def block_size(total: int, row_bytes: int = 1) -> int:
  """Rows of a shard, a multiple of `CHUNK_ROWS`.

  At most 1024 and 64 MB, fewer where there would be fewer than 64 shards.
  """
  most = min(_SHARD_ROWS, _SHARD_BYTES // row_bytes)
  rows = min(most, -(-total // 64))
  return max(1, -(-rows // CHUNK_ROWS)) * CHUNK_ROWS


class LatentStore:
  """Fills a store; any number of processes may, each with shards of its own.

  Attributes:
    storage: where it is.
  """

  def __init__(self, path: str, *, retries: int = storage.RETRIES):
    self.storage = storage.Storage(path, retries=retries)
    self._arrays: dict[str, Any] = {}

  # --- what it is ------------------------------------------------------------

  def check(self, process_index: int = 0) -> None:
    """Finds out whether this process may write here, and nobody else does.

    Raises:
      OSError: no such bucket, no permission, no answer.
      ValueError: it holds something else.
    """
    if self._described() is None:
      keys = self.storage.list_keys()
      found = [key for key in keys if not key.startswith("progress")]
      if found:
        raise ValueError(
          f"{self.storage.path} holds {min(found)} of something else; choose "
          "another config.output"
        )
    self.storage.check_writable(f"progress.probe_{process_index}")

  def _described(self) -> dict[str, Any] | None:
    found = self.storage.read_json(_MANIFEST)
    return self.storage.read_json(_IDENTITY) if found is None else found

  def check_identity(self, identity: dict[str, Any]) -> None:
    """Raises ValueError where the place holds latents of another export.

    What was begun without a finished shard does not count.
    """
    before = self._described()
    if before is None:
      return
    if "count" in before or self.storage.list_keys("progress/shards/"):
      self._compare(before, identity)

  def _compare(self, before: dict[str, Any], identity: dict[str, Any]) -> None:
    identity = FORMAT | identity
    if "count" in before:  # what it had to find out stands there
      identity = {k: v for k, v in identity.items() if v is not None}
    compared = differences.flat(identity)
    found = differences.differences(before, identity)
    changes = [text for key, text in found.items() if key in compared]
    if changes:
      raise ValueError(
        f"{self.storage.path} holds latents of another export ("
        f"{'; '.join(changes[:4])}); choose another config.output, or the same "
        "settings to go on with it"
      )

  def write_identity(self, identity: dict[str, Any]) -> None:
    """Of one process, after `check_identity` and before all else."""
    before = self._described()
    if before is None or (
      "count" not in before and before != FORMAT | identity
    ):
      for name in (*VIEWS, "labels", "keys", "progress"):
        self.storage.delete(f"{name}/")
      self.storage.write_json(_IDENTITY, FORMAT | identity)

  def confirm_identity(self, identity: dict[str, Any]) -> None:
    """Of every process: raises ValueError unless all do the same work here."""
    before = self._described()
    if before is None:
      raise ValueError(
        f"{self.storage.path} is not the same place for all processes; use a "
        "bucket, or a directory that all of them share, as config.output"
      )
    self._compare(before, identity)

  def manifest(self) -> dict[str, Any] | None:
    """None unless the store is finished."""
    return self.storage.read_json(_MANIFEST)

  # --- which images can be read ----------------------------------------------

  def survey(
    self,
    total: int,
    reason: Callable[[int], str | None],
    *,
    process_index: int,
    process_count: int,
    threads: int,
    on_images: Callable[[int], None],
    stopped: Callable[[], bool],
  ) -> None:
    """Tries this process's images; what was tried before is not tried again.

    Args:
      total: images of the source.
      reason: why an image cannot be used; None where it can.
      process_index: of this process.
      process_count: processes that share the work.
      threads: that try images at once.
      on_images: is told how many images were tried.
      stopped: leaves early where it becomes true.
    """
    size = block_size(total)
    done = self.storage.list_keys("progress/survey/")
    with futures.ThreadPoolExecutor(threads) as pool:
      for block in range(process_index, -(-total // size), process_count):
        images = range(block * size, min(total, (block + 1) * size))
        if _survey_key(block) not in done:
          if stopped():
            return
          reasons = zip(images, pool.map(reason, images), strict=True)
          unusable = {str(i): why for i, why in reasons if why is not None}
          self.storage.write_json(_survey_key(block), unusable)
          on_images(len(images))

  def unusable(self, total: int) -> dict[int, str]:
    """Index to reason, when the survey is complete."""
    keys = [_survey_key(i) for i in range(-(-total // block_size(total)))]
    return {
      int(index): reason
      for block in self.storage.read_all_json(keys)
      for index, reason in block.items()
    }

  # --- shards ----------------------------------------------------------------

  def create_arrays(
    self, rows: int, shape: tuple[int, ...], dtype: str, views: Iterable[str],
    shard_rows: int,
  ) -> None:  # fmt: skip
    """Writes the arrays' metadata, of one process; again does no harm.

    Args:
      rows: of each array.
      shape: of a latent, [h / f, w / f, c].
      dtype: a key of `DTYPES`.
      views: of `VIEWS`.
      shard_rows: rows of a shard.
    """
    group = {"zarr_format": 3, "node_type": "group", "attributes": FORMAT}
    self.storage.write_json("zarr.json", group)
    stored = "uint16" if dtype == "bfloat16" else dtype
    for view in views:
      metadata = _array(
        (rows, *shape), stored, (shard_rows, *shape), (CHUNK_ROWS, *shape)
      )
      metadata["attributes"] = {"dtype": dtype}
      self.storage.open_array(view, metadata)
    labels = _array((rows,), "int32", (shard_rows,), (CHUNK_ROWS,))
    self.storage.open_array("labels", labels)
    # tensorstore has no strings; zarr's own codec for them is a simple one.
    keys = {
      "zarr_format": 3,
      "node_type": "array",
      "shape": [rows],
      "data_type": "string",
      "chunk_grid": _grid((shard_rows,)),
      "chunk_key_encoding": {"name": "default"},
      "codecs": [{"name": "vlen-utf8"}],
      "fill_value": "",
      "attributes": {},
    }
    self.storage.write_json("keys/zarr.json", keys)

  def finished(self, shards: int, views: Iterable[str]) -> list[int]:
    """The shards that have a record, and all their objects."""
    there = self.storage.list_keys()
    return [
      shard
      for shard in range(shards)
      if {_record_key(shard), *_objects(shard, views)} <= there
    ]

  def write_shard(
    self,
    shard: int,
    shard_rows: int,
    latents: dict[str, np.ndarray],
    labels: np.ndarray,
    keys: list[str],
    record: dict[str, Any],
  ) -> None:
    """Writes one shard, then its record; returns when both are there.

    Args:
      shard: its number.
      shard_rows: rows of a full one; only the last may have fewer.
      latents: by view, [rows, h / f, w / f, c].
      labels: [rows].
      keys: of the images.
      record: what else is to be kept of it; `records` returns it.
    """
    parts = {view: _stored(array) for view, array in latents.items()}
    parts["labels"] = np.asarray(labels, np.int32)
    encoded = _encode_strings(keys, shard_rows)
    for name, part in parts.items():
      if name not in self._arrays:
        self._arrays[name] = self.storage.open_array(name)
      self.storage.write_rows(self._arrays[name], shard * shard_rows, part)
    self.storage.write(f"keys/c/{shard}", encoded)
    checksums = {name: _sha256(part) for name, part in parts.items()}
    checksums["keys"] = hashlib.sha256(encoded).hexdigest()
    self.storage.write_json(
      _record_key(shard), record | {"rows": len(labels), "sha256": checksums}
    )

  def records(self, shards: int) -> list[dict[str, Any]]:
    """Of all shards, which are finished."""
    keys = [_record_key(i) for i in range(shards)]
    records = self.storage.read_all_json(keys)
    for key, record in zip(keys, records, strict=True):
      _check_keys(f"{self.storage.path}/{key}", record, _OF_SHARD)
    return records

  def metadata_checksums(self, views: Iterable[str]) -> dict[str, str]:
    """Sha256 of what zarr reads first, by key."""
    keys = _metadata_keys(views)
    found = zip(keys, self.storage.read_all(keys), strict=True)
    return {key: _sha256(data) for key, data in found}

  def finish(self, manifest: dict[str, Any]) -> None:
    """Writes the manifest, and removes what was needed until then."""
    self.storage.write_json(_MANIFEST, FORMAT | manifest)
    self.remove_progress()

  def remove_progress(self) -> None:
    """Once more, where the last process was killed before it could."""
    self.storage.delete("progress/")


def read_manifest(place: storage.Storage) -> dict[str, Any]:
  """The manifest of a finished store.

  Raises:
    ValueError: there is none, or it is of another format.
  """
  found = place.read_json(_MANIFEST)
  if found is None and place.read(_IDENTITY) is not None:
    raise ValueError(
      f"{place.path} is not finished; run its export again, which goes on "
      "where it was"
    )
  if found is None:
    raise ValueError(f"{place.path} is no latent store: it has no {_MANIFEST}")
  if {key: found.get(key) for key in FORMAT} != FORMAT:
    raise ValueError(
      f"{place.path}/{_MANIFEST} is not of {FORMAT['format']}, version "
      f"{FORMAT['format_version']}"
    )
  _check_keys(f"{place.path}/{_MANIFEST}", found, _NEEDED)
  if found["dtype"] not in DTYPES or not found["views"]:
    raise ValueError(f"{place.path}/{_MANIFEST} is damaged: dtype or views")
  return found


def _check_keys(
  path: str, found: dict[str, Any], needed: tuple[str, ...]
) -> None:
  missing = [key for key in needed if found.get(key) is None]
  if missing:
    raise ValueError(f"{path} is damaged: it has no {', '.join(missing)}")


def check_arrays(place: storage.Storage, manifest: dict[str, Any]) -> None:
  """Raises ValueError unless arrays and numbers fit each other.

  No row is read; `verify` reads all.
  """
  _, problems = _open_arrays(place, manifest)
  rows = sum(shard["rows"] for shard in manifest["shards"])
  if rows != manifest["count"]:
    problems.append(
      f"the shards have {rows} rows, and the manifest {manifest['count']}"
    )
  if not 0 < manifest["scaling_factor"] < np.inf:
    problems.append(f"the scaling factor is {manifest['scaling_factor']}")
  if problems:
    raise ValueError(f"{place.path} is damaged: {'; '.join(problems)}")


def _open_arrays(
  place: storage.Storage, manifest: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
  """Arrays of the shapes that they should have, and what is wrong."""
  arrays, problems, rows = {}, [], manifest["count"]
  for name in (*manifest["views"], "labels"):
    expected = (rows,) if name == "labels" else (rows, *manifest["shape"])
    try:
      arrays[name] = place.open_array(name)
    except OSError as error:
      problems.append(f"{name} cannot be opened: {error}")
      continue
    if tuple(arrays[name].shape) != expected:
      problems.append(
        f"{name} has the shape {tuple(arrays[name].shape)}, not {expected}"
      )
      del arrays[name]
  return arrays, problems


def verify(
  place: storage.Storage,
  manifest: dict[str, Any],
  on_rows: Callable[[int], None] = lambda count: None,
) -> list[str]:
  """Reads all of a finished store; returns what is wrong with it.

  Shapes against the manifest, and the checksum of each shard of each array.
  """
  problems, rows = [], manifest["count"]
  for key, checksum in manifest["metadata_sha256"].items():
    data = place.read(key)
    if data is None:
      problems.append(f"{key} is missing")
    elif _sha256(data) != checksum:
      problems.append(f"{key} does not have the checksum of the manifest")
  arrays, found = _open_arrays(place, manifest)
  problems += found
  start = 0
  for shard, record in enumerate(manifest["shards"]):
    stop = start + record["rows"]
    for name, checksum in record["sha256"].items():
      where = f"shard {shard} of {name} (rows {start} to {stop - 1})"
      try:
        if name == "keys":
          part = place.read(f"keys/c/{shard}")
        elif name in arrays:
          with place.errors():
            part = arrays[name][start:stop].read().result()
        else:
          continue
      except OSError as error:
        problems.append(f"{where} cannot be read: {error}")
        continue
      if part is None:
        problems.append(f"{where} is missing")
      elif _sha256(part) != checksum:
        problems.append(f"{where} does not have the checksum of the manifest")
    on_rows(stop - start)
    start = stop
  if start != rows:
    problems.append(f"the shards have {start} rows, and the manifest {rows}")
  return problems


def read_keys(place: storage.Storage, manifest: dict[str, Any]) -> list[str]:
  """The file names or ids of all rows."""
  shards = manifest["shards"]
  objects = place.read_all([f"keys/c/{i}" for i in range(len(shards))])
  return [
    key
    for data, shard in zip(objects, shards, strict=True)
    for key in _decode_strings(data)[: shard["rows"]]
  ]


def _survey_key(block: int) -> str:
  return f"progress/survey/{block:06d}.json"


def _record_key(shard: int) -> str:
  return f"progress/shards/{shard:06d}.json"


def _metadata_keys(views: Iterable[str]) -> list[str]:
  return ["zarr.json", *(f"{x}/zarr.json" for x in (*views, "labels", "keys"))]


def _objects(shard: int, views: Iterable[str]) -> set[str]:
  return {
    *(f"{view}/c/{shard}/0/0/0" for view in views),
    f"labels/c/{shard}",
    f"keys/c/{shard}",
  }


def _grid(shape: tuple[int, ...]) -> dict[str, Any]:
  return {"name": "regular", "configuration": {"chunk_shape": list(shape)}}


def _array(
  shape: tuple[int, ...],
  dtype: str,
  shard: tuple[int, ...],
  chunk: tuple[int, ...],
) -> dict[str, Any]:
  """Metadata of a sharded zarr3 array, its chunks plain with a checksum."""
  plain = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
  ]
  sharding = {
    "chunk_shape": list(chunk),
    "codecs": plain,
    "index_codecs": plain,
    "index_location": "start",  # not every server knows ranges from the end
  }
  return {
    "shape": list(shape),
    "data_type": dtype,
    "chunk_grid": _grid(shard),
    "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    "fill_value": 0,
  }


def _stored(latents: np.ndarray) -> np.ndarray:
  """zarr in Python knows no bfloat16: its bits."""
  is_bfloat16 = latents.dtype == DTYPES["bfloat16"]
  return latents.view(np.uint16) if is_bfloat16 else latents


def _sha256(data: np.ndarray | bytes) -> str:
  if isinstance(data, np.ndarray):
    data = np.ascontiguousarray(data).view(np.uint8).data
  return hashlib.sha256(data).hexdigest()


def _encode_strings(texts: list[str], count: int) -> bytes:
  """zarr's vlen-utf8: a count, then each string after its length."""
  texts = [*texts, *[""] * (count - len(texts))]
  parts = [struct.pack("<I", count)]
  for text in texts:
    data = text.encode("utf-8", "backslashreplace")
    parts += [struct.pack("<I", len(data)), data]
  return b"".join(parts)


def _decode_strings(data: bytes) -> list[str]:
  try:
    (count,), position, texts = struct.unpack_from("<I", data), 4, []
    for _ in range(count):
      (length,) = struct.unpack_from("<I", data, position)
      position += 4 + length
      texts.append(data[position - length : position].decode())
  except (struct.error, UnicodeDecodeError) as error:
    raise ValueError(f"keys are damaged: {error}") from error
  return texts
