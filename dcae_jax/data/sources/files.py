"""Files as a source: of a folder, local or remote, or matching a pattern."""

import collections
import errno
import functools
import glob
import hashlib
import json
import logging
import os
import pathlib
import stat

from etils import epath

from dcae_jax import errors
from dcae_jax.data import captions as image_captions
from dcae_jax.data import listings
from dcae_jax.data.sources import protocol

_LOG = logging.getLogger(__name__)
SUFFIXES = (
  ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
)  # fmt: skip
# Of pictures as well, but not read.
_OTHER_SUFFIXES = (
  ".heic", ".heif", ".avif", ".jxl", ".jp2", ".jfif", ".apng", ".svg", ".psd",
  ".tga", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf",
  ".orf", ".rw2",
)  # fmt: skip
LARGEST_FILE = 2**31  # bytes
_METADATA = "metadata.jsonl"  # captions of the images of a directory


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
    captions: "Captions | None" = None,
  ):
    self.classes = classes
    self._paths, self._labels = paths, labels
    self._keys, self._sizes = keys, sizes
    self._captions = captions

  def __len__(self) -> int:
    return len(self._paths)

  def name(self, index: int) -> str:
    return self._paths[index]

  def key(self, index: int) -> str:
    """The name, without the directory that differs from machine to machine."""
    return self._keys[index]

  def fingerprint(self) -> str:
    """sha256 of names, labels and sizes of all files, which are not opened.

    And of the captions, if it has them, or the sizes of their files.
    """
    known = self._sizes or [None] * len(self)
    sizes = [
      listings.size(path, size)
      for path, size in zip(self._paths, known, strict=True)
    ]
    digest = hashlib.sha256()
    for entry in zip(self._keys, self._labels, sizes, strict=True):
      digest.update(f"{entry}\n".encode("utf-8", "backslashreplace"))
    if self._captions:
      for path in self._paths:
        entry = self._captions.entry(path)
        digest.update(f"{entry}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()

  def __getitem__(self, index: int) -> protocol.Record:
    path = self._paths[index]
    captions = self._captions.of(path) if self._captions else ()
    return protocol.Record(path, _read(path), self._labels[index], captions)


class Captions:
  """Captions of files: in files beside them, or read already."""

  def __init__(
    self,
    beside: dict[str, list[tuple[str, int | None]]],
    known: dict[str, tuple[image_captions.Caption, ...]],
  ):
    """By the path of an image: files of captions, with their sizes as far as
    they are known, of which the first that has captions counts; or captions.
    """
    self._beside, self._known = beside, known

  def of(self, path: str) -> tuple[image_captions.Caption, ...]:
    """Raises OSError for a file that cannot be read, or is none of captions."""
    for file, _ in self._beside.get(path, ()):
      is_json = file.lower().endswith(".json")
      parse = image_captions.of_json if is_json else image_captions.of_text
      data = _read(file)
      try:
        captions = parse(data)
      except (ValueError, RecursionError) as error:
        raise OSError(errno.ENXIO, f"{file}: {error}", path) from error
      if captions:
        return captions
    return self._known.get(path, ())

  def entry(self, path: str) -> tuple:
    """Changes when the captions of an image do, without reading them."""
    files = [
      (os.path.basename(file), listings.size(file, size))
      for file, size in self._beside.get(path, ())
    ]
    return *files, *self._known.get(path, ())


def _read(path: str) -> bytes:
  return (_read_remote if "://" in path else _read_local)(path)


def _read_local(path: str) -> bytes:
  status = os.stat(path)
  if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
    raise OSError(errno.ENXIO, "no regular file", path)
  if status.st_size > LARGEST_FILE:
    raise OSError(errno.EFBIG, f"{status.st_size} bytes are no image", path)
  return pathlib.Path(path).read_bytes()


def _read_remote(path: str) -> bytes:
  try:
    return epath.Path(path).read_bytes()
  except Exception as error:  # the client's own kinds among them
    raise OSError(errno.EIO, errors.first_line(error), path) from error


def folder(path: str, captions: bool = False) -> Files:
  """All images below a directory, in sorted order, a class per sub-folder.

  With `captions`, those of `x.jpg` are read from `x.json` or `x.txt` beside it,
  or from the line of a `metadata.jsonl` in a directory above whose `file_name`
  is its path from there.

  Images of kinds that are not read, such as HEIC, are left out with a warning.
  `path` is local or a `gs://` address. Raises UserError if it is no directory,
  holds no images, or captions that are none.
  """
  return _tree(path, SUFFIXES, "image", captions, _OTHER_SUFFIXES)


def latent_files(path: str, captions: bool = False) -> Files:
  """All `.npy` files below a directory, as `folder` finds images."""
  return _tree(path, (".npy",), "latent", captions)


def _tree(
  path: str,
  suffixes: tuple[str, ...],
  what: str,
  captions: bool,
  left_out: tuple[str, ...] = (),
) -> Files:
  if not path:
    raise errors.UserError(
      f"config.source.path is empty; name a folder of {what}s"
    )
  root = os.path.expanduser(path)
  try:
    sizes = listings.files(root)
  except OSError as error:  # without it, labels would be others
    reason = error.strerror or errors.first_line(error)
    raise errors.UserError(
      f"{what} folder {path!r}: {error.filename or path} cannot be listed "
      f"({reason}); name a tree of {what}s in config.source.path"
    ) from error
  shown = sorted(x for x in sizes if not os.path.basename(x).startswith("."))
  paths = [name for name in shown if name.lower().endswith(suffixes)]
  others = [name for name in shown if name.lower().endswith(left_out)]
  kinds = collections.Counter(os.path.splitext(x)[1].lower() for x in others)
  counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
  if not paths:
    found = (
      f", but {counts}, which are not read: convert them" if others else ""
    )
    raise errors.UserError(
      f"{what} folder {path!r} holds no {what}s ({', '.join(suffixes)}){found}"
    )
  if others:
    _warn_once(
      f"{what} folder {path!r}: {counts} left out, which are not read, such as "
      f"{others[0]!r}; convert them to .jpg or .png to use them"
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
  return Files(
    paths,
    labels,
    keys,
    classes,
    [sizes[name] for name in paths],
    _captions(paths, sizes) if captions else None,
  )


@functools.cache
def _warn_once(message: str) -> None:
  """A run opens a folder more than once."""
  _LOG.warning("%s", message)


def _captions(paths: list[str], files: dict[str, int | None]) -> Captions:
  """Of the images among all files of a tree; UserError if there are none."""
  known, beside = {}, {}
  for file in files:
    if os.path.basename(file) == _METADATA:
      known |= _metadata(file)
  names = {}
  for file in files:
    stem, suffix = os.path.splitext(file)
    names[stem, suffix.lower()] = file
  for path in paths:
    stem, _ = os.path.splitext(path)
    for suffix in image_captions.SIDECARS:
      if file := names.get((stem, suffix)):
        beside.setdefault(path, []).append((file, files[file]))
  if not beside and not known.keys() & set(paths):
    raise errors.UserError(
      f"no image of the {len(paths)} beside {paths[0]} has captions: neither "
      f"{' nor '.join(f'x{suffix}' for suffix in image_captions.SIDECARS)} "
      f"beside x.jpg, nor a line in a {_METADATA}"
    )
  return Captions(beside, known)


def _metadata(file: str) -> dict[str, tuple[image_captions.Caption, ...]]:
  """Captions by the paths of images, of a `metadata.jsonl`."""
  folder, known = os.path.dirname(file), {}
  for number, line in enumerate(_read(file).splitlines(), 1):
    if not line.strip():
      continue
    try:
      values = json.loads(line)
      captions = image_captions.of_object(values)
      name = os.path.normpath(values["file_name"])
      known[os.path.join(folder, name)] = captions
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise errors.UserError(
        f"line {number} of {file} is no object with file_name and a caption: "
        f"{error}"
      ) from error
  return known


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


def unlabelled(
  paths: list[str],
  keys: list[str] | None = None,
  captions: Captions | None = None,
) -> Files:
  """Files of one class that has no name."""
  return Files(paths, [0] * len(paths), keys or paths, [""], captions=captions)
