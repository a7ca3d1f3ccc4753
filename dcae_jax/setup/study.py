"""The cells of a study: the configs of its arms, with each seed."""

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.evaluation.report import study_report
from dcae_jax.runs import (
  differences,
  metrics_writer,
  places,
  regular_files,
  work_directory,
)
from dcae_jax.setup import autoencoder_training, keys, models

TASKS = (
  "train_autoencoder", "train_phases", "train_diffusion", "export_and_diffuse",
  "throughput",
)  # fmt: skip
_TRAININGS = ("train_autoencoder", "train_diffusion")
_RECORD = "cell.json"  # of a finished cell, written last
_NAME = r"[\w+-]+"


@dataclasses.dataclass(frozen=True)
class Cell:
  """An arm with a seed: a run in a work directory of its own.

  Attributes:
    arm: its name.
    seed: of the run.
    config: of the run.
    workdir: of the run.
    before: names of the cells of the same study that it starts from.
  """

  arm: str
  seed: int
  config: ConfigDict
  workdir: epath.Path
  before: frozenset[str]

  @property
  def name(self) -> str:
    return f"{self.arm}/{self.seed}"

  def record(self) -> dict[str, Any] | None:
    """What `finish` has kept; None for a cell that is not finished."""
    kept = self._kept()
    return kept if kept.get("config") == self._fingerprint() else None

  def _kept(self) -> dict[str, Any]:
    """The record, maybe of an earlier config; empty if there is none."""
    path = self.workdir / _RECORD
    if path.exists():
      with contextlib.suppress(ValueError):  # damaged, it says nothing
        return json.loads(regular_files.checked(path).read_text())
    return {}

  def check_goes_on(self) -> None:
    """Raises UserError where a training would keep what is not of its config.

    It does not take steps back, and what is finished is not evaluated again.
    """
    path = self.workdir / "config.json"
    if self.config.task not in _TRAININGS or not path.exists():
      return
    config = keys.for_device(self.config, jax.default_backend())
    now = keys.resolved(config)
    before = work_directory.read_config_as_now(path, now)
    kept = [
      text
      for key, text in differences.differences(before, now).items()
      if key == "steps" or key.startswith("evaluation.")
    ]
    is_finished = (self.workdir / "result.json").exists()
    is_longer = config.steps > before["steps"]
    is_shorter = config.steps < before["steps"]
    if kept and not is_longer and (is_shorter or is_finished):
      raise errors.UserError(
        f"{self.workdir} has results of another config ({'; '.join(kept)}); "
        "delete it, or take the same config"
      )

  def finish(self, seconds: float, **facts: Any) -> None:
    """Keeps facts about the finished run; seconds add to those before."""
    facts["seconds"] = seconds + self._kept().get("seconds", 0.0)
    facts["config"] = self._fingerprint()
    metrics_writer.write_json(self.workdir / _RECORD, facts)

  def _fingerprint(self) -> str:
    """Of the config, wherever the study lies."""
    text = json.dumps(keys.resolved(self.config), sort_keys=True)
    study = places.absolute(os.fspath(self.workdir.parents[2]))
    text = text.replace(f'"{study}/cells/', '"{study}/cells/')
    return hashlib.sha256(text.encode()).hexdigest()


def cells(config: ConfigDict, workdir: epath.Path) -> list[Cell]:
  """All cells, seed by seed, in the order of the arms.

  Raises UserError for what cannot be run.
  """
  check(config)
  path = places.absolute(config.start_from or os.fspath(workdir))
  study = epath.Path(path)
  made = []
  for seed in config.seeds:
    for arm in keys.resolved(config)["arms"]:  # ConfigDict sorts them
      filled = of_arm(config, arm)
      _fill(filled, seed, str(study))
      own = workdir / "cells" / arm / str(seed)
      before = _cells_within(filled, study)
      made.append(Cell(arm, seed, filled, own, frozenset(before)))
  if config.start_from:
    for name in sorted(set().union(*(cell.before for cell in made))):
      if not (study / "cells" / name / _RECORD).exists():
        raise errors.UserError(
          f"cell {name} of the study {study}, which cells of this one start "
          "from, is not finished; run that study first"
        )
    made = [dataclasses.replace(cell, before=frozenset()) for cell in made]
  names = {cell.name for cell in made}
  for cell in made:
    if unknown := cell.before - names:
      raise errors.UserError(
        f"cell {cell.name} starts from {sorted(unknown)[0]}, which is no cell "
        "of this study; set config.start_from to the study that has it"
      )
    keys.check(cell.config)
    if cell.seed == config.seeds[0] and not cell.before:
      _check_run(cell)
  return made


