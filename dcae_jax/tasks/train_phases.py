"""Trains all three phases, one after the other, and reports on them."""

import itertools
import json
import os

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.runs import exclusive, metrics_writer, places, work_directory
from dcae_jax.setup import autoencoder_training, keys, models, start
from dcae_jax.tasks import report, train_autoencoder
from dcae_jax.training import loop

_PHASES = ("phase1", "phase2", "phase3")


def run(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm | None = None
) -> bool:
  """Runs, or goes on with, the phases; False if SIGTERM ended it early.

  Each phase has its own work directory below `workdir`, and starts from the one
  before. All configs are checked before the first phase starts. `result.json`
  holds those of the phases, by name.
  """
  sigterm = sigterm or loop.Sigterm()
  keys.check(config)
  config = chained(config, workdir)
  for name in _PHASES:
    config[name] = keys.for_device(config[name], jax.default_backend())
  with_model = models.with_model(config.phase1)
  model = models.identity(keys.resolved(with_model.model))
  with config.unlocked():
    for name in _PHASES:
      if not config[name].model.variant:
        config[name].model.update(model._asdict())
  start.check_work_directory(config, workdir)
  work_directory.check_nothing_foreign(workdir, ())
  trainings = {}
  for name in _PHASES:
    is_first = name == _PHASES[0]
    with errors.renamed("config.", f"config.{name}."):
      trainings[name] = autoencoder_training.build(
        config[name], predecessor_is_pending=not is_first
      )
      trainings[name].check_machine()
      start.check_work_directory(config[name], workdir / name)
    models.check_same(model, config[name].model, "phase1")
  with errors.renamed("config.", "config.report."):
    report.check(config.report, runs_are_pending=True)
    models.check_resolutions(
      config.report.resolutions, config.phase1.model, "config.resolutions"
    )
  for name, training in trainings.items():
    with errors.renamed("config.", f"config.{name}."):
      inputs = train_autoencoder.open_inputs(config[name], workdir / name)
      train_autoencoder.held_out_images(training, inputs)
  if jax.process_index() == 0:
    work_directory.begin_anew(workdir, ())
  start.write_config(config, workdir)
  for name in _PHASES:
    with (
      errors.renamed("config.", f"config.{name}."),
      exclusive.held(str(workdir / name)),
    ):
      finished = train_autoencoder.run(config[name], workdir / name, sigterm)
    if not finished or sigterm.received:
      return False
  with errors.renamed("config.", "config.report."):
    report.run(config.report, workdir / "report")
  results = {
    name: json.loads((workdir / name / "result.json").read_text())
    for name in _PHASES
  }
  metrics_writer.write_json(workdir / "result.json", results)
  return True


def chained(config: ConfigDict, workdir: epath.Path) -> ConfigDict:
  """The config with each phase starting from the one before."""
  config = config.copy_and_resolve_references()
  workdir = epath.Path(places.absolute(os.fspath(workdir)))
  with config.unlocked():
    for before, name in itertools.pairwise(_PHASES):
      config[name].init_from = str(workdir / before)
    for name in _PHASES:
      config.report.runs[name] = str(workdir / name)
    for name in (*_PHASES, "report"):
      config[name].plugins = config[name].plugins or config.plugins
  return config
