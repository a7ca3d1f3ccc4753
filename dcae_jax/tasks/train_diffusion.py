"""Trains a class-conditional diffusion model on exported latents.

Everything that can be wrong with the config, the store, the autoencoder or the
disk is found before anything is compiled or written.
"""

import json
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dcae_jax.autoencoder import autoencoder
from dcae_jax.autoencoder import train_step as autoencoder_train_step
from dcae_jax.diffusion import objectives, sampling
from dcae_jax.diffusion import train_step as diffusion_train_step
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.evaluation.report import figures
from dcae_jax.latents import decode, reader
from dcae_jax.runs import metrics_writer
from dcae_jax.setup import denoising, training_run, wiring
from dcae_jax.training import checkpoint, freezing, loop, optimizer, sharding
from dcae_jax.training import state as state_lib

_LOG = logging.getLogger(__name__)
_INITIAL, _SAMPLES = 0, 2  # what the seed is for; 1 is the steps

# Smallest and largest value of each number.
_BOUNDS = {
  "seed": (0, 2**31 - 1),
  "batch_size": (1, 2**24),
  "steps": (1, 2**31 - 1),
  "log_every": (1, 2**31 - 1),
  "log_seconds": (0, 1e9),
  "label_dropout": (0, 1),
  "optimizer.learning_rate": (0, 1e3),
  "optimizer.adam_learning_rate": (0, 1e3),
  "optimizer.beta1": (0, 1 - 1e-12),
  "optimizer.beta2": (0, 1 - 1e-12),
  "optimizer.weight_decay": (0, 1e3),
  "optimizer.warmup_steps": (0, 2**31 - 1),
  "optimizer.decay_steps": (0, 2**31 - 1),
  "optimizer.final_rate": (0, 1),
  "optimizer.clip_norm": (0, 1e6),
  "ema.decay": (0, 1 - 1e-12),
  "ema.ramp_steps": (0, 2**31 - 1),
  "data.workers": (0, 1000),
  "data.threads": (1, 1000),
  "data.prefetch": (1, 100),
  "data.cache_megabytes": (0, 1e7),
  "data.shuffle_shards": (0, 2**31 - 1),
  "data.retries": (0, 1000),
  "samples.every": (0, 2**31 - 1),
  "samples.count": (0, 1000),
  "sampler.steps": (1, 10**6),
  "checkpoint.every": (0, 2**31 - 1),
  "checkpoint.keep": (1, 1000),
  "profile.start": (0, 2**31 - 1),
  "profile.steps": (0, 2**31 - 1),
  "profile.on_signal": (1, 2**31 - 1),
}


class _Setup(NamedTuple):
  """What is known before anything is compiled."""

  model: sampling.LatentDiffusion
  mesh: Mesh
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  abstract: state_lib.TrainState
  shardings: Any


def check(config: ConfigDict) -> None:
  """Raises ValueError for a config that no latents can be trained with."""
  wiring.check_bounds(config, _BOUNDS)
  denoising.check_guidance("config.samples.guidance", config.samples.guidance)
  if config.samples.count and not config.samples.guidance:
    raise ValueError(
      "config.samples.guidance is empty; name at least one scale, or set "
      "config.samples.count=0"
    )


def check_model(config: ConfigDict) -> None:
  """Raises ValueError if the model, its numbers filled in, cannot be made."""
  _setup(config)


