"""A temporary directory that does not outlive its process for long.

It is removed with the object, or at the end; where the process is killed, by
the next one that makes one of that name.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
import weakref

_LOCK = "lock"  # held as long as the process lives


class OwnedDirectory:
  """Created when it is made.

  Attributes:
    path: of the directory.
  """

  def __init__(self, name: str, place: str = ""):
    """In a place, by default that of temporary files."""
    place = place or tempfile.gettempdir()
    _remove_left(pathlib.Path(place), name)
    self.path = tempfile.mkdtemp(prefix=f"{name}_", dir=place)
    path = os.path.join(self.path, _LOCK)
    lock = os.open(f"{path}.new", os.O_CREAT | os.O_WRONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(f"{path}.new", path)  # nobody finds it before it is held
    weakref.finalize(self, _end, self.path, lock)


def _end(path: str, lock: int) -> None:
  shutil.rmtree(path, ignore_errors=True)
  os.close(lock)


def _remove_left(place: pathlib.Path, name: str) -> None:
  for lock in place.glob(f"{name}_*/{_LOCK}"):
    with contextlib.suppress(OSError):
      # Others may have put a pipe there, which would be waited for.
      file = os.open(lock, os.O_RDONLY | os.O_NONBLOCK)
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else it is alive
        shutil.rmtree(lock.parent, ignore_errors=True)
      finally:
        os.close(file)
