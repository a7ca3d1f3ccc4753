"""Parquet files with a column of encoded images, as hubs hold them.

Their footers and small columns are read once. An image is read with the row
group that it stands in, of which each process keeps the last ones: training
takes them from a few row groups at a time.
"""

import collections
import concurrent.futures
import contextlib
import errno
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dcae_jax import errors
from dcae_jax.data import captions as image_captions
from dcae_jax.data import index
from dcae_jax.data.sources import containers, protocol

_LOG = logging.getLogger(__name__)
_AHEAD = 2**16  # bytes that are read of a remote file at once, at least
_AT_ONCE = 16  # files whose footers are read
_CACHE = 2**29  # bytes of row groups that a process keeps
_WINDOW = 2**27  # of those that it takes images from; threads differ by batches
_METADATA = b"dcae_jax"
_TEXT = pa.large_string()
_IMAGES = (
  "image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes",
)  # fmt: skip
_LABELS = ("label", "cls", "class", "labels")


class _RowGroup(NamedTuple):
  """A row group.

  Attributes:
    file: its number.
    number: of it in its file.
    rows: how many.
    bytes: of the images in it.
  """

  file: int
  number: int
  rows: int
  bytes: int


class Parquet:
  """The rows of parquet files, local or `gs://`, in their order.

  Attributes:
    classes: names, by label.
  """

  def __init__(
    self,
    path: str,
    columns: Mapping[str, str],
    captions: bool = False,
    indexed: containers.Indexed = containers.indexed_here,
  ):
    """Reads all footers, labels and captions, or what was kept of them.

    Args:
      path: a file, a directory of them, or a pattern.
      columns: of `image` (bytes, or a struct that has them), `label` (numbers
        or names) and `text` (one caption or several); "": that of a usual name.
      captions: give them, too.
      indexed: keeps what was found.

    Raises:
      UserError: there are no files, or they lack a column.
    """
    self._files = containers.Containers(path, ".parquet")
    name = self._files.table_name("parquet", *map(str, sorted(columns.items())))
    table = indexed(name, lambda: _table(self._files, columns))
    described = json.loads(table.schema.metadata[_METADATA])
    self.classes = described["classes"]
    self._column = described["column"]
    self._has_captions = captions
    if captions and not index.has_captions(table):
      raise errors.UserError(
        f"{path!r} has no captions in a column {_or(image_captions.KEYS)}; "
        "name it with config.source.columns.text, or set "
        "config.source.captions=False"
      )
    self._rows = index.Index(table)
    self._groups = [_RowGroup(*group) for group in described["groups"]]
    self._starts = np.cumsum([0] + [group.rows for group in self._groups])
    self._cache, self._footers = _Cache(), {}

  def __len__(self) -> int:
    return len(self._rows)

  def name(self, index: int) -> str:
    file, row = self._rows.of_row(index, "file", "position")
    return f"{self._files.path(file)}[{row}]"

  def key(self, index: int) -> str:
    """The name of the file, and the position in it."""
    return self._rows.text("key", index)

  def sizes(self) -> np.ndarray | None:
    return self._rows.sizes()

  def groups(self) -> protocol.Groups | None:
    """Row groups; None if all of them fit in memory at once."""
    size = sum(group.bytes for group in self._groups) / len(self._groups)
    # A power of two: each of as many processes reads its share of them.
    window = 2 ** max(0, int(np.log2(_WINDOW / max(size, 1))))
    if window >= len(self._groups):
      return None
    numbers = np.arange(len(self._groups), dtype=np.int32)
    return protocol.Groups(np.repeat(numbers, np.diff(self._starts)), window)

  def fingerprint(self) -> str:
    """sha256 of classes, labels, captions, and row groups with their sizes.

    Images are not read for it.
    """
    text = f"{self.classes} {self._rows.digest()} {self._groups}"
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()

  def __getitem__(self, index: int) -> protocol.Record:
    rows, name = self._rows, self.name(index)
    captions = ()
    if self._has_captions:
      captions = containers.captions(rows.text("captions", index), name)
    number = int(np.searchsorted(self._starts, index, "right")) - 1
    group = self._groups[number]
    images = self._cache.get(number, group.bytes, lambda: self._read(group))
    encoded = images[index - int(self._starts[number])].as_py()
    if encoded is None:
      raise OSError(errno.ENXIO, "no image in this row", name)
    (label,) = rows.of_row(index, "label")
    return protocol.Record(name, encoded, label, captions)

  def _read(self, group: _RowGroup) -> pa.ChunkedArray:
    """The images of a row group, or None where there is none."""
    path, footer = self._files.path(group.file), self._footers.get(group.file)
    with self._files.open(group.file, _AHEAD) as file, _undamaged(path):
      opened = pq.ParquetFile(file, metadata=footer)
      if footer is None:
        known = [x for x in self._groups if x.file == group.file]
        if _row_groups(opened.metadata, group.file, self._column) != known:
          raise errors.UserError(
            f"{path} has changed since the run began; bring it back, or start "
            "again"
          )
        self._footers[group.file] = opened.metadata
      column = opened.read_row_group(group.number, [self._column]).column(0)
    is_struct = pa.types.is_struct(column.type)
    return pc.struct_field(column, "bytes") if is_struct else column

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_footers": {}}


