"""The files below a directory or a bucket's prefix."""

import errno
import os
from typing import Any, NoReturn

import fsspec

from dcae_jax import errors
from dcae_jax.runs import storage

_FIELDS = "nextPageToken,items(name,size,generation)"


def files(root: str) -> dict[str, int | None]:
  """Paths of all files below it, with their sizes in bytes.

  Those of local files are None: each would have to be asked for. Raises OSError
  for what cannot be listed; without it, some files would be missing.
  """
  if "://" not in root:
    return _local(root)
  found = _remote(f"{root.rstrip('/')}/")
  return {path: int(item["size"]) for path, item in found.items()}


def versions(root: str) -> dict[str, tuple[int, str]]:
  """Sizes and generations of remote files whose paths begin so.

  A generation changes whenever a file is written. Raises OSError as `files`.
  """
  return {
    path: (int(item["size"]), str(item["generation"]))
    for path, item in _remote(root).items()
  }


def size(path: str, listed: int | None) -> int:
  """Of a file of a listing; 0 where it is gone."""
  if listed is not None:
    return listed
  try:
    return os.path.getsize(path)
  except OSError:  # as unusable as an empty one
    return 0


def _local(root: str) -> dict[str, int | None]:
  def fail(error: OSError) -> NoReturn:
    raise error

  found, visited = {}, set()
  for directory, subdirectories, names in os.walk(
    root, onerror=fail, followlinks=True
  ):
    real = os.path.realpath(directory)
    if real in visited:  # a link back to a directory above it
      subdirectories.clear()
      continue
    visited.add(real)
    found |= {os.path.join(directory, name): None for name in names}
  return found


def _remote(prefix: str) -> dict[str, dict[str, Any]]:
  """What is known of the objects whose paths begin so, a thousand a request.

  `find` of gcsfs would keep all that Google knows of each of them.
  """
  storage.Storage(prefix)  # UserError for what is not gs://
  system, prefix = fsspec.core.url_to_fs(prefix)[0], prefix.partition("://")[2]
  bucket, _, prefix = prefix.partition("/")
  found, token = {}, ""
  while True:
    try:
      page = system.call(
        "GET", "b/{}/o", bucket, json_out=True,
        prefix=prefix, fields=_FIELDS, maxResults=1000,
        **({"pageToken": token} if token else {}),
      )  # fmt: skip
    except FileNotFoundError as error:
      raise OSError(errno.ENOENT, "there is no such bucket", bucket) from error
    except Exception as error:  # the client has its own kinds
      reason = errors.first_line(error)
      raise OSError(errno.EIO, reason, f"gs://{bucket}/{prefix}") from error
    for item in page.get("items", ()):
      found[f"gs://{bucket}/{item['name']}"] = item
    token = page.get("nextPageToken")
    if not token:
      return found
