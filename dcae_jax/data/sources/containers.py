"""Files that hold many images each: one, those of a directory or a pattern."""

import errno
import fnmatch
import glob
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from dcae_jax import errors
from dcae_jax.data import captions as image_captions
from dcae_jax.data import index, listings, remote_file
from dcae_jax.runs import regular_files, storage

# `(name, make)`: the table that `make` returns, made once for all processes and
# starts of a run, which know it by its name. See setup/image_sources.py.
Indexed = Callable[[str, Callable[[], pa.Table]], pa.Table]
_VERSION = 1  # of how tables are made
_UNKNOWN = {"crc32": -1, "split": "", "sha256": bytes(32), "captions": ""}
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4")


def indexed_here(name: str, make: Callable[[], pa.Table]) -> pa.Table:
  """Made by each process for itself: for use outside of runs."""
  del name
  return make()


def completed(table: pa.Table) -> pa.Table:
  """With the schema of an index; what is not known is said to be so."""
  for name in set(index.SCHEMA.names) - set(table.column_names):
    kind = index.SCHEMA.field(name).type
    values = pa.repeat(pa.scalar(_UNKNOWN.get(name, 0), kind), len(table))
    table = table.append_column(name, values)
  return table.select(index.SCHEMA.names).cast(index.SCHEMA)


def labelled(named: pa.ChunkedArray) -> tuple[pa.ChunkedArray, list[str]]:
  """Labels of texts, and the names of their classes.

  If all are whole numbers, they are labels of classes without names.
  """
  if pc.all(pc.match_substring_regex(named, r"^-?\d{1,9}$")).as_py():
    return named.cast(pa.int32()), []
  return by_name(named)


def by_name(named: pa.ChunkedArray) -> tuple[pa.ChunkedArray, list[str]]:
  """Labels of texts that are names, and these, in order."""
  classes = sorted(pc.unique(named).to_pylist())
  labels = pc.index_in(named, pa.array(classes, named.type))
  return labels, classes


def first_directories(keys: pa.ChunkedArray) -> pa.ChunkedArray:
  """Of each; "" if it has none."""
  first = pc.list_element(pc.split_pattern(keys, "/", max_splits=1), 0)
  return pc.if_else(pc.match_substring(keys, "/"), first, "")


def noted(parse: Callable[[], Sequence[image_captions.Caption]]) -> str:
  """Captions for an index; if they are none, why, behind a NUL."""
  try:
    return image_captions.joined(parse())
  except (ValueError, RecursionError) as error:
    return f"\0{error}".encode("utf-8", "backslashreplace").decode()


def captions(text: str, name: str) -> tuple[image_captions.Caption, ...]:
  """Of an index; OSError, as for an image that is none, if they are none."""
  if text.startswith("\0"):
    raise OSError(errno.ENXIO, f"captions: {text[1:]}", name)
  return tuple(image_captions.split(text))


class Container(NamedTuple):
  """A file.

  Attributes:
    name: below the directory of all of them.
    size: in bytes.
    version: changes when it is written anew.
  """

  name: str
  size: int
  version: str


