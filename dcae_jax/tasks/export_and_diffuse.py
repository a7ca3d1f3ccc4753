"""Exports latents, trains a diffusion model on them, and draws samples."""

from etils import epath
from ml_collections import ConfigDict

from dcae_jax.tasks import (
  evaluate_diffusion,
  export_latents,
  train_diffusion,
  wiring,
)
from dcae_jax.training import loop


def run(config: ConfigDict, workdir: epath.Path) -> bool:
  """Runs, or goes on with, the stages; False if SIGTERM ended it early.

  Each has its own work directory below `workdir`. Their numbers are checked
  before the first starts.
  """
  sigterm = loop.Sigterm()
  config = chained(config, workdir)
  wiring.check_work_directory(config, workdir)
  export_latents.check(config.export)
  train_diffusion.check(config.training)
  evaluate_diffusion.check(config.samples)
  wiring.write_config(config, workdir)
  return (
    export_latents.run(config.export, workdir / "export")
    and train_diffusion.run(config.training, workdir / "training", sigterm)
    and evaluate_diffusion.run(config.samples, workdir / "samples", sigterm)
  )


def chained(config: ConfigDict, workdir: epath.Path) -> ConfigDict:
  """The config with each stage starting from the one before."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    store = config.export.output or str(workdir / "latents")
    config.export.output = store
    config.training.latents = store
    config.samples.init_from = str(workdir / "training")
    config.samples.picture.latents = store
  return config
