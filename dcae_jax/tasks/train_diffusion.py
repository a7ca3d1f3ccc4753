"""Trains a diffusion model on exported latents.

Everything that can be wrong with the config, the store, the autoencoder or the
disk is found before anything is compiled or written.
"""

import dataclasses
import logging
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.autoencoder import autoencoder
from dcae_jax.data import batches as batches_lib
from dcae_jax.diffusion import conditioning
from dcae_jax.evaluation.report import figures
from dcae_jax.latents import aspect_ratios, decode
from dcae_jax.runs import metrics_writer
from dcae_jax.setup import (
  denoising,
  diffusion_training,
  keys,
  latent_reading,
  start,
  text,
  training_run,
)
from dcae_jax.training import checkpoint, freezing, loop, sharding

_LOG = logging.getLogger(__name__)
_SAMPLES = 2  # what the seed is for; 0 are initial values, 1 is the steps


def run(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm | None = None
) -> bool:
  """Trains, or goes on with it; False if SIGTERM ended it early."""
  sigterm = sigterm or loop.Sigterm()
  keys.check(config)
  config = keys.for_device(config, jax.default_backend())
  diffusion_training.check(config)
  if not config.latents:
    raise errors.UserError(
      "config.latents is empty; name a latent store (configs/f64_export.py "
      "writes one)"
    )
  store = denoising.open_store(config)
  config = denoising.with_store(config, store)
  config = latent_reading.decided(config, store, workdir)
  training = diffusion_training.build(config)
  training.check_machine()
  training.check_shapes(store.shapes)
  if config.init_from:
    denoising.check_same_model(config.init_from, config, training.model)
  written = ("manifest.json", "metrics.jsonl", "checkpoints", "samples")
  start.begin(config, workdir, written)
  kind = training.model.conditioning
  rows = store.condition(kind.name)
  described = decode.description(store) | kind.describe_rows(rows)
  choices = kind.choices(config.samples.prompts, described)
  choices = conditioning.drawn(choices, 0, config.samples.count)
  titles = kind.titles(choices, described["classes"])
  told = text.Told({}, (), choices)
  if kind.is_text:
    told = text.told(config, training.mesh, rows, choices)
    training = dataclasses.replace(training, null_caption=told.null_caption)
  described |= told.described
  decode.check_same_latents(workdir, described)
  batches = _batches(config, store, told)
  ae = None
  if config.samples.count:
    ae = decode.load_autoencoder(
      store.manifest,
      config.autoencoder,
      "name it with config.autoencoder, or draw no samples with "
      "config.samples.count=0",
    )
  checkpoint.check_space(workdir, training.abstract, config.checkpoint.keep)
  _LOG.info(
    "%s, %d latents of %s", training.description(), len(store), store.path
  )
  decode.write_description(workdir, described)
  work = training_run.Work(
    batches,
    lambda batch: sharding.put_rows(batch, training.mesh),
    told.constants,
    _sample(training, store, told.examples, titles, ae),
    config.samples.every,
    lambda before, now: None,
    lambda step, _: _finish(workdir, step, training),
  )
  return training_run.run(training, work, workdir, sigterm)


def _batches(
  config: ConfigDict, store: aspect_ratios.Store, told: text.Told
) -> batches_lib.Batches:
  return store.batches(
    batch_size=config.batch_size // jax.process_count(),
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    workers=config.data.workers,
    threads=config.data.threads,
    shuffle_shards=config.data.shuffle_shards,
    shuffle_streams=config.data.shuffle_streams,
    prepare=told.prepare,
  )


def _sample(
  training: diffusion_training.Training,
  store: aspect_ratios.Store,
  condition: conditioning.Condition,
  titles: list[str],
  ae: autoencoder.Autoencoder | None,
) -> Callable[..., dict[str, float]]:
  """Pictures of a few conditions: the same noise at each guidance scale."""
  config, model = training.config, training.model
  replicated = sharding.replicated(training.mesh)
  key = jax.random.fold_in(jax.random.key(config.seed), _SAMPLES)
  functions = {
    scale: jax.jit(
      model.sample_function(scale, replicated), out_shardings=replicated
    )
    for scale in config.samples.guidance
  }

  def evaluate(step, state, writer):
    if ae is None or step == 0:  # of noise there is nothing to see
      return {}
    values, columns = {}, {}
    for scale, function in functions.items():
      variables = {"params": state.ema["params"]}
      z = jax.device_get(function(variables, key, condition))
      if not np.isfinite(z).all():  # a matter of the sampler, not of training
        _LOG.warning(
          "step %d: samples at guidance %g are not finite, and left out (%s, "
          "config.sampler.steps=%d)",
          step, scale, model.sampler, config.sampler.steps,
        )  # fmt: skip
        continue
      rms = float(np.sqrt(np.mean(np.square(z))))
      values[f"eval/latent_rms/guidance_{scale:g}"] = rms
      z = store.normalisation.undo(z)
      columns[f"guidance {scale:g}"] = decode.to_pixels(ae, z)
    if columns:
      rows = list(np.stack(list(columns.values()), axis=1))
      picture = figures.grid(rows, titles, dict(enumerate(columns)))
      writer.image(step, "samples", picture)
    return values

  return evaluate


def _finish(
  workdir: epath.Path, step: int, training: diffusion_training.Training
) -> None:
  """Writes `result.json`: the last of each metric, and what the model is."""
  if jax.process_index():
    return
  result = metrics_writer.final_values(workdir / "metrics.jsonl") | {
    "step": step,
    "parameters": freezing.count(training.abstract.params),
    "forward_macs": training.model.denoiser.forward_macs,
  }
  metrics_writer.write_json(workdir / "result.json", result)
