"""The work directory of a run: its config, and what else is in it.

It is the interface between stages: what a run has left there is all that the
next one needs.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from dcae_jax import errors
from dcae_jax.runs import json_types, places, regular_files, storage

WRITTEN_IN = "workdir"  # a key of config.json
_TRAINING = {"steps": int, "evaluation?": dict}
_OF_AUTOENCODER = _TRAINING | {
  "model": {
    "variant": str, "architecture?": dict, "image_channels": int,
    "residual_autoencoding": bool, "dtype": str,
  },
}  # fmt: skip
_OF_DIFFUSION = _TRAINING | {
  "model": {"variant": str, "architecture?": dict},
  "objective": {"kind": str},
}
_OF_ALL = {f"{WRITTEN_IN}?": str, "plugins?": [str]}
_TYPES = {  # of what is read of a config.json without `configs/base.py`
  "train_autoencoder": _OF_AUTOENCODER,
  "train_diffusion": _OF_DIFFUSION,
  "train_phases": {f"phase{i}": _OF_AUTOENCODER for i in (1, 2, 3)},
  "export_and_diffuse": {"training": _OF_DIFFUSION},
}


def is_run(path: str) -> bool:
  """Whether it is the work directory of a run, finished or not.

  Raises OSError for a bucket that is not there, or must not be read.
  """
  if path.startswith("gs://"):
    data = storage.Storage(path).read("config.json")
    return data is not None and b'"task"' in data
  if not path or ":/" in path:
    return False
  config = epath.Path(os.path.expanduser(path)) / "config.json"
  return (
    config.is_file() and b'"task"' in regular_files.checked(config).read_bytes()
  )


def read_run_config(
  run: str, task: str = "train_autoencoder"
) -> dict[str, Any]:
  """The config of an earlier run of a task.

  Raises UserError if there is no such run, or it has no checkpoint yet.
  """
  path = epath.Path(run).expanduser()
  if not (path / "config.json").exists():
    raise errors.UserError(
      f"{run!r} is not the work directory of an earlier run: it has no "
      "config.json; train it first, or correct the path"
    )
  config = read_config(path / "config.json")
  if config["task"] == "train_phases":
    raise errors.UserError(
      f"{run!r} holds the runs of three phases; name one of them, such as "
      f"{str(path / 'phase3')!r}"
    )
  if config["task"] != task:
    raise errors.UserError(
      f"{run!r} is the work directory of {config['task']!r}; name that of a "
      f"run of {task!r}"
    )
  if task == "train_autoencoder" and "architecture" not in config["model"]:
    raise errors.UserError(
      f"{run!r} is a run of an earlier version; train it again"
    )
  steps = path / "checkpoints"
  names = [entry.name for entry in steps.iterdir()] if steps.exists() else []
  if not any(name.isdigit() for name in names):
    raise errors.UserError(
      f"{run!r} has no finished checkpoint; let that run go on"
    )
  return config


@contextlib.contextmanager
def naming_plugins(run: str, config: dict[str, Any]) -> Iterator[None]:
  """Messages from within name the modules that a run of a config needs.

  Nothing that a folder names is imported because it says so.
  """
  try:
    yield
  except errors.UserError as error:
    missing = [x for x in config.get("plugins", ()) if x not in sys.modules]
    if not missing:
      raise
    raise errors.UserError(
      f"{error}; {run!r} was made with modules of its own: first import "
      f"{', '.join(missing)}, in commands by --config.plugins="
      f"{','.join(missing)}"
    ) from error


def read_config(path: epath.Path) -> dict[str, Any]:
  """The contents of a `config.json`; raises UserError if it is damaged.

  Paths that have moved together with the run are where they are now.
  """
  config, written_in = _read(path)
  workdir = os.fspath(path.parent)
  return places.mapped(config, lambda x: places.found(x, workdir, written_in))


def read_config_as_now(path: epath.Path, now: dict[str, Any]) -> dict[str, Any]:
  """The same, with the paths of a config of now where they mean the same."""
  config, written_in = _read(path)
  return places.as_now(config, now, os.fspath(path.parent), written_in)


def _read(path: epath.Path) -> tuple[dict[str, Any], str]:
  """The config, and the work directory that it was written in, or ""."""
  name, advice = os.fspath(path), "bring it back, or choose another directory"
  data = regular_files.checked(path).read_bytes()
  config = json_types.parsed(name, data, {"task": str}, advice)
  types = _TYPES.get(config["task"], {}) | _OF_ALL
  json_types.check(name, config, types, advice)
  return config, config.pop(WRITTEN_IN, "")


def read_result(path: epath.Path, types: dict[str, Any]) -> dict[str, Any]:
  """The contents of a `result.json`; UserError for what has other types."""
  advice = "remove it, and run again what wrote it"
  data = regular_files.checked(path).read_bytes()
  return json_types.parsed(os.fspath(path), data, types, advice)


def check_nothing_foreign(workdir: epath.Path, names: tuple[str, ...]) -> None:
  """Raises UserError where a task would write over what no task wrote."""
  if (workdir / "config.json").exists():
    return
  for name in (*names, "result.json"):
    if (workdir / name).exists():
      raise errors.UserError(
        f"--workdir={workdir} holds {name} of something else; choose another "
        "directory"
      )


def begin_anew(workdir: epath.Path, names: Sequence[str]) -> None:
  """Removes the result of an earlier start, or what a kill has left of one.

  `result.json` goes first, and is written last: without it, readers know that
  what they see is unfinished. Names may be patterns; they go in their order.
  """
  (workdir / "result.json").unlink(missing_ok=True)
  if not workdir.exists():
    return
  temporary = (f".{x}.*.tmp" for x in (*names, "config.json", "result.json"))
  for name in (*names, *temporary):
    for path in workdir.glob(name):
      if path.is_dir():
        path.rmtree()
      else:
        path.unlink()
