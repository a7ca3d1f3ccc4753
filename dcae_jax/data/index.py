"""What is known of each image without reading it: a row of an index.

As a file it is parquet, with plain columns; in memory it is mapped from a
temporary file, so that the processes of a machine share one copy of it.
"""

import hashlib
import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dcae_jax import errors
from dcae_jax.runs import owned_directory

# One row an image. `captions` are as `data.captions.joined` has them. Its bytes
# are `bytes` from `offset` on of the file `file`, see the source that has it.
SCHEMA = pa.schema(
  [
    pa.field(name, kind, nullable=False)
    for name, kind in {
      "key": pa.large_string(),
      "label": pa.int32(),
      "captions": pa.large_string(),
      "split": pa.large_string(),
      "width": pa.int32(),  # as it is shown; 0: not known
      "height": pa.int32(),
      "file": pa.int32(),
      "position": pa.int64(),  # in its file, in records
      "offset": pa.int64(),
      "bytes": pa.int64(),  # 0: all of the file
      "crc32": pa.int64(),  # -1: not known
      "sha256": pa.binary(32),  # zeros: not known
    }.items()
  ]
)

_NO_ROWS = pa.RecordBatch.from_pylist([], SCHEMA)


class Index:
  """Columns of `SCHEMA`, and of strings the text of a row.

  Picklable: a process that gets it maps the same file.
  """

  def __init__(self, table: pa.Table):
    """Writes the table, which has the schema, where it is mapped from.

    Its memory is free again if the caller does not keep it.
    """
    self._owned = owned_directory.OwnedDirectory("dcae_jax_index")
    path, rows = os.path.join(self._owned.path, "index.arrow"), len(table)
    table = table.select(SCHEMA.names).cast(SCHEMA).combine_chunks()
    with pa.ipc.new_file(path, SCHEMA) as writer:
      writer.write_table(table, max_chunksize=max(rows, 1))
    del table
    pa.default_memory_pool().release_unused()
    self.__setstate__(path)

  def __getstate__(self) -> str:
    return self._path

  def __setstate__(self, path: str) -> None:
    self._path = path
    with pa.memory_map(path) as file:
      (table,) = pa.ipc.open_file(file).read_all().to_batches() or [_NO_ROWS]
    self._columns = dict(zip(SCHEMA.names, table.columns, strict=True))

  def __len__(self) -> int:
    return len(self._columns["key"])

  def numbers(self, column: str) -> np.ndarray:
    """A column of numbers [n], mapped."""
    return self._columns[column].to_numpy(zero_copy_only=True)

  def of_row(self, row: int, *columns: str) -> list[int]:
    """Numbers of a row."""
    return [int(self.numbers(column)[row]) for column in columns]

  def text(self, column: str, row: int) -> str:
    return self._columns[column][row].as_py()

  def texts(self, column: str) -> Iterator[str]:
    """Of all rows, without holding them all."""
    for start in range(0, len(self), 2**14):
      yield from self._columns[column].slice(start, 2**14).to_pylist()

  def digests(self) -> np.ndarray:
    """The first eight bytes of `sha256` as numbers, uint64 [n]."""
    data = self._columns["sha256"].buffers()[1]
    return np.frombuffer(data, ">u8").reshape(-1, 4)[:, 0]

  def sizes(self) -> np.ndarray | None:
    """Widths and heights, int32 [n, 2]; None where one is not known."""
    sizes = np.stack([self.numbers("width"), self.numbers("height")], 1)
    return sizes if (sizes > 0).all() else None

  def digest(self, *columns: str) -> str:
    """sha256 of all rows: of some columns, or of all."""
    digest = hashlib.sha256()
    for name in columns or SCHEMA.names:
      for buffer in self._columns[name].buffers():
        digest.update(buffer or b"")
    return digest.hexdigest()


def has_captions(table: pa.Table) -> bool:
  """Whether any row has some."""
  return bool(pc.any(pc.not_equal(table["captions"], "")).as_py())


def to_parquet(table: pa.Table) -> bytes:
  """A table with the schema as a file."""
  sink = pa.BufferOutputStream()
  pq.write_table(
    table,
    sink,
    compression="zstd",
    row_group_size=2**17,
    write_page_checksum=True,
  )
  return sink.getvalue().to_pybytes()


def sha256(data: bytes) -> str:
  """Of an index as a file."""
  return hashlib.sha256(data).hexdigest()


def from_parquet(data: bytes, path: str) -> pa.Table:
  """The table of a file; UserError, which names the path, if it is none."""
  try:
    table = pq.read_table(
      pa.BufferReader(data), page_checksum_verification=True
    )
    missing = set(SCHEMA.names) - set(table.column_names)
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
      f"{path} is damaged ({errors.first_line(error)}); bring it back, or "
      "delete it and make it again"
    ) from error
  if missing:
    raise errors.UserError(
      f"{path} is no index of images: it has no column {min(missing)}"
    )
  return table
