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
_GONE = ".gone"


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
  _remove(path)
  os.close(lock)


def _remove(path: str) -> None:
  """Under another name: nobody makes a file there meanwhile.

  The name also says, if this is killed half-way, that nobody needs the rest.
  """
  with contextlib.suppress(OSError):  # somebody has removed it
    os.rename(path, path + _GONE)
  shutil.rmtree(path + _GONE, ignore_errors=True)


def _remove_left(place: pathlib.Path, name: str) -> None:
  for lock in place.glob(f"{name}_*/{_LOCK}"):
    # Others may have put a pipe there, which would be waited for.
    opener = lambda path, flags: os.open(path, flags | os.O_NONBLOCK)
    with (
      contextlib.suppress(OSError),
      open(lock, "rb", opener=opener) as file,
    ):
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else it is alive
      _remove(os.fspath(lock.parent))
  for path in place.glob(f"{name}_*{_GONE}"):
    shutil.rmtree(path, ignore_errors=True)
