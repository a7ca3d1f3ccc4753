"""Trains an autoencoder through one phase (DC-AE, section 3.2).

Everything that can be wrong with the config, the data, the weights or the disk
is found before anything is compiled or written.
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.autoencoder import families
from dcae_jax.data import batches as batches_lib
from dcae_jax.data import images, sources
from dcae_jax.evaluation import latent_change
from dcae_jax.evaluation import metrics as metrics_table
from dcae_jax.evaluation.networks import lpips, pretrained
from dcae_jax.evaluation.report import figures, text_table
from dcae_jax.runs import (
  json_types,
  metrics_writer,
  processes,
  work_directory,
)
from dcae_jax.setup import (
  autoencoder_training,
  floor,
  image_sources,
  keys,
  measuring,
  metric_networks,
  models,
  start,
  training_run,
)
from dcae_jax.training import checkpoint, freezing, loop, sharding

_LOG = logging.getLogger(__name__)
_RESULT = {"step": int, "images_skipped": int, "*": json_types.NUMBER}


class Inputs(NamedTuple):
  """What a run reads, opened: sources, decodings, weights of networks."""

  training: list[tuple[sources.Source, float]]
  held_out: sources.Source
  training_decoding: images.Decoding
  held_out_decoding: images.Decoding
  perceptual_parameters: Any
  metrics: metric_networks.Opened


def open_inputs(
  config: ConfigDict, workdir: epath.Path | None = None
) -> Inputs:
  """Opens what the run reads, see `image_sources` for the work directory.

  Raises UserError for a source without a usable image, or missing weights.
  """
  c = config
  channels, limit = c.model.image_channels, c.data.max_megapixels
  parameters = {}
  if c.lpips.weight:
    try:
      parameters = lpips.load_parameters(c.lpips.network, c.lpips.path)
    except pretrained.AbsentWeightsError as error:
      raise errors.UserError(
        f"{error}, or name a copy with --config.lpips.path=FILE, or train "
        "without LPIPS with --config.lpips.weight=0"
      ) from error
  with errors.renamed("config.source", "config.data.source"):
    training = image_sources.weighted_sources(
      c.data.source, workdir, c.data.min_size
    )
  with errors.renamed("config.source", "config.evaluation.source"):
    held_out = image_sources.single_source(c.evaluation.source, workdir)
  inputs = Inputs(
    training,
    held_out,
    images.Decoding(channels, c.data.min_size, limit, c.data.shorter_side),
    images.Decoding(channels, max_megapixels=limit),
    parameters,
    metric_networks.open_all(c.evaluation.metrics),
  )
  for source, _ in inputs.training:
    images.check_not_empty(source, inputs.training_decoding)
  images.check_not_empty(inputs.held_out, inputs.held_out_decoding)
  return inputs


def run(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm | None = None
) -> bool:
  """Runs, or goes on with, one phase; False if SIGTERM ended it early."""
  sigterm = sigterm or loop.Sigterm()
  keys.check(config)
  config = keys.for_device(config, jax.default_backend())
  config = models.with_model(config)
  training = autoencoder_training.build(config)
  training.check_machine()
  start.begin(config, workdir, ("metrics.jsonl", "checkpoints", "samples"))
  inputs = open_inputs(config, workdir)
  checkpoint.check_space(workdir, training.abstract, config.checkpoint.keep)
  _LOG.info(
    "%s, %d held-out images", training.description(), len(inputs.held_out)
  )
  batches = _batches(training, inputs)
  held_out = held_out_images(training, inputs)

  def finish(step, state):
    is_first = jax.process_index() == 0
    result = _finished(workdir, step) if is_first else {}
    if not processes.total(len(result)):
      others = _floor(training, inputs, held_out)
      others |= _latent_change(training, state.ema, held_out)
      skipped = processes.total(len(batches.skipped) + len(held_out.skipped))
      if is_first:
        result = others | _result(workdir, step, skipped, training)
    if is_first:
      _finish(config, workdir, result)

  perceptual_parameters = jax.device_put(
    inputs.perceptual_parameters, sharding.replicated(training.mesh)
  )
  work = training_run.Work(
    batches,
    lambda batch: sharding.put_images(batch["images"], training.mesh),
    (perceptual_parameters,),
    _evaluate(training, inputs.metrics, held_out),
    config.evaluation.every,
    functools.partial(_check_as_many_images, config.evaluation.max_images),
    finish,
  )
  return training_run.run(training, work, workdir, sigterm)


def held_out_images(
  training: autoencoder_training.Training, inputs: Inputs
) -> measuring.EvaluationImages:
  """What is evaluated during training; UserError where memory is short."""
  return measuring.EvaluationImages(
    inputs.held_out,
    inputs.held_out_decoding,
    training.mesh,
    training.config.evaluation,
    training.config.data.threads,
  )


def _cropping(config: ConfigDict) -> images.Cropping:
  c = config.data
  return images.Cropping(c.crop, config.resolution, c.min_area, c.flip)


def _batches(
  training: autoencoder_training.Training, inputs: Inputs
) -> images.TrainingImages:
  config, c = training.config, training.config.data
  return images.TrainingImages(
    inputs.training,
    inputs.training_decoding,
    _cropping(config),
    batches_lib.Reading(
      config.batch_size // jax.process_count(),
      jax.process_index(),
      jax.process_count(),
      c.workers,
      c.threads,
    ),
    seed=config.seed,
    cache_megabytes=c.cache_megabytes,
    shapes=training.shapes,
  )


def _evaluate(
  training: autoencoder_training.Training,
  metrics: metric_networks.Opened,
  held_out: measuring.EvaluationImages,
) -> Callable[..., dict[str, float]]:
  """Measures the averages, and writes a picture, at each resolution."""
  config = training.config
  measurement = measuring.measurement(
    training.autoencoder,
    metrics,
    training.mesh,
    samples=config.evaluation.samples,
  )

  def evaluate(step, state, writer):
    values = {}
    for resolution, prefix in _prefixes(config, "eval").items():
      batches = held_out.batches(resolution)
      measured = measurement.measure(state.ema, batches)
      values |= {f"{prefix}/{k}": v for k, v in measured.metrics.items()}
      values[f"{prefix}/images"] = measured.count
      picture = figures.grid(measured.rows)
      writer.image(step, f"reconstructions_{resolution}px", picture)
    return values

  return evaluate


def _check_as_many_images(
  most: int, before: Mapping[str, float], now: Mapping[str, float]
) -> None:
  """Raises UserError where fewer images are measured than the last time.

  Unless it is asked for by `max_images`.
  """
  for key, count in now.items():
    wanted = min(before.get(key, 0), most or math.inf)
    if key.endswith("/images") and count < wanted:
      raise errors.UserError(
        f"{key} is {count:.0f} at step {now['step']}, and was "
        f"{before[key]:.0f} at step {before['step']}: they cannot be compared; "
        "bring the missing images back, and run again"
      )


def _prefixes(config: ConfigDict, part: str) -> dict[int, str]:
  """Of the names of metrics, by resolution."""
  first, *others = config.evaluation.resolutions
  return {first: part} | {side: f"{part}/{side}px" for side in others}


def _floor(
  training: autoencoder_training.Training,
  inputs: Inputs,
  held_out: measuring.EvaluationImages,
) -> dict[str, float]:
  """What block PCA reaches on the held-out images; nothing where it cannot."""
  config = training.config
  variant = families.of_model(
    config.model.variant, config.model.architecture.to_dict()
  )
  try:
    fitted = floor.fit(
      floor.Material(
        inputs.training, inputs.training_decoding, _cropping(config)
      ),
      variant.spatial_compression,
      variant.latent_channels,
      config.evaluation.resolutions,
      threads=config.data.threads,
    )
  except ValueError as error:
    _LOG.warning("the run has no floor beside it: %s", error)
    return {}
  measurement = measuring.measurement(
    fitted, inputs.metrics, training.mesh, samples=1
  )
  variables = measuring.on_mesh(fitted.variables, training.mesh)
  values = {}
  for resolution, prefix in _prefixes(config, "floor").items():
    measured = measurement.measure(variables, held_out.batches(resolution))
    values |= {f"{prefix}/{k}": v for k, v in measured.metrics.items()}
    del values[f"{prefix}/latent_rms"]
  return values


def _latent_change(
  training: autoencoder_training.Training,
  averages: Any,
  held_out: measuring.EvaluationImages,
) -> dict[str, float]:
  """Since `init_from`; nothing without it, or where it is no longer there."""
  if not training.config.init_from:
    return {}
  try:
    before = training.averages_before()
  except (errors.UserError, OSError) as error:
    _LOG.warning("the change of the latents is not known: %s", error)
    return {}
  change = latent_change.relative(
    functools.partial(training.autoencoder.apply, method="encode"),
    before,
    averages,
    held_out.batches(training.config.evaluation.resolutions[0]),
    sharding.replicated(training.mesh),
  )
  return {"latent_change": change}


def _finished(workdir: epath.Path, step: int) -> dict[str, float]:
  """The result of a run that had ended at this step before; else nothing."""
  path = workdir / "result.json"
  if not path.exists():
    return {}
  result = work_directory.read_result(path, _RESULT)
  return result if result["step"] == step else {}


def _result(
  workdir: epath.Path,
  step: int,
  skipped: int,
  training: autoencoder_training.Training,
) -> dict[str, float]:
  """The final value of each metric, and what the run is."""
  params = training.abstract.params
  learning, _ = freezing.partition(params, training.learning.mask)
  result = {"images_skipped": skipped}
  result |= metrics_writer.final_values(workdir / "metrics.jsonl")
  return result | {
    "step": step,
    "scaling_factor": 1 / result["eval/latent_rms"],
    "parameters": freezing.count(params),
    "parameters_trained": freezing.count(learning),
  }


def _finish(
  config: ConfigDict, workdir: epath.Path, result: dict[str, float]
) -> None:
  """Writes `result.json`, and says what the run has reached."""
  metrics_writer.write_json(workdir / "result.json", result)
  first = metrics_writer.last_values(workdir / "metrics.jsonl", step=0)
  rows = {
    "step 0": _metrics(config, "eval", first),
    f"step {result['step']}": _metrics(config, "eval", result),
    floor.NAME: _metrics(config, "floor", result),
  }
  if result["images_skipped"]:
    _LOG.warning("%d unusable images were skipped", result["images_skipped"])
  _LOG.info("held-out images:\n\n%s\n", text_table.of_metrics(rows))


def _metrics(
  config: ConfigDict, part: str, values: Mapping[str, float]
) -> dict[int, dict[str, float]]:
  """By resolution; those without any are left out."""
  metrics = {
    resolution: {
      key: values[f"{prefix}/{key}"]
      for key in metrics_table.columns()
      if f"{prefix}/{key}" in values
    }
    for resolution, prefix in _prefixes(config, part).items()
  }
  return {side: of_side for side, of_side in metrics.items() if of_side}