def check(config: ConfigDict) -> None:
  """Raises UserError for arms, seeds and pairs that cannot be."""
  keys.check(config)
  task = config.base.get("task")
  if task not in TASKS:
    raise errors.UserError(
      f"config.base is of the task {task!r}; studies are of {', '.join(TASKS)}"
    )
  if not config.arms or not config.measures:
    raise errors.UserError(
      "config.arms and config.measures must not be empty; name what is "
      "compared, and the numbers of result.json that are compared"
    )
  seeds = config.seeds
  are_numbers = all(type(seed) is int and seed >= 0 for seed in seeds)
  if not seeds or not are_numbers or len(set(seeds)) < len(seeds):
    raise errors.UserError(
      f"config.seeds={seeds} are not different whole numbers from 0 on"
    )
  for name, path in config.measures.items():
    if not isinstance(path, str):
      raise errors.UserError(
        f"config.measures.{name}={path!r} is no path of result.json"
      )
  if config.compare not in study_report.COMPARISONS:
    raise errors.UserError(
      f"config.compare={config.compare!r} is unknown; known are "
      f"{', '.join(study_report.COMPARISONS)}"
    )
  _check_names(config)


def _check_names(config: ConfigDict) -> None:
  """Of arms and measures, wherever they stand."""
  for arm in config.arms:
    if not re.fullmatch(_NAME, arm):
      raise errors.UserError(
        f"config.arms names {arm!r}; use letters, digits, _, + and -"
      )
  for pair in config.pairs:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
      raise errors.UserError(f"config.pairs has {pair!r}, which is no two arms")
  for name, by_arm in config.published.items():
    if not isinstance(by_arm, ConfigDict):
      raise errors.UserError(
        f"config.published.{name}={by_arm!r} has no numbers by arm"
      )
  of_arms = {
    "pairs": itertools.chain(*config.pairs),
    "figure.lines": itertools.chain(*config.figure.lines.values()),
    "published": itertools.chain(*config.published.values()),
  }
  of_measures = {"figure.over_steps": config.figure.over_steps}
  for known, what, uses in (
    (config.arms, "arm", of_arms),
    (config.measures, "measure", of_measures),
  ):
    for key, names in uses.items():
      for name in names:
        if name not in known:
          raise errors.UserError(
            f"config.{key} names {name!r}, which is no {what}; they are "
            f"{', '.join(known)}"
          )


def _check_run(cell: Cell) -> None:
  """Builds what can be built before other cells are there."""
  if cell.config.task == "train_autoencoder":
    config = keys.for_device(cell.config, jax.default_backend())
    try:
      autoencoder_training.build(models.with_model(config))
    except errors.UserError as error:
      raise errors.UserError(f"arm {cell.arm}: {error}") from error


def of_arm(config: ConfigDict, arm: str) -> ConfigDict:
  """The config of its runs; UserError for a change of a key that is none."""
  changed = copy.deepcopy(config.base)
  keys.change(changed, config.arms[arm], f"config.arms.{arm}")
  changed.plugins = changed.plugins or config.plugins
  return changed.copy_and_resolve_references()


def _fill(config: ConfigDict, seed: int, study: str) -> None:
  """Puts the seed, and the work directory to start from, where they belong."""
  texts = {"{seed}": str(seed), "{study}": study}

  def filled(value):
    if isinstance(value, str):
      for name, text in texts.items():
        value = value.replace(name, text)
    if isinstance(value, tuple):
      return tuple(map(filled, value))
    return value

  with config.unlocked():
    for key, value in config.items():
      if isinstance(value, ConfigDict):
        _fill(value, seed, study)
      else:
        config[key] = seed if key == "seed" else filled(value)


def _cells_within(config: ConfigDict, study: epath.Path) -> Iterator[str]:
  """Names of the cells of a study that texts of a config are paths of."""
  cell = re.compile(rf"{re.escape(str(study))}/cells/({_NAME}/\d+)(/|$)")
  for value in differences.flat(config.to_dict()).values():
    for text in value if isinstance(value, tuple) else (value,):
      if isinstance(text, str) and (match := cell.match(text)):
        yield match[1]


def report(config: ConfigDict, all_cells: list[Cell]) -> study_report.Study:
  """The study with what its finished cells have reached."""
  plain = keys.resolved(config)  # in the order of the config file
  arms = {
    arm: study_report.Arm(changes, {}, {}, {})
    for arm, changes in plain["arms"].items()
  }
  for cell in all_cells:
    record = cell.record()
    if record is not None:
      arm = arms[cell.arm]
      arm.records[cell.seed] = record
      arm.results[cell.seed] = _result(cell.workdir)
      arm.lines[cell.seed] = metrics_writer.read_lines(
        cell.workdir / "metrics.jsonl"
      )
  return study_report.Study(
    config.title,
    arms,
    tuple(config.seeds),
    plain["measures"],
    tuple(map(tuple, config.pairs)),
    config.compare,
    study_report.Figure(**plain["figure"]),
    plain["published"],
    plain["base"],
  )


def _result(workdir: epath.Path) -> dict[str, float]:
  """The numbers of `result.json`, by path."""
  path = workdir / "result.json"
  result = work_directory.read_result(path, {})
  return {
    path: float(value)
    for path, value in differences.flat(result, separator="/").items()
    if isinstance(value, int | float)
  }