class Containers:
  """The files of a source, in the order of their names.

  Attributes:
    place: the directory that all are in.
    files: at least one.
  """

  def __init__(self, path: str, suffix: str):
    """Lists them.

    Args:
      path: a file, a directory or a pattern with `*` and `{0000..1023}`, local
        or `gs://`.
      suffix: of the names.

    Raises:
      UserError: there is none of them, or it cannot be listed.
    """
    what = f"{suffix} file"
    if not path:
      raise errors.UserError(
        f"config.source.path is empty; name a {what}, a directory of them, or "
        f"a pattern such as /data/train-{{0000..1023}}{suffix}"
      )
    is_remote = "://" in path
    if not is_remote:
      path = os.path.abspath(os.path.expanduser(path))
    try:
      found = (_remote if is_remote else _local)(path, suffix)
    except OSError as error:
      reason = error.strerror or errors.first_line(error)
      raise errors.UserError(
        f"{path!r}: {error.filename or path} cannot be listed ({reason})"
      ) from error
    self.place = storage.Storage(_directory(path, found))
    below = len(f"{self.place.path}/")
    self.files = [
      Container(file[below:], *found[file])
      for file in sorted(found)
      if file.endswith(suffix) and not os.path.basename(file).startswith(".")
    ]
    if not self.files:
      others = [file for file in found if file.endswith(_COMPRESSED)]
      advice = (
        f", but {len(others)} compressed ones, of which no image can be read "
        f"without all before it: decompress them, such as {others[0]!r}"
        if others
        else ""
      )
      raise errors.UserError(f"{path!r} is, holds or matches no {what}{advice}")
    try:
      "".join(map(self.path, range(len(self.files)))).encode()
    except UnicodeEncodeError as error:
      raise errors.UserError(
        f"{path!r} has names that are no UTF-8; rename them"
      ) from error

  def path(self, file: int) -> str:
    return f"{self.place.path}/{self.files[file].name}"

  def table_name(self, kind: str, *options: str) -> str:
    """Of what is made of these files: another one when one of them changes."""
    entry = (_VERSION, kind, options, self.place.path, self.files)
    return f"{kind}_{hashlib.sha256(repr(entry).encode()).hexdigest()[:16]}"

  def open(self, file: int, ahead: int) -> io.IOBase:
    """A file; a remote one is read by at least so many bytes."""
    name, size, _ = self.files[file]
    if "://" in self.place.path:
      return remote_file.RemoteFile(self.place, name, size, ahead)
    return open(regular_files.checked(self.path(file)), "rb")


def _directory(path: str, found: dict[str, tuple[int, str]]) -> str:
  if path in found:
    return os.path.dirname(path)
  return os.path.dirname(_beginning(path)) if _is_pattern(path) else path


def _beginning(pattern: str) -> str:
  return re.split(r"[*?\[{]", pattern)[0]


def _is_pattern(path: str) -> bool:
  return not os.path.lexists(path) and bool(re.search(r"[*?\[{]", path))


def _local(path: str, suffix: str) -> dict[str, tuple[int, str]]:
  if os.path.isdir(path):
    files = list(listings.files(path))
  elif _is_pattern(path):
    files = []
    for pattern in _expanded(path):
      files += (matching := glob.glob(pattern))
      if not matching:
        raise _unmatched(path, pattern)
  else:
    files = [path]
  found = {}
  for file in files:
    if file.endswith((suffix, *_COMPRESSED)):
      status = os.stat(file)
      found[file] = status.st_size, str(status.st_mtime_ns)
  return found


def _remote(path: str, suffix: str) -> dict[str, tuple[int, str]]:
  if path.endswith(suffix) and not _is_pattern(path):
    return {x: y for x, y in listings.versions(path).items() if x == path}
  if not _is_pattern(path):
    return listings.versions(f"{path.rstrip('/')}/")
  below = listings.versions(_beginning(path))
  found = {}
  for pattern in _expanded(path):
    parts = pattern.split("/")
    matching = [
      file
      for file in below
      if file.count("/") == len(parts) - 1
      and all(map(fnmatch.fnmatchcase, file.split("/"), parts))
    ]
    if not matching:
      raise _unmatched(path, pattern)
    found |= {file: below[file] for file in matching}
  return found


def _expanded(pattern: str) -> Iterator[str]:
  """Without braces: `{00..10}` and `{a,b}` become what they stand for."""
  part = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*))\}", pattern)
  if not part:
    yield pattern
    return
  first, last, names = part.groups()
  values = names.split(",") if names is not None else (
    f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)
  )  # fmt: skip
  for value in values:
    yield from _expanded(
      pattern[: part.start()] + value + pattern[part.end() :]
    )


def _unmatched(path: str, pattern: str) -> errors.UserError:
  which = "" if pattern == path else f", of {path!r}"
  return errors.UserError(f"there is no file {pattern!r}{which}")
