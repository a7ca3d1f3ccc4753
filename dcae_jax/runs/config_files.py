"""Config files, the modules that they name, and the names of keys.

Those of this package are `configs/` in a clone, and within an installed
package. They and those of users import `configs.base`: from there.
"""

import contextlib
import difflib
import importlib
import importlib.util
import os
import pathlib
import re
import runpy
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any

from dcae_jax import errors

_NEAR = 0.6  # of names, from 0 to 1
_PACKAGE = pathlib.Path(__file__).parents[1]
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
FOLDER = next((path for path in _PLACES if path.is_dir()), _PLACES[0])
_base: types.ModuleType | None = None


@contextlib.contextmanager
def importable(*folders: str) -> Iterator[None]:
  """`configs` is a package of these folders and, after them, of this package.

  `configs.base` is this package's in any case, and the same one each time.
  Others that have the name are back afterwards.
  """
  global _base
  others = _forgotten()
  found = others.get("configs.base")
  if found and pathlib.Path(found.__file__ or "") == FOLDER / "base.py":
    _base = found  # as a program in a clone imports it
  package = types.ModuleType("configs")
  package.__path__ = [str(FOLDER)]
  sys.modules["configs"] = package
  try:
    if _base is None:
      _base = importlib.import_module("configs.base")
    package.base = sys.modules["configs.base"] = _base
    package.__path__ = [*folders, str(FOLDER)]
    yield
  finally:
    _forgotten()
    sys.modules.update(others)


def _forgotten() -> dict[str, types.ModuleType]:
  """`configs` and what belongs to it, which then are imported no more."""
  names = [x for x in sys.modules if x.partition(".")[0] == "configs"]
  return {name: sys.modules.pop(name) for name in names}


def _of_users() -> list[str]:
  """Folders that `configs` may be elsewhere."""
  return [os.path.join(place, "configs") for place in sys.path]


def packaged() -> dict[str, pathlib.Path]:
  """The config files of this package, by name, such as "studies/learning"."""
  files = {
    path.relative_to(FOLDER).with_suffix("").as_posix(): path
    for path in sorted(FOLDER.rglob("*.py"))
  }
  return {
    name: path
    for name, path in files.items()
    if "def get_config(" in path.read_text("utf-8")
  }


def find(name: str) -> pathlib.Path | None:
  """A file by its path, or one of this package by its name alone."""
  path = pathlib.Path(name)
  return path if path.is_file() else packaged().get(name)


def load(name: str) -> Any:
  """What `get_config` of a file returns; of "FILE:TEXT" it is told the text.

  The file is as in `find`. Raises UserError, with the line, for a file that is
  not there, or fails.
  """
  name, *told = name.split(":", 1)
  if (file := find(name)) is None:
    bare = name.removesuffix(".py").rpartition("configs/")[2]
    near = difflib.get_close_matches(bare, packaged(), cutoff=_NEAR)
    advice = f"did you mean {' or '.join(near)}?" if near else "--help has some"
    raise errors.UserError(f"config file {name!r} does not exist; {advice}")
  path = str(file)
  folders = [] if file.is_relative_to(FOLDER) else _of_users()
  try:
    with importable(*folders):
      get_config = runpy.run_path(path).get("get_config")
      if get_config is None:
        raise errors.UserError("it has no function get_config")
      config = get_config(*told)
    if not getattr(config, "task", None):
      raise errors.UserError(
        f"get_config returns {type(config).__name__}, and no config with a "
        "task; see configs/base.py"
      )
    return config
  except (Exception, SystemExit) as error:  # whatever a program makes
    raise errors.UserError(
      f"config file {path}{_line(error, path)}: {_text(error)}"
    ) from error


def _of_users() -> list[str]:
  return [os.path.join(place, "configs") for place in sys.path]


def import_plugins(config: dict[str, Any]) -> None:
  """Imports the modules that `plugins` of a config, or of its parts, name.

  They are on Python's path, or in the current directory. Raises UserError, with
  the line, for one that is not there, or fails.
  """
  for name, value in config.items():
    if isinstance(value, dict):
      import_plugins(value)
    elif name == "plugins":
      for module in value:
        _import(module)


