"""Exports latents, trains a diffusion model on them, and draws samples.

A model of captions learns from states of a text encoder, which are kept first.
"""

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.setup import (
  denoising,
  diffusion_training,
  exporting,
  keys,
  models,
  start,
)
from dcae_jax.tasks import (
  encode_captions,
  evaluate_diffusion,
  export_latents,
  train_diffusion,
)
from dcae_jax.training import loop


def run(config: ConfigDict, workdir: epath.Path) -> bool:
  """Runs, or goes on with, the stages; False if SIGTERM ended it early.

  Each has its own work directory below `workdir`. All are checked before the
  first starts.
  """
  config = chained(config, workdir)
  config.training = keys.for_device(config.training, jax.default_backend())
  trained = check(config)
  start.check_work_directory(config, workdir)
  start.check_work_directory(trained, workdir / "training")
  start.write_config(config, workdir)
  sigterm = loop.Sigterm(each_alone=True)
  stages = [
    (export_latents.run, config.export, "export"),
    (encode_captions.run, config.captions, "encoding"),
    (train_diffusion.run, config.training, "training"),
    (evaluate_diffusion.run, config.samples, "samples"),
  ]
  if not denoising.conditioning_of(config.training.model).is_text:
    del stages[1]
  for run_stage, stage, name in stages:
    finished = run_stage(stage, workdir / name, sigterm)
    if not finished or sigterm.received:
      return False
  return True


def check(config: ConfigDict) -> ConfigDict:
  """The training's config, with the numbers that latents will have."""
  if jax.process_count() > 1:
    raise errors.UserError(
      "export_and_diffuse runs in one process; on a pod, run export_latents, "
      "train_diffusion and evaluate_diffusion one after the other"
    )
  exporting.check(config.export)
  keys.check(config.captions)
  diffusion_training.check(config.training)
  evaluate_diffusion.check(config.samples)
  path, shape = config.training.latents, exporting.latent_shape(config.export)
  classes = exporting.open_source(config.export).classes
  trained = denoising.with_numbers(
    config.training, path, shape, np.zeros(0, np.int32), classes
  )
  diffusion_training.build(trained)
  for path in (config.training.autoencoder, config.samples.autoencoder):
    if path:
      models.identity_of(path)
  evaluate_diffusion.open_model(config.samples, keys.resolved(trained))
  evaluate_diffusion.open_metrics(config.samples)
  return trained


def chained(config: ConfigDict, workdir: epath.Path) -> ConfigDict:
  """The config with each stage starting from the one before."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    store = config.export.output or str(workdir / "latents")
    config.export.output = store
    config.training.latents = config.captions.latents = store
    if denoising.conditioning_of(config.training.model).is_text:
      states = config.captions.output or str(workdir / "captions")
      config.training.text.cache = config.captions.output = states
      config.captions.text = {
        key: config.training.text[key] for key in config.captions.text
      }
    config.samples.init_from = str(workdir / "training")
    config.samples.picture.latents = store
  return config
