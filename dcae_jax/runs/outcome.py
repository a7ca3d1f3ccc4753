"""What a task has made, and where it is: how the log of each task ends."""

import logging
from collections.abc import Mapping

import jax
from etils import epath

_LOG = logging.getLogger(__name__)


def say(
  workdir: epath.Path,
  files: Mapping[str, str],
  elsewhere: Mapping[str, str] | None = None,
) -> None:
  """A line for each thing, on the first process.

  Args:
    workdir: of the task.
    files: by what they are; files or folders in it, of which those are named
      that are there.
    elsewhere: what was made at other paths.
  """
  if jax.process_index():
    return
  paths = {name: str(path) for name, path in (elsewhere or {}).items()}
  for name, file in files.items():
    if _is_there(workdir / file):
      paths[name] = str(workdir / file)
  width = max(map(len, paths))
  lines = [f"  {name:<{width}}  {path}" for name, path in paths.items()]
  _LOG.info("\n".join(["made:", *lines]))


def _is_there(path: epath.Path) -> bool:
  """A file, or a folder with something in it."""
  return any(path.iterdir()) if path.is_dir() else path.exists()
