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
import re
import stat

import pyarrow as pa
import pyarrow.compute as pc
from etils import epath

from dcae_jax import errors
from dcae_jax.data import captions as image_captions
from dcae_jax.data import index, listings
from dcae_jax.data.sources import containers, protocol
from dcae_jax.runs import storage

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

  Nothing is opened. Their keys are their names, the same wherever they are.

  Attributes:
    classes: their names, by label.
  """

  def __init__(
    self,
    root: str,
    table: pa.Table,
    classes: list[str],
    elsewhere: dict[int, str] | None = None,
    captions: "Captions | None" = None,
  ):
    """Describes them.

    Args:
      root: the directory that they are in.
      table: an index, with their sizes as far as they are known.
      classes: their names, by label.
      elsewhere: paths of those that are not where their key says.
      captions: of them.
    """
    self.classes = classes
    self._root, self._rows = root, index.Index(table)
    self._elsewhere = elsewhere or {}
    self._captions = captions

  def __len__(self) -> int:
    return len(self._rows)

  def name(self, index: int) -> str:
    path = self._elsewhere.get(index)
    return path or os.path.join(self._root, self.key(index))

  def key(self, index: int) -> str:
    """The name, without the directory that differs from machine to machine."""
    return self._rows.text("key", index)

  def fingerprint(self) -> str:
    """sha256 of names, labels and sizes of all files, which are not opened.

    And of the captions, if it has them, or the sizes of their files.
    """
    digest = hashlib.sha256()
    columns = (self._rows.numbers(x).tolist() for x in ("label", "bytes"))
    rows = zip(self._rows.texts("key"), *columns, strict=True)
    for i, (key, label, size) in enumerate(rows):
      entry = key, label, size or listings.size(self.name(i), None)
      digest.update(f"{entry}\n".encode("utf-8", "backslashreplace"))
    for i in range(len(self) if self._captions else 0):
      entry = self._captions.entry(self.name(i))
      digest.update(f"{entry}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()

  def __getitem__(self, index: int) -> protocol.Record:
    path = self.name(index)
    captions = self._captions.of(path) if self._captions else ()
    (label,) = self._rows.of_row(index, "label")
    return protocol.Record(path, _read(path, self._root), label, captions)


def listed(
  paths: list[str],
  labels: list[int],
  keys: list[str],
  classes: list[str],
  sizes: list[int] | None = None,
  captions: "Captions | None" = None,
) -> Files:
  """Files, each with its label and key, and its size if it is known."""
  table = {"key": keys, "label": labels, "bytes": sizes or [0] * len(keys)}
  elsewhere = dict(enumerate(paths))
  table = containers.completed(pa.table(table))
  return Files("", table, classes, elsewhere, captions)


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


def _read(path: str, root: str = "") -> bytes:
  """A file, below a directory of which many are read if it is named."""
  if "://" not in path:
    return _read_local(path)
  directory = root or os.path.dirname(path)
  data = _place(directory).read(path.removeprefix(f"{directory}/"))
  if data is None:
    raise FileNotFoundError(errno.ENOENT, "there is no such object", path)
  return data


@functools.lru_cache(maxsize=32)
def _place(directory: str) -> storage.Storage:
  """One for all that is read there: it holds connections."""
  return storage.Storage(directory)


def _read_local(path: str) -> bytes:
  status = os.stat(path)
  if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
    raise OSError(errno.ENXIO, "no regular file", path)
  if status.st_size > LARGEST_FILE:
    raise OSError(errno.EFBIG, f"{status.st_size} bytes are no image", path)
  return pathlib.Path(path).read_bytes()


def folder(
  path: str,
  captions: bool = False,
  indexed: containers.Indexed = containers.indexed_here,
) -> Files:
  """All images below a directory, in sorted order, a class per sub-folder.

  With `captions`, those of `x.jpg` are read from `x.json` or `x.txt` beside it,
  or from the line of a `metadata.jsonl` in a directory above whose `file_name`
  is its path from there.

  Images of kinds that are not read, such as HEIC, are left out with a warning.
  `path` is local or a `gs://` address, of which `indexed` keeps the listing.
  Raises UserError if it is no directory, holds no images, or captions that are
  none.
  """
  return _tree(path, SUFFIXES, "image", captions, indexed, _OTHER_SUFFIXES)


def latent_files(
  path: str,
  captions: bool = False,
  indexed: containers.Indexed = containers.indexed_here,
) -> Files:
  """All `.npy` files below a directory, as `folder` finds images."""
  return _tree(path, (".npy",), "latent", captions, indexed)


def _tree(
  path: str,
  suffixes: tuple[str, ...],
  what: str,
  captions: bool,
  indexed: containers.Indexed,
  left_out: tuple[str, ...] = (),
) -> Files:
  if not path:
    raise errors.UserError(
      f"config.source.path is empty; name a folder of {what}s"
    )
  root = os.path.expanduser(path)
  if "://" in root:
    root = storage.Storage(root).path
  try:
    found, elsewhere = _listing(root, indexed)
  except OSError as error:  # without it, labels would be others
    reason = error.strerror or errors.first_line(error)
    raise errors.UserError(
      f"{what} folder {path!r}: {error.filename or path} cannot be listed "
      f"({reason}); name a tree of {what}s in config.source.path"
    ) from error
  table = found.filter(_ends_with(found["key"], suffixes))
  others = found["key"].filter(_ends_with(found["key"], left_out)).to_pylist()
  kinds = collections.Counter(os.path.splitext(x)[1].lower() for x in others)
  counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
  if not len(table):
    note = f", but {counts}, which are not read: convert them" if others else ""
    raise errors.UserError(
      f"{what} folder {path!r} holds no {what}s ({', '.join(suffixes)}){note}"
    )
  if others:
    _warn_once(
      f"{what} folder {path!r}: {counts} left out, which are not read, such as "
      f"{os.path.join(root, others[0])!r}; convert them to .jpg or .png to use "
      "them"
    )
  labels, classes = containers.by_name(
    containers.first_directories(table["key"])
  )
  position = table.schema.get_field_index("label")
  table = table.set_column(position, "label", labels)
  rows = pc.index_in(pa.array(elsewhere, pa.large_string()), table["key"])
  by_row = dict(zip(rows.to_pylist(), elsewhere.values(), strict=True))
  of_images = None
  if captions:
    where = lambda key: elsewhere.get(key) or os.path.join(root, key)
    sizes = zip(*(found[x].to_pylist() for x in ("key", "bytes")), strict=True)
    of_images = _captions(
      list(map(where, table["key"].to_pylist())),
      {where(key): size or None for key, size in sizes},
    )
  return Files(root, table, classes, by_row, of_images)


def _listing(
  root: str, indexed: containers.Indexed
) -> tuple[pa.Table, dict[str, str]]:
  """Keys of all files below it in order, with the sizes of remote ones.

  And by key, the paths of those that are not where it says.
  """
  elsewhere = {}

  def make() -> pa.Table:
    found, start = listings.files(root), len(os.path.join(root, ""))
    paths, keys = sorted(found), []
    for path in paths:
      keys.append(path[start:].encode("utf-8", "backslashreplace").decode())
      if not path.endswith(keys[-1]):
        elsewhere[keys[-1]] = path
    sizes = [found[path] or 0 for path in paths]
    return containers.completed(pa.table({"key": keys, "bytes": sizes}))

  if "://" not in root:
    return make(), elsewhere
  name = hashlib.sha256(root.encode()).hexdigest()[:16]
  return indexed(f"folder_{name}", make), {}


def _ends_with(
  keys: pa.ChunkedArray, suffixes: tuple[str, ...]
) -> pa.ChunkedArray:
  """Which are of these kinds, and not hidden."""
  endings = "|".join(map(re.escape, suffixes)) or "^ "  # none is never there
  return pc.match_substring_regex(keys, rf"(?i)(^|/)[^./][^/]*({endings})$")


@functools.cache
def _warn_once(message: str) -> None:
  """A run opens a folder more than once."""
  _LOG.warning("%s", message)


def _captions(paths: list[str], files: dict[str, int | None]) -> Captions:
  """Of the images among all files of a tree; UserError if there are none."""
  known, beside = {}, {}
  for file in sorted(files, key=lambda x: x.count("/")):
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
  labels = [0] * len(paths)
  return listed(paths, labels, keys or paths, [""], captions=captions)
