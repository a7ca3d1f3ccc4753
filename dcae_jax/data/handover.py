"""Batches from loader processes to the main one: files in memory.

What goes through pipes stays small, so that a process that is killed leaves no
half of a message, for which others would wait. A file is gone when it is taken.
"""

import contextlib
import mmap
import os
import pickle
import shutil
import uuid
from typing import Any

from dcae_jax.runs import owned_directory

_MEMORY, _ENOUGH = "/dev/shm", 2**30  # bytes; containers may have less
_ALIGNMENT = 64  # bytes, of arrays


class Handover:
  """One main process's; workers get a copy."""

  def __init__(self):
    name, self._owned = "dcae_jax_batches", None
    with contextlib.suppress(OSError):  # there is none, or it is not for us
      if shutil.disk_usage(_MEMORY).free >= _ENOUGH:
        self._owned = owned_directory.OwnedDirectory(name, _MEMORY)
    self._owned = self._owned or owned_directory.OwnedDirectory(name)
    self._directory = self._owned.path

  def __getstate__(self) -> str:
    return self._directory

  def __setstate__(self, directory: str) -> None:
    self._directory = directory

  def give(self, batch: Any) -> tuple[str, list[int]]:
    """Writes a file; what `take` needs. OSError if there is no room."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(batch, 5, buffer_callback=buffers.append)
    parts = [head, *(buffer.raw() for buffer in buffers)]
    path = os.path.join(self._directory, uuid.uuid4().hex)
    try:
      with open(path, "xb") as file:
        for part in parts:
          file.seek(_aligned(file.tell()))
          file.write(part)
    except OSError as error:  # which names no file
      raise OSError(error.errno, error.strerror, path) from error
    return path, [len(part) for part in parts]

  def take(self, given: tuple[str, list[int]]) -> Any:
    """The batch, whose arrays are the file's memory, and removes the file."""
    path, sizes = given
    with open(path, "rb") as file:
      data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    os.unlink(path)
    parts, start = [], 0
    for size in sizes:
      parts.append(data[start : start + size])
      start = _aligned(start + size)
    return pickle.loads(parts[0], buffers=parts[1:])


def _aligned(position: int) -> int:
  return -(-position // _ALIGNMENT) * _ALIGNMENT
