"""Files as a source: of a folder, local or remote, or matching a pattern."""

import errno
import glob
import hashlib
import os
import pathlib
import stat
import time

import fsspec
from etils import epath

from dcae_jax import errors
from dcae_jax.data.sources import protocol

SUFFIXES = (
  ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
)  # fmt: skip
_LARGEST_FILE = 2**31  # bytes
_ATTEMPTS = 5  # to read a remote file


class Files:
  """Files, local or remote, each of a class.

  Nothing is opened. `keys` are their names, the same wherever the files are;
  `sizes` are in bytes, as far as they are known.

  Attributes:
    classes: their names, by label.
  """

  def __init__(
    self,
    paths: list[str],
    labels: list[int],
    keys: list[str],
    classes: list[str],
    sizes: list[int | None] | None = None,
  ):
    self.classes = classes
    self._paths, self._labels = paths, labels
    self._keys, self._sizes = keys, sizes

  def __len__(self) -> int:
    return len(self._paths)

  def name(self, index: int) -> str:
    return self._paths[index]

  def key(self, index: int) -> str:
    """The name, without the directory that differs from machine to machine."""
    return self._keys[index]

  def fingerprint(self) -> str:
    """sha256 of names, labels and sizes of all files, which are not opened."""
    known = self._sizes or [None] * len(self)
    sizes = [
      _size(path) if size is None else size
      for path, size in zip(self._paths, known, strict=True)
    ]
    digest = hashlib.sha256()
    for entry in zip(self._keys, self._labels, sizes, strict=True):
      digest.update(f"{entry}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()

  def __getitem__(self, index: int) -> protocol.Record:
    path = self._paths[index]
    read = _read_remote if "://" in path else _read_local
    return protocol.Record(path, read(path), self._labels[index])


def _size(path: str) -> int:
  try:
    return os.path.getsize(path)
  except OSError:  # as unusable as an empty one
    return 0


def _read_local(path: str) -> bytes:
  status = os.stat(path)
  if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
    raise OSError(errno.ENXIO, "no regular file", path)
  if status.st_size > _LARGEST_FILE:
    raise OSError(errno.EFBIG, f"{status.st_size} bytes are no image", path)
  return pathlib.Path(path).read_bytes()


def _read_remote(path: str) -> bytes:
  """Tries again, ever later: a passing fault must not change the data."""
  for attempt in range(_ATTEMPTS):
    try:
      return epath.Path(path).read_bytes()
    except Exception as error:  # the client's own kinds among them
      if attempt == _ATTEMPTS - 1 or isinstance(error, FileNotFoundError):
        text = " ".join(str(error).split()) or type(error).__name__
        raise OSError(errno.EIO, f"cannot be read: {text}", path) from error
      time.sleep(2**attempt)


def folder(path: str) -> Files:
  """All images below a directory, in sorted order, a class per sub-folder.

  `path` is local or a `gs://` address. Raises UserError if it is no directory,
  or holds no images.
  """
  return _tree(path, SUFFIXES, "image")


def latent_files(path: str) -> Files:
  """All `.npy` files below a directory, as `folder` finds images."""
  return _tree(path, (".npy",), "latent")


def _tree(path: str, suffixes: tuple[str, ...], what: str) -> Files:
  root = epath.Path(path).expanduser()
  if not path or not root.is_dir():
    raise errors.UserError(
      f"{what} folder {path!r} does not exist or is not a directory; name a "
      f"tree of {what}s (config.source.path; for a training run, "
      "config.data.source.path and config.evaluation.source.path)"
    )
  root = os.fspath(root)
  walk = _remote_files if "://" in path else _local_files
  sizes = walk(root)
  paths = sorted(
    name
    for name in sizes
    if name.lower().endswith(suffixes)
    and not os.path.basename(name).startswith(".")
  )
  if not paths:
    raise errors.UserError(
      f"{what} folder {path!r} holds no {what}s ({', '.join(suffixes)})"
    )
  keys = [
    os.path.relpath(name, root).encode("utf-8", "backslashreplace").decode()
    for name in paths
  ]
  parts = [key.split("/") for key in keys]
  of_file = [part[0] if len(part) > 1 else "" for part in parts]
  classes = sorted(set(of_file))
  index = {name: i for i, name in enumerate(classes)}
  labels = [index[name] for name in of_file]
  return Files(paths, labels, keys, classes, [sizes[name] for name in paths])


def pictures(path: str) -> Files:
  """One image file, all of a folder, or those that a shell pattern matches.

  Raises UserError if there is none.
  """
  root = epath.Path(path).expanduser()
  if path and root.is_dir():
    return folder(path)
  if path and root.is_file():
    return unlabelled([os.fspath(root)])
  files = sorted(
    file
    for file in glob.glob(os.path.expanduser(path), recursive=True)
    if file.lower().endswith(SUFFIXES)
  )
  if not files:
    raise errors.UserError(
      f"{path!r} is no image file, folder of images, or pattern of image files "
      f"({', '.join(SUFFIXES)})"
    )
  return unlabelled(files)


def unlabelled(paths: list[str], keys: list[str] | None = None) -> Files:
  """Files of one class that has no name."""
  return Files(paths, [0] * len(paths), keys or paths, [""])


def _local_files(root: str) -> dict[str, int | None]:
  """Paths, without their sizes, which would have to be asked for."""
  files, visited = {}, set()
  for directory, subdirectories, names in os.walk(root, followlinks=True):
    real = os.path.realpath(directory)
    if real in visited:  # a link back to a directory above it
      subdirectories.clear()
      continue
    visited.add(real)
    files |= {os.path.join(directory, name): None for name in names}
  return files


def _remote_files(root: str) -> dict[str, int | None]:
  """Paths and sizes, which come with the listing."""
  system, prefix = fsspec.core.url_to_fs(root)
  files = system.find(prefix, detail=True)
  return {
    system.unstrip_protocol(name): info["size"] for name, info in files.items()
  }