def run(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm | None = None
) -> bool:
  """Trains, or goes on with it; False if SIGTERM ended it early."""
  sigterm = sigterm or loop.Sigterm()
  config = wiring.for_device(config, jax.default_backend())
  check(config)
  if not config.latents:
    raise ValueError(
      "config.latents is empty; name a latent store (configs/f64_export.py "
      "writes one)"
    )
  store = denoising.open_store(config)
  config = denoising.with_store(config, store)
  if config.init_from:
    denoising.check_same_model(config.init_from, config)
  wiring.check_work_directory(config, workdir)
  wiring.check_nothing_foreign(workdir, ("manifest.json",))
  wiring.prepare_jax(config.compilation_cache)
  setup = _setup(config)
  kind = setup.model.conditioning
  described = decode.description(store) | kind.describe_rows(
    store.condition(kind.name)
  )
  decode.check_same_latents(workdir, described)
  batches = _batches(config, store)
  ae = None
  if config.samples.count:
    ae = decode.load_autoencoder(
      store.manifest,
      config.autoencoder,
      "name it with config.autoencoder, or draw no samples with "
      "config.samples.count=0",
    )
  checkpoint.check_space(workdir, setup.abstract, config.checkpoint.keep)
  _LOG.info(
    "%s on %d latents of %s: %s parameters, %d devices",
    config.model.variant, len(store), store.path,
    f"{freezing.count(setup.abstract.params):,}", setup.mesh.size,
  )  # fmt: skip
  decode.write_description(workdir, described)

  def prepare(writer):
    return training_run.Program(
      training_run.compiled(
        _jitted(config, setup), _abstract_arguments(config, setup)
      ),
      # A multiply-accumulate is two; backward costs twice forward.
      6.0 * setup.model.denoiser.forward_macs * config.batch_size,
      _sample(config, setup, store, ae, writer),
    )

  return training_run.run(
    config,
    workdir,
    sigterm,
    abstract=setup.abstract,
    shardings=setup.shardings,
    batches=batches,
    put=lambda batch: sharding.put_rows(batch, setup.mesh),
    begin=lambda: _start(config, setup),
    prepare=prepare,
    evaluate_every=config.samples.every,
    finish=lambda step: _finish(workdir, step, setup),
  )


def abstract_step(
  config: ConfigDict, devices: list[jax.Device]
) -> training_run.AbstractStep:
  """What a run compiles, for devices that need not be there.

  Raises:
    ValueError: what `run` raises for a config. The numbers of the latents are
      those of its store; without one, those of `config.model`.
  """
  check(config)
  if config.latents:
    config = denoising.with_store(config, denoising.open_store(config))
  for key in denoising.numbers_of_latents(config.model):
    if not config.model[key]:
      raise ValueError(
        f"config.model.{key}=0 is filled in from the latents, and config."
        "latents is empty; name a store, or set config.model."
        f"{', '.join(denoising.numbers_of_latents(config.model))}"
      )
  setup = _setup(config, devices)
  forwards = 4 if config.model.rematerialisation else 3
  return training_run.AbstractStep(
    _jitted(config, setup),
    _abstract_arguments(config, setup),
    setup.mesh,
    2.0 * forwards * setup.model.denoiser.forward_macs * config.batch_size,
    takes_parts=False,
  )


def _abstract_arguments(config: ConfigDict, setup: _Setup) -> tuple[Any, Any]:
  rows = sharding.by_rows(setup.mesh)
  size, channels = config.model.latent_size, config.model.latent_channels
  shape = (config.batch_size, size, size, channels)
  kind = setup.model.conditioning
  batch = {
    "latents": jax.ShapeDtypeStruct(shape, np.float32),
    kind.name: kind.abstract(config.batch_size),
  }
  return (
    training_run.placed(setup.abstract, setup.shardings),
    training_run.placed(batch, jax.tree.map(lambda _: rows, batch)),
  )


def _setup(
  config: ConfigDict, devices: list[jax.Device] | None = None
) -> _Setup:
  model = denoising.create(config.model, config.objective, config.sampler)
  if config.channel_candidates:
    objectives.random_channel_mask(
      jax.random.key(0), 1, config.model.latent_channels,
      config.channel_candidates,
    )  # fmt: skip
  mesh = sharding.create_mesh(**config.mesh, devices=devices)
  if mesh.shape["spatial"] != 1:
    raise ValueError(
      f"config.mesh.spatial={mesh.shape['spatial']} splits images; latents are "
      "small: use 1"
    )
  sharding.check_batch(config.batch_size, 1, 1, mesh)
  transformation, schedule = optimizer.create(
    optimizer.Settings(**config.optimizer),
    config.steps,
    sharding.on_whole_arrays(mesh),
  )
  setup = _Setup(model, mesh, transformation, schedule, None, None)
  abstract = jax.eval_shape(_initial(setup), jax.random.key(0))
  return setup._replace(
    abstract=abstract, shardings=sharding.shardings(abstract, mesh)
  )