class _Cache:
  """The row groups that were read last, which all threads share."""

  def __init__(self):
    self._lock = threading.Lock()
    self._known: collections.OrderedDict[
      int, tuple[concurrent.futures.Future, int]
    ] = collections.OrderedDict()

  def __reduce__(self):
    return _Cache, ()

  def get(
    self, number: int, size: int, read: Callable[[], pa.ChunkedArray]
  ) -> pa.ChunkedArray:
    """What `read` returns, called by the first thread that asks for it."""
    with self._lock:
      future, _ = self._known.get(number, (None, 0))
      is_first = future is None
      if is_first:
        future = concurrent.futures.Future()
        self._known[number] = future, size
        kept = sum(size for _, size in self._known.values())
        while kept > _CACHE and len(self._known) > 1:
          kept -= self._known.popitem(last=False)[1][1]
      self._known.move_to_end(number)
    if is_first:
      try:
        future.set_result(read())
      except BaseException as error:
        with self._lock:
          self._known.pop(number, None)
        future.set_exception(error)
    return future.result()


@contextlib.contextmanager
def _undamaged(path: str) -> Iterator[None]:
  """Raises UserError for what Arrow finds wrong, not for what storage does."""
  try:
    yield
  except (pa.ArrowException, OSError) as error:
    if getattr(error, "errno", None) is not None:
      raise
    raise errors.UserError(
      f"{path} is damaged, or no parquet file ({errors.first_line(error)}); "
      "copy or make it again"
    ) from error


class _Columns(NamedTuple):
  """Names of columns; None for those that are not there."""

  image: str
  label: str | None
  text: str | None
  width: str | None
  height: str | None


def _table(
  files: containers.Containers, columns: Mapping[str, str]
) -> pa.Table:
  """The index of all files, with classes and row groups as metadata."""

  def scan(file: int) -> _Scanned:
    path = files.path(file)
    with files.open(file, _AHEAD) as opened, _undamaged(path):
      return _scanned(pq.ParquetFile(opened), file, files, columns)

  count = len(files.files)
  _LOG.info("indexing %d parquet files, such as %s", count, files.path(0))
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    found = list(pool.map(scan, range(count)))
  first = found[0]
  for file, scanned in enumerate(found):
    if _shown(scanned) != _shown(first):
      raise errors.UserError(
        f"{files.path(file)} has other columns than {files.path(0)}: "
        f"{_shown(scanned)}, not {_shown(first)}; files of one source have the "
        "same"
      )
    if scanned.classes != first.classes:
      raise errors.UserError(
        f"{files.path(file)} and {files.path(0)} note other names of classes "
        f"in {scanned.columns.label}; files of one source have the same: make "
        "each a member of a mixture"
      )
  groups = [group for scanned in found for group in scanned.groups]
  table = pa.concat_tables([scanned.table for scanned in found])
  path = files.path(0)
  if not len(table):
    raise errors.UserError(f"{path} has no rows, nor has any other")
  classes = [""]
  if first.columns.label:
    labels, classes = containers.labelled(table["named"])
    table = table.append_column("label", labels)
    if not classes and first.classes:
      classes, most = first.classes, pc.max(labels).as_py()
      if most >= len(classes):
        raise errors.UserError(
          f"{path} has the label {most} in {first.columns.label}, and notes "
          f"{len(classes)} names of classes; labels count from 0"
        )
  described = {
    "classes": classes, "column": first.leaf, "groups": groups,
  }  # fmt: skip
  metadata = {_METADATA: json.dumps(described)}
  return containers.completed(table).replace_schema_metadata(metadata)


class _Scanned(NamedTuple):
  """What a file has.

  Attributes:
    table: of what is in the index, and `named`: classes as texts.
    groups: of rows.
    columns: in which it is.
    leaf: the name of the column of bytes, within that of images.
    classes: their names, where labels are numbers and a hub notes names.
  """

  table: pa.Table
  groups: list[_RowGroup]
  columns: _Columns
  leaf: str
  classes: list[str]


