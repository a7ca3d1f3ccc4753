"""Files of records in array_record format, of which any record is one read.

Any reader of array_record opens them. Here, a record is a range of bytes of its
file: each stands uncompressed in a chunk of its own (`group_size:1`). Riegeli,
the format beneath, puts a header of 24 bytes at the start of each block of
64 KiB, wherever that falls, which is left out of what is read.
"""

import errno
import os
from collections.abc import Iterable

from array_record.python import array_record_module

from dcae_jax import errors

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 2**16, 24, 40
_SIZE, _KIND = slice(8, 16), 24  # of a chunk's header
_RECORD = ord("r")


def write(path: str, records: Iterable[bytes]) -> list[int]:
  """Writes a file; returns where each record begins.

  Raises OSError for what the disk refuses.
  """
  sizes = []
  try:
    writer = array_record_module.ArrayRecordWriter(
      path, "group_size:1,uncompressed"
    )
    for record in records:
      writer.write(record)
      sizes.append(len(record))
    writer.close()
  except RuntimeError as error:
    is_full = os.strerror(errno.ENOSPC) in str(error)
    number = errno.ENOSPC if is_full else errno.EIO
    raise OSError(number, errors.first_line(error), path) from error
  return _offsets(path, sizes)


def _offsets(path: str, sizes: list[int]) -> list[int]:
  """Where the records of a file begin, which have these sizes."""
  found, position, end = [], 0, os.path.getsize(path)
  with open(path, "rb") as file:
    while len(found) < len(sizes):
      file.seek(position)
      size = stop(position, _CHUNK_HEADER) - position
      header = without_headers(file.read(size), position)
      size = int.from_bytes(header[_SIZE], "little")
      following = stop(position, _CHUNK_HEADER + size)
      if following > end or len(header) < _CHUNK_HEADER:
        raise OSError(errno.EIO, "was not written whole", path)
      if header[_KIND] == _RECORD:
        before = _CHUNK_HEADER + size - sizes[len(found)]
        found.append(stop(position, before))
      position = following
  return found


def stop(offset: int, size: int) -> int:
  """Where so many bytes end that begin there."""
  if not size:
    return offset
  if offset % _BLOCK == 0:
    offset += _BLOCK_HEADER
  while size > (room := _BLOCK - offset % _BLOCK):
    size -= room
    offset += room + _BLOCK_HEADER
  return offset + size


def without_headers(data: bytes, offset: int) -> bytes:
  """What stands in a file from an offset on, without the headers of blocks."""
  parts, position, end = [], offset, offset + len(data)
  while position < end:
    if position % _BLOCK == 0:
      position += _BLOCK_HEADER
    following = min((position // _BLOCK + 1) * _BLOCK, end)
    parts.append(data[position - offset : following - offset])
    position = following
  return b"".join(parts)
