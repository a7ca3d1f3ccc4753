"""How a latent store lies on disk: its arrays, its manifest, its strings.

  zarr.json        a zarr3 group of arrays, each row an image, in dataset order:
  latents/         [n, h / f, w / f, c] not scaled, sharded
  latents_flipped/ the same of the mirrored images, if they were asked for
  labels/          [n] int32; a condition: what a denoiser is told of each image
  captions/        [n] strings, if they were asked for: see data/captions.py
  keys/            [n] file names or ids, strings
  manifest.json    what it is; written last: without it nothing is finished
  progress/        until then: what is exported, which shards are finished,
                   which images cannot be read, rows that move up

A shard is an object of each array.
"""

import dataclasses
import hashlib
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dcae_jax import errors
from dcae_jax.runs import json_types, resumable_store, storage

VIEWS = ("latents", "latents_flipped")
DTYPES = {
  "float32": np.dtype(np.float32),
  "float16": np.dtype(np.float16),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
CHUNK_ROWS = 16  # read at once
_SHARD_ROWS = 1024  # written at once: 16 MB of f64c128 at 512 px
_SHARD_BYTES = 2**26
_NUMBER = json_types.NUMBER
_AUTOENCODER = {
  "init_from": str, "encoder_sha256": str, "space_to_channel": int,
  "variant?": str, "spatial_compression?": int, "latent_channels?": int,
  "weights_sha256?": str,
}  # fmt: skip
_STATISTICS = {
  "mean": _NUMBER, "std": _NUMBER, "rms": _NUMBER,
  "channels": {"rms": [_NUMBER], "mean?": [_NUMBER], "std?": [_NUMBER]},
}  # fmt: skip
TYPES = {  # of what is read of the manifest
  "count": int, "shape": [int, int, int], "dtype": str, "views": [str],
  "classes": [str], "shards": [{"rows": int, "sha256": dict}],
  "scaling_factor": _NUMBER, "shift_factor": _NUMBER, "metadata_sha256": dict,
  "conditions?": [str], "autoencoder?": _AUTOENCODER, "crop?": dict,
  "statistics?": _STATISTICS, "source?": dict, "versions?": dict,
  "unreadable?": [{"key": str, "reason": str}], "resolution?": int,
  "scaling_factor_origin?": str,
}  # fmt: skip


def format_of(kind: str) -> dict[str, Any]:
  """What identities and manifests of a kind of store begin with."""
  return {"format": f"dcae_jax.{kind}", "format_version": 1}


class Column(NamedTuple):
  """One row of a condition's array; its dtype may be "string"."""

  shape: tuple[int, ...]
  dtype: str


LABELS = {"labels": Column((), "int32")}
CAPTIONS = {"captions": Column((), "string")}


@dataclasses.dataclass(frozen=True)
class Layout:
  """The arrays of a store.

  Attributes:
    rows: of each array.
    shape: of a latent, [h / f, w / f, c].
    dtype: of the latents, a key of `DTYPES`.
    views: of `VIEWS`.
    shard_rows: the last shard may have fewer.
    conditions: by the name of their arrays.
    has_keys: rows have names.
  """

  rows: int
  shape: tuple[int, ...]
  dtype: str
  views: tuple[str, ...]
  shard_rows: int
  conditions: Mapping[str, Column] = dataclasses.field(
    default_factory=LABELS.copy
  )
  has_keys: bool = True

  @property
  def strings(self) -> list[str]:
    """The names of the arrays of strings."""
    columns = self.conditions.items()
    texts = [name for name, column in columns if column.dtype == "string"]
    return [*texts, *["keys"] * self.has_keys]

  @property
  def _numbers(self) -> dict[str, Column]:
    """The arrays of numbers but the latents."""
    return {k: x for k, x in self.conditions.items() if k not in self.strings}

  @property
  def shards(self) -> int:
    return -(-self.rows // self.shard_rows)

  @property
  def metadata_keys(self) -> list[str]:
    """Of what zarr reads first."""
    arrays = (*self.views, *self._numbers, *self.strings)
    return ["zarr.json", *(f"{name}/zarr.json" for name in arrays)]

  def objects(self, shard: int) -> set[str]:
    """The keys of a shard's objects."""
    shapes = {view: self.shape for view in self.views}
    shapes |= {name: column.shape for name, column in self._numbers.items()}
    return {f"{name}/c/{shard}" for name in self.strings} | {
      f"{name}/c/{shard}" + "/0" * len(shape) for name, shape in shapes.items()
    }

  def arrays(self) -> dict[str, dict[str, Any]]:
    """The metadata of the arrays of numbers."""
    stored = "uint16" if self.dtype == "bfloat16" else self.dtype
    latents = self._array(Column(self.shape, stored))
    latents["attributes"] = {"dtype": self.dtype}
    return {view: latents for view in self.views} | {
      name: self._array(column) for name, column in self._numbers.items()
    }

  def _array(self, column: Column) -> dict[str, Any]:
    """A sharded zarr3 array, its chunks plain with a checksum."""
    plain = [
      {"name": "bytes", "configuration": {"endian": "little"}},
      {"name": "crc32c"},
    ]
    sharding = {
      "chunk_shape": [CHUNK_ROWS, *column.shape],
      "codecs": plain,
      "index_codecs": plain,
      "index_location": "start",  # not every server knows ranges from the end
    }
    return {
      "shape": [self.rows, *column.shape],
      "data_type": column.dtype,
      "chunk_grid": grid(self.shard_rows, *column.shape),
      "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
      "fill_value": 0,
    }

  def strings_array(self) -> dict[str, Any]:
    """The metadata of an array of strings.

    tensorstore has no strings; zarr's own codec for them is a simple one.
    """
    return {
      "zarr_format": 3,
      "node_type": "array",
      "shape": [self.rows],
      "data_type": "string",
      "chunk_grid": grid(self.shard_rows),
      "chunk_key_encoding": {"name": "default"},
      "codecs": [{"name": "vlen-utf8"}],
      "fill_value": "",
      "attributes": {},
    }


def grid(*shape: int) -> dict[str, Any]:
  """Of a zarr array, in chunks of a shape."""
  return {"name": "regular", "configuration": {"chunk_shape": list(shape)}}


def block_size(total: int, row_bytes: int = 1, most: int = _SHARD_ROWS) -> int:
  """Rows of a shard, a multiple of `CHUNK_ROWS`.

  At most so many and 64 MB, fewer where there would be fewer than 64 shards.
  """
  most = min(most, _SHARD_BYTES // row_bytes)
  rows = min(most, -(-total // 64))
  return max(1, -(-rows // CHUNK_ROWS)) * CHUNK_ROWS


def read_manifest(
  place: storage.Storage,
  kind: str = "latents",
  types: Mapping[str, Any] = MappingProxyType(TYPES),
) -> dict[str, Any]:
  """The manifest; UserError unless this is a finished store of that kind."""
  name = resumable_store.MANIFEST
  manifest, path = place.read_json(name), f"{place.path}/{name}"
  if manifest is None and place.read(resumable_store.IDENTITY) is not None:
    raise errors.UserError(
      f"{place.path} is not finished; run its export again, which goes on "
      "where it was"
    )
  if manifest is None:
    raise errors.UserError(
      f"{place.path} is no {kind.removesuffix('s')} store: it has no {name}"
    )
  expected = format_of(kind)
  if {key: manifest.get(key) for key in expected} != expected:
    raise errors.UserError(
      f"{path} is not of {expected['format']}, version "
      f"{expected['format_version']}"
    )
  json_types.check(path, manifest, dict(types), "export it again")
  if manifest["dtype"] not in DTYPES or not manifest.get("views"):
    raise errors.UserError(f"{path} is damaged: dtype or views")
  # Older stores have labels, and do not say so.
  return {"conditions": list(LABELS)} | manifest


def fingerprint(manifest: dict[str, Any]) -> str:
  """Changes when a row of the store does."""
  return json_types.digest(manifest["shards"])


def as_stored(latents: np.ndarray) -> np.ndarray:
  """zarr in Python knows no bfloat16: its bits."""
  is_bfloat16 = latents.dtype == DTYPES["bfloat16"]
  return latents.view(np.uint16) if is_bfloat16 else latents


def sha256(data: np.ndarray | bytes) -> str:
  if isinstance(data, np.ndarray):
    data = np.ascontiguousarray(data).view(np.uint8).data
  return hashlib.sha256(data).hexdigest()


def is_of_strings(place: storage.Storage, name: str) -> bool:
  """Whether an array of a store is one of strings."""
  metadata = place.read_json(f"{name}/zarr.json") or {}
  return metadata.get("data_type") == "string"


def encode_strings(texts: list[str], count: int) -> bytes:
  """zarr's vlen-utf8: a count, then each string after its length."""
  texts = [*texts, *[""] * (count - len(texts))]
  parts = [struct.pack("<I", count)]
  for text in texts:
    data = text.encode("utf-8", "backslashreplace")
    parts += [struct.pack("<I", len(data)), data]
  return b"".join(parts)


def decode_strings(data: bytes) -> list[str]:
  """Inverse of `encode_strings`; UserError if they are damaged."""
  try:
    (count,), position, texts = struct.unpack_from("<I", data), 4, []
    for _ in range(count):
      (length,) = struct.unpack_from("<I", data, position)
      position += 4 + length
      texts.append(data[position - length : position].decode())
  except (struct.error, UnicodeDecodeError) as error:
    raise errors.UserError(f"strings are damaged: {error}") from error
  return texts
