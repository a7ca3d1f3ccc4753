"""Exports latents, trains a diffusion model on them, and draws samples.

A model of captions learns from states of a text encoder, which are kept first.
Samples are compared with the images that were exported, unless the config names
other statistics.
"""

import contextlib
import math
import os

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.runs import exclusive, metrics_writer, places, work_directory
from dcae_jax.setup import (
  denoising,
  diffusion_training,
  exporting,
  image_sources,
  keys,
  metric_networks,
  models,
  start,
)
from dcae_jax.tasks import (
  encode_captions,
  evaluate_diffusion,
  export_latents,
  reference_statistics,
  train_diffusion,
)
from dcae_jax.training import loop


def run(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm | None = None
) -> bool:
  """Runs, or goes on with, the stages; False if SIGTERM ended it early.

  Each has its own work directory below `workdir`. All are checked before the
  first starts. The `result.json` of the last one is this one's, too.
  """
  sigterm = sigterm or loop.Sigterm(each_alone=True)
  keys.check(config)
  with _part("export"):
    exporting.check(config.export)
  metrics = evaluate_diffusion.open_metrics(config.samples)
  config = chained(config, workdir, metrics)
  config.training = keys.for_device(config.training, jax.default_backend())
  trained = check(config, metrics)
  start.check_work_directory(config, workdir)
  work_directory.check_nothing_foreign(workdir, ())
  start.check_work_directory(trained, workdir / "training")
  work_directory.begin_anew(workdir, ())
  start.write_config(config, workdir)
  stages = {
    "export": (export_latents.run, config.export),
    "reference": (_describe_reference, config.reference),
    "encoding": (encode_captions.run, config.captions),
    "training": (train_diffusion.run, config.training),
    "samples": (evaluate_diffusion.run, config.samples),
  }
  if not config.reference.networks:
    del stages["reference"]
  if not denoising.conditioning_of(config.training.model).is_text:
    del stages["encoding"]
  parts = {"encoding": "captions"}
  for name, (run_stage, stage) in stages.items():
    with _part(parts.get(name, name)), exclusive.held(str(workdir / name)):
      finished = run_stage(stage, workdir / name, sigterm)
    if not finished or sigterm.received:
      return False
  result = (workdir / "samples" / "result.json").read_bytes()
  metrics_writer.write_whole(workdir / "result.json", result)
  return True


def _part(name: str) -> contextlib.AbstractContextManager:
  """Messages within are about the keys of a stage."""
  return errors.renamed("config.", f"config.{name}.")


def _describe_reference(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm
) -> bool:
  """Once: statistics with the same config are kept."""
  before, result = workdir / "config.json", workdir / "result.json"
  if before.exists():
    now = keys.resolved(config)
    is_same = work_directory.read_config_as_now(before, now) == now
    if is_same and result.exists():
      return True
    result.unlink(missing_ok=True)
  return reference_statistics.run(config, workdir, sigterm)


def check(config: ConfigDict, metrics: metric_networks.Opened) -> ConfigDict:
  """The training's config, with the numbers that latents will have."""
  if jax.process_count() > 1:
    raise errors.UserError(
      "export_and_diffuse runs in one process; on a pod, run export_latents, "
      "train_diffusion and evaluate_diffusion one after the other"
    )
  if config.export.max_aspect_ratio > 1:
    raise errors.UserError(
      f"config.export.max_aspect_ratio={config.export.max_aspect_ratio}: "
      "export_and_diffuse exports squares; run export_latents and "
      "train_diffusion one after the other, or set it to 1"
    )
  path, shape = config.training.latents, exporting.latent_shape(config.export)
  with _part("samples"):
    evaluate_diffusion.check(config.samples)
  with _part("export"):
    classes = exporting.open_source(config.export).classes
  with _part("training"):
    diffusion_training.check(config.training)
    trained = denoising.with_numbers(
      config.training, path, shape, np.zeros(0, np.int32), classes
    )
    diffusion_training.build(trained).check_machine()
  for path in (config.training.autoencoder, config.samples.autoencoder):
    if path:
      models.identity_of(path)
  channels = models.identity_of(config.export.init_from).image_channels
  pixels = config.export.resolution**2 * channels
  with _part("samples"):
    evaluate_diffusion.check_memory(config.samples, math.prod(shape), pixels)
    evaluate_diffusion.open_model(config.samples, keys.resolved(trained))
  if config.reference.networks:
    _check_reference(config)
  else:
    evaluate_diffusion.open_references(config.samples, metrics)
  return trained


def _check_reference(config: ConfigDict) -> None:
  """Raises UserError if samples cannot be compared with what is exported."""
  if config.export.source.kind == "npy":
    raise errors.UserError(
      f"config.samples.metrics={config.samples.metrics} compare with images, "
      "and config.export.source is of latents; name config.samples.reference"
    )
  reference_statistics.check(config.reference)
  image_sources.single_source(config.reference.source)


def chained(
  config: ConfigDict, workdir: epath.Path, metrics: metric_networks.Opened
) -> ConfigDict:
  """The config with each stage starting from the one before."""
  config = config.copy_and_resolve_references()
  workdir = epath.Path(places.absolute(os.fspath(workdir)))
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
    own = metric_networks.compared(metrics.metrics)
    if config.samples.reference:
      own = {}
    elif own:
      name = f"{{network}}_{config.export.resolution}px.npz"
      config.samples.reference = str(workdir / "reference" / name)
    config.reference.networks = tuple(own)
    config.reference.resolutions = (config.export.resolution,)
    config.reference.weights = config.samples.weights
    for key in ("source", "max_images", "min_size", "max_megapixels"):
      config.reference[key] = config.export[key]
    config.samples.init_from = str(workdir / "training")
    config.samples.picture.latents = store
    for stage in ("export", "captions", "reference", "training", "samples"):
      config[stage].plugins = config[stage].plugins or config.plugins
  return config