def _start(config: ConfigDict, setup: _Setup) -> state_lib.TrainState:
  """Step 0: initial values, or the averages of `init_from`."""
  if not config.init_from:
    key = jax.random.fold_in(jax.random.key(config.seed), _INITIAL)
    return jax.jit(_initial(setup), out_shardings=setup.shardings)(key)
  step, variables = denoising.averages(
    config.init_from, setup.model.denoiser, sharding.replicated(setup.mesh)
  )
  _LOG.info("starting from step %d of %s", step, config.init_from)
  create = lambda variables: _state(setup, variables)
  return jax.jit(create, out_shardings=setup.shardings)(variables)


def _state(setup: _Setup, variables: Any) -> state_lib.TrainState:
  mask = jax.tree.map(lambda _: True, variables["params"])
  return state_lib.create(
    {"batch_stats": {}} | variables, mask, setup.optimizer
  )


def _initial(setup: _Setup) -> Callable[[jax.Array], state_lib.TrainState]:
  """A function of a key: the state at step 0."""

  def create(key):
    return _state(setup, denoisers.init(setup.model.denoiser, key))

  return create


def _batches(config: ConfigDict, store: reader.Latents) -> reader.LatentBatches:
  return reader.LatentBatches(
    store,
    batch_size=config.batch_size // jax.process_count(),
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    workers=config.data.workers,
    threads=config.data.threads,
    shuffle_shards=config.data.shuffle_shards,
  )


def _jitted(config: ConfigDict, setup: _Setup) -> Any:
  step = diffusion_train_step.create(
    denoiser=setup.model.denoiser,
    objective=setup.model.objective,
    dropout=config.label_dropout,
    channel_candidates=config.channel_candidates,
    optimizer=setup.optimizer,
    schedule=setup.schedule,
    ema=autoencoder_train_step.Ema(config.ema.decay, config.ema.ramp_steps),
    seed=config.seed,
    gather=sharding.gather(setup.shardings.params, setup.mesh),
  )
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(setup.shardings, sharding.replicated(setup.mesh)),
  )


def _sample(
  config: ConfigDict,
  setup: _Setup,
  store: reader.Latents,
  ae: autoencoder.Autoencoder | None,
  writer: metrics_writer.MetricsWriter,
) -> Callable[[int, state_lib.TrainState], dict[str, float]]:
  """Pictures of a few conditions: the same noise at each guidance scale."""
  condition = setup.model.conditioning.examples(config.samples.count)
  key = jax.random.fold_in(jax.random.key(config.seed), _SAMPLES)
  functions = {
    scale: jax.jit(
      setup.model.sample_function(scale, sharding.replicated(setup.mesh)),
      out_shardings=sharding.replicated(setup.mesh),
    )
    for scale in config.samples.guidance
  }

  def evaluate(step, state):
    if ae is None or step == 0:  # of noise there is nothing to see
      return {}
    values, rows = {}, {}
    for scale, function in functions.items():
      z = jax.device_get(
        function({"params": state.ema["params"]}, key, condition)
      )
      if not np.isfinite(z).all():  # a matter of the sampler, not of training
        _LOG.warning(
          "step %d: samples at guidance %g are not finite, and left out (%s, "
          "config.sampler.steps=%d)",
          step, scale, setup.model.sampler, config.sampler.steps,
        )  # fmt: skip
        continue
      values[f"eval/latent_rms/guidance_{scale:g}"] = float(
        np.sqrt(np.mean(np.square(z)))
      )
      z = decode.unscaled(store.manifest, z)
      rows[f"{scale:g}"] = decode.to_pixels(ae, z)
    if rows:
      picture = figures.grid(list(rows.values()), list(rows))
      writer.image(step, "samples", picture)
    return values

  return evaluate


def _finish(workdir: epath.Path, step: int, setup: _Setup) -> None:
  """Writes `result.json`: the last of each metric."""
  if jax.process_index():
    return
  result = metrics_writer.last_values(workdir / "metrics.jsonl") | {
    "step": step,
    "parameters": freezing.count(setup.abstract.params),
    "forward_macs": setup.model.denoiser.forward_macs,
  }
  metrics_writer.write_whole(
    workdir / "result.json", json.dumps(result, indent=2)
  )
  _LOG.info("result in %s", workdir)
