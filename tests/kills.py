"""Ends what changes files in a folder at a chosen change, as a kill would."""

import contextlib
import os
import sys

_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir")
_WRITING = os.O_WRONLY | os.O_RDWR
_state = {"folder": None, "left": 0}


class Killed(BaseException):
  """Nothing that handles errors handles it."""


@contextlib.contextmanager
def kill(folder, after: int):
  """Lets so many changes below the folder happen, and none after them.

  Yields a function: how many of those that were let have not happened.
  """
  _state.update(folder=os.path.realpath(folder), left=after)
  try:
    yield lambda: _state["left"]
  except Killed:
    pass
  finally:
    _state["folder"] = None


def _watch(event, arguments):
  folder = _state["folder"]
  if folder is None:
    return
  if event == "open":
    path, _, flags = arguments
    if not flags & _WRITING:
      return
  elif event in _CHANGES:
    path, *_, descriptor = arguments
    if event in ("os.remove", "os.rmdir") and descriptor != -1:
      path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path)
  else:
    return
  if not isinstance(path, str | bytes | os.PathLike):
    return
  if os.path.realpath(os.fsdecode(path)).startswith(folder + os.sep):
    if _state["left"] <= 0:
      raise Killed
    _state["left"] -= 1


sys.addaudithook(_watch)
