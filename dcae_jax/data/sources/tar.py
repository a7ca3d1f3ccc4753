"""Uncompressed tars, as WebDataset lays them out, or of folders.

Their headers are read once; from then on, an image is one read of a range.
Members of one path up to the first dot of the file's name are one sample: an
image, `.txt` or `.json` with captions, `.cls` with a class.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import re
import tarfile
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dcae_jax import errors
from dcae_jax.data import captions as image_captions
from dcae_jax.data import headers, index
from dcae_jax.data.sources import containers, files, protocol

_LOG = logging.getLogger(__name__)
_AHEAD = 2**23  # bytes that are read of a remote tar at once
_AT_ONCE = 16  # tars
_CLASS_KEYS = ("label", "cls", "class")  # of a JSON object
_METADATA = b"dcae_jax"


class Tars:
  """The images of tars, local or `gs://`, in the order that they have there.

  Attributes:
    classes: names, by label.
  """

  def __init__(
    self,
    path: str,
    captions: bool = False,
    indexed: containers.Indexed = containers.indexed_here,
  ):
    """Reads all headers, or what an earlier start has made of them.

    An image is of the class that its `.cls` says, or its `.json`. Where there
    are neither, of the first directory of its name, or, in several tars of
    nothing but images without directories, of its tar.

    Args:
      path: a tar, a directory of them, or a pattern.
      captions: give them, too.
      indexed: keeps what was found.

    Raises:
      UserError: there are no tars, or one is not as it should be.
    """
    self._tars = containers.Containers(path, ".tar")
    table = indexed(self._tars.table_name("tar"), lambda: _table(self._tars))
    self.classes = json.loads(table.schema.metadata[_METADATA])
    self._has_captions = captions
    if captions and not index.has_captions(table):
      raise errors.UserError(
        f"{path!r} has no captions, neither x.txt nor x.json beside x.jpg; set "
        "config.source.captions=False"
      )
    self._rows = index.Index(table)

  def __len__(self) -> int:
    return len(self._rows)

  def name(self, index: int) -> str:
    (file,) = self._rows.of_row(index, "file")
    return f"{self._tars.path(file)}:{self.key(index)}"

  def key(self, index: int) -> str:
    """Its name in the tar."""
    return self._rows.text("key", index)

  def sizes(self) -> np.ndarray | None:
    return self._rows.sizes()

  def fingerprint(self) -> str:
    """sha256 of classes, names, labels, captions, sizes and places.

    Images are not read for it.
    """
    text = f"{self.classes} {self._rows.digest()}"
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()

  def __getitem__(self, index: int) -> protocol.Record:
    rows, name = self._rows, self.name(index)
    file, offset, size, label = rows.of_row(
      index, "file", "offset", "bytes", "label"
    )
    if size > files.LARGEST_FILE:
      raise OSError(errno.EFBIG, f"{size} bytes are no image", name)
    start, tar = offset - tarfile.BLOCKSIZE, self._tars.files[file].name
    data = self._tars.place.read_range(tar, start, offset + size)
    if data is None:
      raise FileNotFoundError(errno.ENOENT, "it is gone", self._tars.path(file))
    try:
      header = tarfile.TarInfo.frombuf(
        data[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape"
      )
      is_same = header.size == size == len(data) - tarfile.BLOCKSIZE
    except tarfile.TarError:
      is_same = False
    if not is_same:
      raise errors.UserError(
        f"{name} is not what it was: {self._tars.path(file)} has changed since "
        "the run began, or is damaged; bring it back, or start again"
      )
    captions = ()
    if self._has_captions:
      captions = containers.captions(rows.text("captions", index), name)
    return protocol.Record(name, data[tarfile.BLOCKSIZE :], label, captions)


class _Sample(NamedTuple):
  """What a tar has of an image.

  Attributes:
    key: name of the member.
    width: as it is shown.
    height: as it is shown.
    offset: of the member's bytes.
    bytes: of the member.
    captions: as in the index.
    named: the class that a file beside it says.
  """

  key: str
  width: int
  height: int
  offset: int
  bytes: int
  captions: str = ""
  named: str | None = None


_TYPES = pa.schema(
  [(name, index.SCHEMA.field(name).type) for name in _Sample._fields[:-1]]
  + [("named", pa.string()), ("file", pa.int32())]
)


def _table(tars: containers.Containers) -> pa.Table:
  """The index of all tars, with their classes as metadata."""

  def scan(file: int) -> tuple[pa.Table, bool]:
    with tars.open(file, _AHEAD) as opened:
      size = tars.files[file].size
      samples, has_others = _samples(opened, size, tars.path(file))
    columns = [list(column) for column in zip(*samples, strict=True)]
    columns.append([file] * len(samples))
    return pa.table(columns, schema=_TYPES), has_others

  found, count = [], len(tars.files)
  _LOG.info("indexing %d tars, such as %s", count, tars.path(0))
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    for done, result in enumerate(pool.map(scan, range(count)), 1):
      found.append(result)
      if done % 100 == 0:
        _LOG.info("indexed %d of %d tars", done, count)
  table = pa.concat_tables([part for part, _ in found])
  _check_unique(table, tars)
  is_plain = not any(has_others for _, has_others in found)
  labels, classes = _labelled(table, tars, is_plain)
  table = containers.completed(table.append_column("label", labels))
  return table.replace_schema_metadata({_METADATA: json.dumps(classes)})


def _samples(
  file: io.IOBase, size: int, path: str
) -> tuple[list[_Sample], bool]:
  """Of a tar of so many bytes; and whether it has more than images."""
  images, others, links = {}, {}, 0
  try:
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
      while (member := tar.next()) is not None:
        tar.members.clear()  # it would keep them all
        name = os.path.normpath(member.name)
        name = name.encode("utf-8", "backslashreplace").decode()
        if member.issparse():
          raise errors.UserError(
            f"{path}: {name} is stored as a sparse file, which is not read; "
            "make the tar without --sparse"
          )
        if not 0 <= member.size <= size:
          raise tarfile.ReadError(f"{name} has {member.size:,} bytes")
        links += member.islnk() or member.issym()
        stem, suffix = _parts(name)
        if not member.isfile() or not stem:
          continue
        if suffix.endswith(files.SUFFIXES):
          shown = headers.shown_size(tar.extractfile(member))
          sample = _Sample(name, *shown, member.offset_data, member.size)
          images.setdefault(stem, []).append(sample)
        elif suffix in (".cls", *image_captions.SIDECARS):
          others.setdefault(stem, {})[suffix] = tar.extractfile(member).read()
      _check_end(file, tar.offset, path)
  except errors.UserError:
    raise
  except (tarfile.TarError, ValueError) as error:  # of what is no number
    raise errors.UserError(
      f"{path} is cut off, damaged, or no uncompressed tar ({error}); copy it "
      "again, or decompress it"
    ) from error
  if not images:
    raise errors.UserError(
      f"{path} holds no images ({', '.join(files.SUFFIXES)})"
    )
  if links:
    _LOG.warning("%s: %d links left out, which hold no image", path, links)
  samples = [
    _image(path, found)._replace(**_described(others.get(stem, {})))
    for stem, found in images.items()
  ]
  return sorted(samples, key=lambda x: x.offset), bool(others)


def _parts(name: str) -> tuple[str, str]:
  """What the parts of a sample share, "" for what is hidden; and the rest."""
  directory, _, base = name.rpartition("/")
  base, _, suffix = base.partition(".")
  stem = f"{directory}/{base}" if base else ""
  return stem, f".{suffix.lower()}"


def _image(path: str, found: list[_Sample]) -> _Sample:
  """Of a sample; one such as x.mask.png is none where there is x.jpg."""
  exact = [x for x in found if _parts(x.key)[1] in files.SUFFIXES]
  if len(exact or found) > 1:
    names = " and ".join(x.key for x in (exact or found)[:2])
    raise errors.UserError(
      f"{path} holds two images of one key, {names}: what has the same name up "
      "to the first dot is one sample; rename one"
    )
  return (exact or found)[0]


def _check_end(file: io.IOBase, end: int, path: str) -> None:
  """Raises UserError unless only zeros follow: an empty header is an end."""
  file.seek(end)
  size = 0
  while data := file.read(2**20):
    if data.count(0) < len(data):
      raise errors.UserError(
        f"{path} is cut off or has a hole at byte {end + size:,}: what "
        "follows is not read; copy or make it again"
      )
    size += len(data)
  if size < tarfile.BLOCKSIZE:
    raise errors.UserError(
      f"{path} is cut off: it has no mark of its end after byte {end:,}; copy "
      "or make it again"
    )


def _described(parts: dict[str, bytes]) -> dict[str, Any]:
  """Captions and class by the files beside an image."""
  values, named = {}, None
  with contextlib.suppress(ValueError, RecursionError):
    values = json.loads(parts.get(".json", b"{}"))
  if ".cls" in parts:
    named = parts[".cls"].decode("utf-8", "backslashreplace").strip()
  elif isinstance(values, dict):
    known = (values.get(key) for key in _CLASS_KEYS)
    known = (x for x in known if type(x) in (int, str))
    named = next((str(x).strip() for x in known), None)
  return {
    "captions": containers.noted(lambda: _captions(parts)),
    "named": named,
  }


def _captions(parts: dict[str, bytes]) -> tuple[image_captions.Caption, ...]:
  of_json = image_captions.of_json(parts.get(".json", b"{}"))
  return of_json or image_captions.of_text(parts.get(".txt", b""))


def _check_unique(table: pa.Table, tars: containers.Containers) -> None:
  if pc.count_distinct(table["key"]).as_py() == len(table):
    return
  seen = {}
  keys, numbers = (table[x].to_pylist() for x in ("key", "file"))
  for key, file in zip(keys, numbers, strict=True):
    if key in seen:
      where = sorted({tars.path(seen[key]), tars.path(file)})
      raise errors.UserError(
        f"{' and '.join(where)} hold {key} twice; each image has a key of its "
        "own: remove one, or rename it"
      )
    seen[key] = file


def _labelled(
  table: pa.Table, tars: containers.Containers, is_plain: bool
) -> tuple[pa.ChunkedArray, list[str]]:
  """Labels of all images, and the names of their classes."""
  named = table["named"]
  if named.null_count and named.null_count < len(named):
    row = pc.index(pc.is_null(named), True).as_py()
    path = tars.path(table["file"][row].as_py())
    raise errors.UserError(
      f"{path}: {table['key'][row]} has no class, neither in a .cls nor in a "
      ".json, and others have one; give it one, or none any"
    )
  if not named.null_count:
    return containers.labelled(named)
  classes = containers.first_directories(table["key"])
  names = [re.sub(r"\.tar$", "", x.name) for x in tars.files]
  has_one = pc.any(pc.not_equal(classes, "")).as_py()
  if is_plain and not has_one and not _are_numbered(names):
    classes = pa.array(names).take(table["file"])
  return containers.by_name(classes)


def _are_numbered(names: list[str]) -> bool:
  """Whether they are one name, with one number that counts them."""
  parts = np.array([re.split(r"(\d+)", name) for name in names], object)
  if parts.ndim < 2:
    return False
  differ = np.flatnonzero((parts != parts[0]).any(0))
  if len(differ) != 1 or differ[0] % 2 == 0:
    return len(names) == 1
  numbers = parts[:, differ[0]].astype(int)
  return sorted(numbers) == list(range(min(numbers), min(numbers) + len(names)))