def _import(name: Any) -> None:
  may_be = isinstance(name, str) and not name.endswith(".py")
  if not may_be or not all(map(str.isidentifier, name.split("."))):
    raise errors.UserError(
      f"config.plugins names {name!r}, which is no module; name it as `import` "
      "does, such as my_module for my_module.py"
    )
  if name in sys.modules:
    return
  path = ""
  try:
    # A config file may be its own plugin: it imports `configs.base`.
    with importable(*_of_users()):
      found = importlib.util.find_spec(name)
      path = found.origin or "" if found else ""
      module = importlib.import_module(name)
    sys.modules[name] = module  # `importable` forgets one of a `configs`
  except (Exception, SystemExit) as error:  # whatever a program makes
    missing = getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and _is_within(name, missing):
      raise errors.UserError(
        f"config.plugins names {name!r}, and there is no module {missing!r} "
        f"in {os.getcwd()} or on Python's path; correct it, or set PYTHONPATH"
      ) from error
    raise errors.UserError(
      f"config.plugins: module {name}{_line(error, path)}: {_text(error)}"
    ) from error


def _is_within(name: str, package: str | None) -> bool:
  return f"{name}.".startswith(f"{package}.")


def _line(error: BaseException, path: str) -> str:
  if isinstance(error, SyntaxError) and error.filename == path:
    return f", line {error.lineno}"
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == path]
  return f", line {lines[-1]}" if lines else ""


def _text(error: BaseException) -> str:
  if isinstance(error, errors.UserError):
    return str(error)
  if isinstance(error, SyntaxError):
    return f"SyntaxError: {error.msg}"
  return f"{type(error).__name__}: {errors.first_line(error)}"


def check_key(path: str, value: str, config: dict[str, Any]) -> None:
  """Raises UserError for a key that a config does not have, or a group of them.

  It says which key may have been meant, wherever that is. Names are joined by
  dots, or stand in brackets. The value is what a command line gives it; a group
  may be given as a dictionary.
  """
  path = re.sub(r"""\[['"]?([^]'"]*)['"]?\]""", r".\1", path)
  group, parent, parts = config, "config", path.split(".")
  for part in parts:
    if not isinstance(group, dict):
      _refuse(path, f"{parent} is one, and has no others below it")
    if part not in group:
      break
    group, parent = group[part], f"{parent}.{part}"
  else:
    if isinstance(group, dict) and group and value and value[0] != "{":
      raise errors.UserError(
        f"{parent} is a group of keys; set one of {', '.join(sorted(group))}: "
        f"--{parent}.KEY={value}"
      )
    return
  if parent != "config" and not group:
    example = f'--{parent}="{{{parts[-1]!r}: {value}}}"'
    _refuse(path, f"{parent} is empty; give it as a whole, {example}")
  if meant := _meant(path, list(_paths(config))):
    keys = [f"config.{key}" for key in meant]
    _refuse(path, f"did you mean {' or '.join(keys)}?")
  _refuse(path, f"{parent} has {', '.join(sorted(group))}")


def _refuse(path: str, why: str) -> None:
  raise errors.UserError(f"config.{path} is no key; {why}")


def _paths(config: dict[str, Any]) -> Iterator[str]:
  """Of all groups and keys."""
  for name, value in config.items():
    yield str(name)
    if isinstance(value, dict):
      yield from (f"{name}.{path}" for path in _paths(value))


def _meant(path: str, known: list[str]) -> list[str]:
  """Those whose last name is nearest, the nearest path first; maybe none.

  A name may be a word of it, or its initials: "lr" is near "learning_rate". Of
  a name without a group it is up to three.
  """
  groups, _, name = path.rpartition(".")

  def likeness(other: str) -> float:
    last = other.rpartition(".")[2]
    words = last.split("_")
    if name == last:
      return 2.0
    if name in words or name == "".join(word[:1] for word in words) != "":
      return 1.0
    return difflib.SequenceMatcher(None, name, last).ratio()

  best = max(map(likeness, known), default=0.0)
  if best < _NEAR:
    return []
  of_path = lambda x: difflib.SequenceMatcher(None, path, x).ratio()
  near = [other for other in known if likeness(other) == best]
  return sorted(near, key=of_path, reverse=True)[: 1 if groups else 3]
