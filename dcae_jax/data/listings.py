"""The files below a directory or a bucket's prefix."""

import errno
import os
from typing import NoReturn

import fsspec


def files(root: str) -> dict[str, int | None]:
  """Paths of all files below it, with their sizes in bytes.

  Those of local files are None: each would have to be asked for. Raises OSError
  for what cannot be listed; without it, some files would be missing.
  """
  return (_remote if "://" in root else _local)(root)


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


def _remote(root: str) -> dict[str, int | None]:
  system, prefix = fsspec.core.url_to_fs(root)
  try:
    found = system.find(prefix, detail=True)
  except FileNotFoundError as error:
    bucket = prefix.partition("/")[0]
    raise OSError(errno.ENOENT, "there is no such bucket", bucket) from error
  return {
    system.unstrip_protocol(name): info["size"] for name, info in found.items()
  }
