"""Paths in the configs of runs, which may have moved since they were written.

The runs of one work directory name each other. Moved or copied together, they
still do: what counts is where a path lies as seen from the run that names it.
"""

import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

_ABOVE = (".", "..", "../..")  # a cell of a study names others two levels up


def absolute(path: str) -> str:
  """As it is known from every current directory; `gs://` paths as they are."""
  if "://" in path:
    return path
  return os.path.abspath(os.path.expanduser(path))


def absolute_if_there(path: str) -> str:
  """The same for what may be a hub id, which is left as it is."""
  local = absolute(path)
  return local if "://" not in path and os.path.exists(local) else path


def same(before: str, now: str, workdir: str, written_in: str = "") -> bool:
  """Whether two texts of a config are paths that mean the same.

  Args:
    before: in the config of a run.
    now: the text that is in its place.
    workdir: of the run.
    written_in: its work directory when the config was written; "": not known,
      and then only what is no longer there counts as moved.
  """
  if not before or not now or "\0" in before + now:
    return False
  if _real(before) == _real(now):
    return True
  if not written_in:
    is_path = _is_surely_a_path(before) or _is_there(f"{now}/config.json")
    if _is_there(before) or not is_path:
      return False
  there = _moved(before, workdir, written_in)
  return _real(now) in map(_real, there)


def found(path: str, workdir: str, written_in: str = "") -> str:
  """Where that is now; the path itself where it is still there, or nowhere."""
  if "\0" in path or not _is_surely_a_path(path) or _is_there(path):
    return path
  for moved in _moved(path, workdir, written_in):
    if _is_there(moved) and _real(moved) != _real(workdir):
      return moved
  return path


def mapped(value: Any, change: Callable[[str], str]) -> Any:
  """A tree as JSON has it, with each of its texts changed."""
  if isinstance(value, dict):
    return {key: mapped(x, change) for key, x in value.items()}
  if isinstance(value, list):
    return [mapped(x, change) for x in value]
  return change(value) if isinstance(value, str) else value


def as_now(before: Any, now: Any, workdir: str, written_in: str) -> Any:
  """A tree, with the paths of another one where they mean the same."""
  if isinstance(before, dict) and isinstance(now, dict):
    return {
      key: as_now(x, now.get(key), workdir, written_in)
      for key, x in before.items()
    }
  if isinstance(before, str) and isinstance(now, str) and before != now:
    return now if same(before, now, workdir, written_in) else before
  return before


def _moved(path: str, workdir: str, written_in: str) -> Iterator[str]:
  """Where it may lie, if it has moved together with a work directory."""
  is_remote, path = "://" in path, _bare(path)
  # Seen from the place that a symlink stands for, too.
  for directory in dict.fromkeys((absolute(workdir), _real(workdir))):
    if written_in:
      if os.path.isabs(path) or is_remote:
        relative = os.path.relpath(path, _bare(written_in))
        yield _joined(directory, relative)
    elif is_remote == ("://" in workdir):
      parts = pathlib.PurePath(path.lstrip("/")).parts
      for first in range(len(parts)):  # the more of it there is, the better
        for above in _ABOVE:
          yield _joined(directory, above, *parts[first:])


def _is_surely_a_path(text: str) -> bool:
  """Neither a name nor a hub id, `owner/name`."""
  return text.startswith(("/", "~", "gs://")) or text.count("/") > 1


def _is_there(path: str) -> bool:
  if "://" in path:
    return epath.Path(path).exists()
  return os.path.exists(absolute(path))


def _real(path: str) -> str:
  path = absolute(path)
  return path.rstrip("/") if "://" in path else os.path.realpath(path)


def _bare(path: str) -> str:
  """Without "gs://"."""
  return path.rpartition("://")[2]


def _joined(directory: str, *parts: str) -> str:
  scheme, separator, rest = directory.rpartition("://")
  return scheme + separator + os.path.normpath(os.path.join(rest, *parts))