def _scanned(
  opened: pq.ParquetFile,
  file: int,
  files: containers.Containers,
  wanted: Mapping[str, str],
) -> _Scanned:
  path, schema = files.path(file), opened.schema_arrow
  columns = _columns(schema, wanted, path)
  is_struct = pa.types.is_struct(schema.field(columns.image).type)
  leaf = f"{columns.image}.bytes" if is_struct else columns.image
  read = opened.read([name for name in columns[1:] if name])
  read.validate(full=True)  # that texts are UTF-8
  rows = opened.metadata.num_rows
  stem = files.files[file].name.removesuffix(".parquet")
  values = {
    "key": pa.array([f"{stem}[{row}]" for row in range(rows)], _TEXT),
    "file": np.full(rows, file, np.int32),
    "position": np.arange(rows),
  }
  for name in ("width", "height"):
    if column := getattr(columns, name):
      values[name] = pc.fill_null(read[column], 0).cast(pa.int32())
  if columns.text:
    values["captions"] = pa.array(
      map(_noted, read[columns.text].to_pylist()), _TEXT
    )
  if columns.label:
    values["named"] = read[columns.label].cast(_TEXT)
    if values["named"].null_count:
      row = pc.index(pc.is_null(values["named"]), True).as_py()
      raise errors.UserError(
        f"{path} has no {columns.label} in row {row}; give each row one, or "
        "name another column with config.source.columns.label"
      )
  groups = _row_groups(opened.metadata, file, leaf)
  if rows and not any(group.bytes for group in groups):
    raise errors.UserError(
      f"{path} has no bytes in its column {columns.image}, maybe only names of "
      "files; embed the images"
    )
  return _Scanned(
    pa.table(values), groups, columns, leaf, _names(schema, columns.label)
  )


def _row_groups(
  footer: pq.FileMetaData, file: int, leaf: str
) -> list[_RowGroup]:
  """Of a file; of those without any image, 0 bytes."""
  found = []
  for number in range(footer.num_row_groups):
    group = footer.row_group(number)
    chunks = map(group.column, range(group.num_columns))
    chunk = next(x for x in chunks if x.path_in_schema == leaf)
    known = chunk.statistics
    is_empty = known and known.null_count == group.num_rows
    size = 0 if is_empty else chunk.total_uncompressed_size
    found.append(_RowGroup(file, number, group.num_rows, size))
  return found


def _noted(value: str | list[str | None] | None) -> str:
  texts = [value] if isinstance(value, str) else value or []
  texts = [text for text in texts if text is not None]
  return containers.noted(lambda: image_captions.of_object({"captions": texts}))


def _columns(
  schema: pa.Schema, wanted: Mapping[str, str], path: str
) -> _Columns:
  """Those that are wanted, or have a usual name, and hold what is asked for."""
  found = {}
  for what, (usual, fits) in _USUAL.items():
    name = wanted.get(what, "")
    for known in (name, *usual):
      if schema.names.count(known) > 1:
        raise errors.UserError(
          f"{path} has {schema.names.count(known)} columns {known!r}; rename "
          "all but one"
        )
    if name and name not in schema.names:
      raise errors.UserError(
        f"{path} has no column {name!r}, as config.source.columns.{what} says; "
        f"there are {', '.join(schema.names)}"
      )
    if name and not fits(schema.field(name).type):
      raise errors.UserError(
        f"{path}: the column {name!r} of config.source.columns.{what} holds "
        f"{schema.field(name).type}, no {what}; there are "
        f"{', '.join(schema.names)}"
      )
    known = (
      x for x in usual if x in schema.names and fits(schema.field(x).type)
    )
    found[what] = name or next(known, None)
  if found["image"] is None:
    raise errors.UserError(
      f"{path} has no column of images as bytes, called {_or(_IMAGES)}; there "
      f"are {', '.join(schema.names)}; name it with config.source.columns.image"
    )
  return _Columns(**found)


def _names(schema: pa.Schema, label: str | None) -> list[str]:
  """Of classes, as the library datasets notes them."""
  try:
    noted = json.loads(schema.metadata[b"huggingface"])
    return list(map(str, noted["info"]["features"][label]["names"]))
  except (ValueError, KeyError, TypeError):
    return []


def _is_image(kind: pa.DataType) -> bool:
  if pa.types.is_struct(kind):
    if kind.get_field_index("bytes") < 0:
      return False
    kind = kind["bytes"].type
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
  return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_caption(kind: pa.DataType) -> bool:
  is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
  return _is_text(kind.value_type if is_list else kind)


def _is_label(kind: pa.DataType) -> bool:
  if pa.types.is_dictionary(kind):
    return _is_text(kind.value_type)
  return pa.types.is_integer(kind) or _is_text(kind)


def _or(names: Sequence[str]) -> str:
  return f"{', '.join(names[:-1])} or {names[-1]}"


def _shown(scanned: _Scanned) -> str:
  return ", ".join(filter(None, (scanned.leaf, *scanned.columns[1:])))


# Of what is looked for: names that columns usually have, and what they hold.
_USUAL = {
  "image": (_IMAGES, _is_image),
  "label": (_LABELS, _is_label),
  "text": (image_captions.KEYS, _is_caption),
  "width": (("width",), pa.types.is_integer),
  "height": (("height",), pa.types.is_integer),
}
