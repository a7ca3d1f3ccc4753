"""The work directory of a run: its config, and what else is in it.

It is the interface between stages: what a run has left there is all that the
next one needs.
"""

import json
import os
from typing import Any

from etils import epath

from dcae_jax import errors
from dcae_jax.runs import regular_files


def is_run(path: str) -> bool:
  """Whether it is the work directory of a run, finished or not."""
  if not path or (":/" in path and not path.startswith("gs://")):
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


def read_config(path: epath.Path) -> dict[str, Any]:
  """The contents of a `config.json`; raises UserError if it is damaged."""
  regular_files.checked(path)
  try:
    config = json.loads(path.read_bytes())
  except ValueError as error:
    raise errors.UserError(
      f"{path} is damaged ({error}); bring it back"
    ) from error
  if not isinstance(config, dict) or "task" not in config:
    raise errors.UserError(
      f"{path} is not the config of a run; choose another directory"
    )
  return config


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
