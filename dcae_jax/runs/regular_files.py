"""Files that a user names are read if they are regular ones.

Whoever opens a pipe waits for a writer, and a device may never end.
"""

import os
import stat
from typing import TypeVar

from dcae_jax import errors

_Path = TypeVar("_Path", bound=str | os.PathLike)


def checked(path: _Path) -> _Path:
  """The path, to be opened; UserError if a pipe or a device is there.

  What is missing or hidden, a directory or remote is left to who opens it.
  """
  try:
    mode = os.stat(path).st_mode
  except (OSError, ValueError):
    return path
  if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
    raise errors.UserError(
      f"{os.fspath(path)!r} is no regular file but a pipe or a device; name a "
      "file"
    )
  return path
