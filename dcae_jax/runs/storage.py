"""A directory or a bucket prefix as a store of objects, through tensorstore.

One client for local and `gs://` paths: objects appear whole or not at all,
transient failures are retried with growing delays, and errors of a bucket or a
disk are reported in one line.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorstore as ts

from dcae_jax import errors
from dcae_jax.runs import installed, json_types, regular_files

_SEAL = "sha256_of_the_rest"
RETRIES = 10  # of a request: about two minutes


class Storage:
  """Objects below one local or `gs://` path, by key.

  Everything raises OSError for what storage refuses: no such bucket, no
  permission, no space, no connection after all retries. What is read raises
  UserError if it is a pipe or a device.
  """

  def __init__(
    self, path: str, *, retries: int = RETRIES, cache_megabytes: float = 0
  ):
    """Opens nothing yet.

    Args:
      path: local, or `gs://bucket/prefix`; UserError if it is neither, or
        what reads buckets is not installed.
      retries: of a request to a bucket, at most 16 seconds apart.
      cache_megabytes: of arrays kept in memory once they are read.
    """
    self._options = {"retries": retries, "cache_megabytes": cache_megabytes}
    for name, value in self._options.items():
      if not value >= 0:
        raise errors.UserError(f"{name}={value} is below 0")
    self._place = _place(path)
    self._is_remote = self._place["driver"] != "file"
    self.path = self._place["path"].rstrip("/")
    if self._is_remote:
      self.path = f"gs://{self._place['bucket']}/{self.path}".rstrip("/")
    self._context = ts.Context(
      {
        "cache_pool": {"total_bytes_limit": int(cache_megabytes * 1e6)},
        "gcs_request_retries": {
          "max_retries": retries,
          "initial_delay": "500ms",
          "max_delay": "16s",
        },
      }
    )
    self._opened = None

  def __reduce__(self):
    return _reopen, (self.path, self._options)

  def _objects(self) -> ts.KvStore:
    if self._opened is None:
      self._opened = ts.KvStore.open(
        self._place, context=self._context
      ).result()
    return self._opened

  def _check(self, keys: list[str]) -> None:
    for key in () if self._is_remote else keys:
      regular_files.checked(os.path.join(self.path, key))

  def read(self, key: str) -> bytes | None:
    """An object; None where there is none."""
    return self.read_version(key)[0]

  def read_range(self, key: str, start: int, stop: int) -> bytes | None:
    """Bytes of an object, by one request; None where there is none."""
    self._check([key])
    with self.errors():
      entry = self._objects().read(key, byte_range=slice(start, stop)).result()
    return entry.value if entry.state == "value" else None

  def read_version(self, key: str) -> tuple[bytes | None, bytes]:
    """An object, or None, and its generation: what `replace` asks for."""
    self._check([key])
    with self.errors():
      entry = self._objects().read(key).result()
    data = entry.value if entry.state == "value" else None
    return data, entry.stamp.generation

  def write(self, key: str, data: bytes) -> None:
    with self.errors():
      self._objects().write(key, data).result()

  def replace(self, key: str, data: bytes | None, generation: bytes) -> bool:
    """Writes an object, or deletes it, if it still has that generation.

    Whether it is now what it should be. A request whose answer was lost is
    sent again, and refused if the first was heeded: data that nobody else
    writes are recognised then.
    """
    with self.errors():
      stamp = self._objects().write(key, data, if_equal=generation).result()
    return bool(stamp.generation) or self.read(key) == data

  def delete(self, prefix: str) -> None:
    """All objects whose keys begin so; a local folder of that name, too."""
    self.delete_all(self.list_keys(prefix))
    if not self._is_remote and prefix.endswith("/"):
      shutil.rmtree(os.path.join(self.path, prefix), ignore_errors=True)

  def delete_all(self, keys: Iterable[str]) -> None:
    with self.errors():
      for deleted in [self._objects().write(key, None) for key in keys]:
        deleted.result()

  def read_json(self, key: str) -> dict[str, Any] | None:
    """An object's JSON, or None; raises UserError if it is no mapping."""
    data = self.read(key)
    return None if data is None else self._parsed(key, data)

  def read_all(self, keys: list[str]) -> list[bytes]:
    """Many at once; FileNotFoundError where one is missing."""
    self._check(keys)
    with self.errors():
      futures = [self._objects().read(key) for key in keys]
      entries = [future.result() for future in futures]
    for key, entry in zip(keys, entries, strict=True):
      if entry.state != "value":
        raise FileNotFoundError(
          errno.ENOENT, "there is no such object", f"{self.path}/{key}"
        )
    return [entry.value for entry in entries]

  def read_all_json(self, keys: list[str]) -> list[dict[str, Any]]:
    """As `read_all`; raises UserError where one is damaged."""
    return list(map(self._parsed, keys, self.read_all(keys)))

  def write_sealed_json(self, key: str, value: dict[str, Any]) -> None:
    """With a digest of it, which is checked and taken out when it is read."""
    self.write_json(key, value | {_SEAL: json_types.digest(value)})

  def write_json(self, key: str, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    self.write(key, f"{text}\n".encode())

  def list_keys(self, prefix: str = "") -> set[str]:
    """Of all objects whose keys begin so."""
    # Of the whole bucket: tensorstore trusts servers to heed the range, and
    # some, made for tests, do not.
    place = self._place | {"path": ""} if self._is_remote else self._place
    below = self._place["path"] if self._is_remote else ""
    with self.errors():
      store = ts.KvStore.open(place, context=self._context).result()
      keys = store.list(_range(below + prefix)).result()
    return {
      key.decode().removeprefix(below)
      for key in keys
      if key.decode().startswith(below + prefix)
    }

  def free_bytes(self) -> int | None:
    """On the disk of a local path that exists; None for a bucket."""
    if self._is_remote:
      return None
    return shutil.disk_usage(self.path).free

  def check_writable(self, key: str) -> None:
    """Writes, lists and deletes an object; OSError where that fails."""
    self.write(key, b"this can be written")
    listed = self.list_keys(key)
    with self.errors():
      self._objects().write(key, None).result()
    if key not in listed:  # a listing that is refused comes back empty
      raise _forbidden(self.path, "what is there cannot be listed")

  def open_array(
    self, name: str, metadata: dict[str, Any] | None = None
  ) -> ts.TensorStore:
    """A zarr3 array; with metadata it is created unless it is there.

    Reading what was never written is an error, except in one just created.
    """
    place = dict(self._place)
    place["path"] += f"{name}/"
    spec = {"driver": "zarr3", "kvstore": place}
    # Otherwise a part that is all zeros would not be written.
    spec["store_data_equal_to_fill_value"] = True
    spec["recheck_cached_data"] = "open"  # what is cached does not change
    if metadata is not None:
      spec["metadata"] = metadata
    else:
      spec["fill_missing_data_reads"] = False
    self._check([f"{name}/zarr.json"])
    with self.errors():
      return ts.open(
        spec, context=self._context, open=True, create=metadata is not None
      ).result()

  def write_rows(
    self, array: ts.TensorStore, start: int, rows: np.ndarray
  ) -> None:
    """Rows of an array from `start` on; those of one shard in one object."""
    with self.errors(), ts.Transaction() as transaction:
      part = array.with_transaction(transaction)
      part[start : start + len(rows)].write(rows).result()

  @contextlib.contextmanager
  def errors(self) -> Iterator[None]:
    """tensorstore's errors, which are all ValueErrors, as OSErrors."""
    try:
      yield
    except ValueError as error:
      raise _translated(self.path, str(error)) from error

  def _parsed(self, key: str, data: bytes) -> dict[str, Any]:
    value = json_types.parsed(f"{self.path}/{key}", data, {}, "bring it back")
    # Without it, it was written before there was one, or for others.
    seal = value.pop(_SEAL, None)
    if seal not in (None, json_types.digest(value)):
      raise errors.UserError(
        f"{self.path}/{key} is damaged: it is not what was written; bring it "
        f"back, or remove its {_SEAL} if you have changed it yourself"
      )
    return value


def _reopen(path: str, options: dict[str, Any]) -> Storage:
  return Storage(path, **options)


def _place(path: str) -> dict[str, str]:
  if "://" not in path:
    local = os.path.abspath(os.path.expanduser(path))
    return {"driver": "file", "path": f"{local}/"}
  scheme, _, rest = path.partition("://")
  bucket, _, prefix = rest.partition("/")
  if scheme != "gs" or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{2,221}", bucket):
    raise errors.UserError(
      f"{path!r} is neither a local path nor gs://BUCKET/PATH with a bucket "
      "name of 3 or more lower-case letters, digits, dots and dashes"
    )
  installed.require("gcsfs", "gcs", path)
  prefix = prefix.strip("/")
  place = {"driver": "gcs", "bucket": bucket}
  return place | {"path": f"{prefix}/" if prefix else ""}


def _range(prefix: str) -> ts.KvStore.KeyRange:
  if not prefix:
    return ts.KvStore.KeyRange()
  after = prefix[:-1] + chr(ord(prefix[-1]) + 1)
  return ts.KvStore.KeyRange(prefix, after)


def _translated(path: str, message: str) -> OSError:
  if match := re.search(r"os_error_code='(\d+)'", message):
    number = int(match[1])
    return OSError(number, os.strerror(number), path)
  status = message.partition(":")[0]
  http = re.search(r"http_response_code='(\d+)'", message)
  http = http[1] if http else ""
  if status == "NOT_FOUND" and http and path.startswith("gs://"):
    bucket = path.removeprefix("gs://").partition("/")[0]
    return FileNotFoundError(
      errno.ENOENT,
      f"there is no bucket gs://{bucket}; create it (`gcloud storage buckets "
      f"create gs://{bucket}`), or name another",
    )
  if {status, http} & {"PERMISSION_DENIED", "UNAUTHENTICATED", "401", "403"}:
    return _forbidden(path, message)
  if status == "ABORTED":
    return OSError(errno.EIO, f"{path} does not answer: {message}")
  return OSError(errno.EIO, f"{path}: {message}")


def _forbidden(path: str, reason: str) -> PermissionError:
  return PermissionError(
    errno.EACCES,
    f"no permission for {path}: this machine's account needs the role "
    "roles/storage.objectUser on the bucket (`gcloud auth application-default "
    f"login` sets the account); {reason}",
  )
