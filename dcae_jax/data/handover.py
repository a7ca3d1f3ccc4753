"""Batches from loader processes to the main one: files in memory.

What goes through pipes stays small, so that a process that is killed leaves no
half of a message, for which others would wait. A file is gone when it is taken;
those of a main process that was killed are removed by the next one.
"""

import contextlib
import fcntl
import mmap
import os
import pathlib
import pickle
import shutil
import tempfile
import uuid
import weakref
from typing import Any

_MEMORY, _ENOUGH = "/dev/shm", 2**30  # bytes; containers may have less
_PREFIX, _LOCK = "dcae_jax_batches_", "lock"
_ALIGNMENT = 64  # bytes, of arrays


class Handover:
  """One main process's; workers get a copy."""

  def __init__(self):
    place = tempfile.gettempdir()
    with contextlib.suppress(OSError):  # there is none
      if shutil.disk_usage(_MEMORY).free >= _ENOUGH:
        place = _MEMORY
    _remove_left(pathlib.Path(place))
    self._directory = tempfile.mkdtemp(prefix=_PREFIX, dir=place)
    path = os.path.join(self._directory, _LOCK)
    lock = os.open(f"{path}.new", os.O_CREAT | os.O_WRONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(f"{path}.new", path)  # nobody finds it before it is held
    weakref.finalize(self, _end, self._directory, lock)

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
    with open(path, "xb") as file:
      for part in parts:
        file.seek(_aligned(file.tell()))
        file.write(part)
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


def _end(directory: str, lock: int) -> None:
  shutil.rmtree(directory, ignore_errors=True)
  os.close(lock)


def _aligned(position: int) -> int:
  return -(-position // _ALIGNMENT) * _ALIGNMENT


def _remove_left(place: pathlib.Path) -> None:
  """Directories whose main process no longer holds their lock."""
  for lock in place.glob(f"{_PREFIX}*/{_LOCK}"):
    with contextlib.suppress(OSError), lock.open("rb") as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else it is alive
      shutil.rmtree(lock.parent, ignore_errors=True)
