"""Trains an autoencoder through one phase (DC-AE, section 3.2).

Everything that can be wrong with the config, the data, the weights or the disk
is found before anything is compiled or written.
"""

import functools
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dcae_jax.autoencoder import families, patchgan, phases, train_step
from dcae_jax.autoencoder.dcae import network as dcae
from dcae_jax.autoencoder.sd_vae import network as sd_vae
from dcae_jax.autoencoder.weights import conversion, released
from dcae_jax.data import images, sources
from dcae_jax.evaluation import metrics as metrics_table
from dcae_jax.evaluation.networks import lpips, pretrained
from dcae_jax.evaluation.report import figures, text_table
from dcae_jax.runs import metrics_writer
from dcae_jax.setup import (
  checks,
  floor,
  measuring,
  metric_networks,
  training_run,
  wiring,
)
from dcae_jax.training import checkpoint, freezing, loop, optimizer, sharding
from dcae_jax.training import state as state_lib

_LOG = logging.getLogger(__name__)


class Inputs(NamedTuple):
  """What a run reads, opened: sources, decodings, weights of networks."""

  training: list[tuple[sources.Source, float]]
  held_out: sources.Source
  training_decoding: images.Decoding
  held_out_decoding: images.Decoding
  perceptual_parameters: Any
  metrics: metric_networks.Opened


def open_inputs(config: ConfigDict) -> Inputs:
  """Opens what the run reads.

  Raises:
    ValueError: a source without a usable image, or missing LPIPS weights.
  """
  channels, limit = config.model.image_channels, config.data.max_megapixels
  parameters = {}
  if config.lpips.weight:
    try:
      parameters = lpips.load_parameters(
        config.lpips.network, config.lpips.path
      )
    except pretrained.AbsentWeightsError as error:
      raise ValueError(
        f"{error}, or name a copy with --config.lpips.path=FILE, or train "
        "without LPIPS with --config.lpips.weight=0"
      ) from error
  inputs = Inputs(
    wiring.weighted_sources(config.data.source),
    wiring.single_source(config.evaluation.source),
    images.Decoding(
      channels, config.data.min_size, limit, config.data.shorter_side
    ),
    images.Decoding(channels, max_megapixels=limit),
    parameters,
    metric_networks.open_all(config.evaluation.metrics),
  )
  for source, _ in inputs.training:
    images.check_not_empty(source, inputs.training_decoding)
  images.check_not_empty(inputs.held_out, inputs.held_out_decoding)
  return inputs


class _Setup(NamedTuple):
  """What is known before anything is compiled."""

  autoencoder: families.Model
  phase: phases.Phase
  mask: Any
  mesh: Mesh
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  adversarial: train_step.Adversarial | None
  discriminator: patchgan.PatchGAN | None
  abstract: state_lib.TrainState
  shardings: Any


def run(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm | None = None
) -> bool:
  """Runs, or goes on with, one phase; False if SIGTERM ended it early."""
  sigterm = sigterm or loop.Sigterm()
  config = wiring.for_device(config, jax.default_backend())
  config = wiring.with_model(config)
  checks.check_autoencoder(config)
  wiring.check_work_directory(config, workdir)
  wiring.prepare_jax(config.compilation_cache)
  setup = _setup(config)
  inputs = open_inputs(config)
  perceptual_parameters = jax.device_put(
    inputs.perceptual_parameters, sharding.replicated(setup.mesh)
  )
  checkpoint.check_space(workdir, setup.abstract, config.checkpoint.keep)
  _describe(config, setup, len(inputs.held_out))
  batches, held_out = _batches(config, inputs), _held_out(config, setup, inputs)

  def prepare(writer):
    return training_run.Program(
      _compile(config, setup, perceptual_parameters),
      # Without what rematerialisation repeats.
      _flops(
        _changed(config, rematerialisation=False), setup, perceptual_parameters
      ),
      _evaluate(config, setup, inputs.metrics, held_out, writer),
    )

  def finish(step):
    is_first = jax.process_index() == 0
    result = _finished(workdir, step) if is_first else {}
    if not wiring.total(len(result)):
      of_floor = _floor(config, setup, inputs, held_out)
      skipped = wiring.total(len(batches.skipped) + len(held_out.skipped))
      if is_first:
        result = of_floor | _result(workdir, step, skipped, setup)
    if is_first:
      _finish(config, workdir, result)

  return training_run.run(
    config,
    workdir,
    sigterm,
    abstract=setup.abstract,
    shardings=setup.shardings,
    batches=batches,
    put=lambda batch: sharding.put_images(batch["images"], setup.mesh),
    begin=lambda: _initial_state(config, setup),
    prepare=prepare,
    evaluate_every=config.evaluation.every,
    finish=finish,
  )


def abstract_step(
  config: ConfigDict, devices: list[jax.Device]
) -> training_run.AbstractStep:
  """What a run compiles, for devices that need not be there.

  Raises:
    ValueError: what `run` raises for a config; data, weights and directories
      are not looked at.
  """
  config = wiring.with_model(config).copy_and_resolve_references()
  config.init_from = config.init_from or "another run"
  checks.check_autoencoder(config, predecessor_is_pending=True)
  setup = _setup(config, devices)
  shapes = {}
  if config.lpips.weight:
    shapes = lpips.parameter_shapes(config.lpips.network)
  perceptual_parameters = {
    name: jax.ShapeDtypeStruct(
      shape, np.float32, sharding=sharding.replicated(setup.mesh)
    )
    for name, shape in shapes.items()
  }
  return training_run.AbstractStep(
    _jitted(config, setup),
    (*_abstract_arguments(config, setup), perceptual_parameters),
    setup.mesh,
    _flops(config, setup, perceptual_parameters),
    takes_parts=True,
  )


def _setup(
  config: ConfigDict, devices: list[jax.Device] | None = None
) -> _Setup:
  autoencoder = wiring.model(config.model)
  phase = phases.create(config.phase, config.trainable)
  mesh = sharding.create_mesh(**config.mesh, devices=devices)
  for resolution in (config.resolution, *config.evaluation.resolutions):
    sharding.check_batch(
      config.batch_size, config.accumulation, resolution, mesh
    )
  settings = optimizer.Settings(**config.optimizer)
  autoencoder_optimizer, schedule = optimizer.create(
    settings, config.steps, sharding.on_whole_arrays(mesh)
  )
  variables = dcae.abstract_variables(autoencoder, config.model.image_channels)
  mask = freezing.trainable_mask(variables["params"], phase.trainable)
  if config.model.scan and not phases.blocks_learn_alike(mask):
    # Stacked blocks are differentiated together, frozen ones too.
    autoencoder = wiring.model(_changed(config, scan=False).model)
  discriminator = adversarial = None
  if phase.adversarial:
    c = config.discriminator
    discriminator = patchgan.PatchGAN(c.width, c.layers)
    settings = optimizer.of_discriminator(settings, c.learning_rate)
    adversarial = train_step.Adversarial(
      lambda params, x: discriminator.apply({"params": params}, x),
      optimizer.create(settings, config.steps)[0],
      c.weight,
      c.adaptive,
      c.start_step,
    )
  setup = _Setup(
    autoencoder, phase, mask, mesh, autoencoder_optimizer, schedule,
    adversarial, discriminator, None, None,
  )  # fmt: skip
  abstract = jax.eval_shape(
    lambda v: _create_state(config, setup, v, None), variables
  )
  return setup._replace(
    abstract=abstract, shardings=sharding.shardings(abstract, mesh)
  )


def _create_state(config, setup, variables, ema) -> state_lib.TrainState:
  discriminator = None
  if setup.discriminator is not None:
    side, channels = config.resolution, config.model.image_channels
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    discriminator = setup.discriminator.init(
      key, jnp.zeros((1, side, side, channels), jnp.float32)
    )["params"]
  return state_lib.create(
    variables,
    setup.mask,
    setup.optimizer,
    ema,
    discriminator,
    setup.adversarial.optimizer if setup.adversarial else None,
  )


def _initial_state(config: ConfigDict, setup: _Setup) -> state_lib.TrainState:
  """Step 0: from `init_from`, or from initial values."""
  abstract = {
    "params": setup.abstract.params,
    "batch_stats": setup.abstract.batch_stats,
  }
  if config.init_from:
    placed = sharding.shardings(abstract, setup.mesh)
    if checkpoint.is_run(config.init_from):
      first = "ema" if config.start_from_averages else "params"
      (_, variables), (_, ema) = (
        checkpoint.restore_variables(config.init_from, item, abstract, placed)
        for item in (first, "ema")
      )
    else:
      found = released.find(config.init_from)
      variables, _ = conversion.read(found.entries, found.files, placed)
      ema = None  # starts as a copy
    create = lambda variables, ema: _create_state(config, setup, variables, ema)
    jitted = jax.jit(
      create, out_shardings=setup.shardings, donate_argnums=(0, 1)
    )
    return jitted(variables, ema)

  def create_from_nothing(key):
    side = setup.autoencoder.spatial_compression
    channels = config.model.image_channels
    variables = setup.autoencoder.init(
      key, jnp.zeros((1, side, side, channels), jnp.float32)
    )
    params = dcae.with_branch_scale(
      variables["params"], config.initial_branch_scale
    )
    variables = {"batch_stats": {}} | variables | {"params": params}
    return _create_state(config, setup, variables, None)

  key = jax.random.fold_in(jax.random.key(config.seed), 0)
  return jax.jit(create_from_nothing, out_shardings=setup.shardings)(key)


def _cropping(config: ConfigDict) -> images.Cropping:
  c = config.data
  return images.Cropping(c.crop, config.resolution, c.min_area, c.flip)


def _batches(config: ConfigDict, inputs: Inputs) -> images.TrainingImages:
  c = config.data
  return images.TrainingImages(
    inputs.training,
    inputs.training_decoding,
    _cropping(config),
    batch_size=config.batch_size // jax.process_count(),
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    workers=c.workers,
    threads=c.threads,
    cache_megabytes=c.cache_megabytes,
  )


def _step(
  config: ConfigDict,
  setup: _Setup,
  autoencoder: families.Model,
  gather: Callable[[Any], Any] = lambda params: params,
) -> Callable:
  network = config.lpips.network
  perceptual = lambda p, x, y: lpips.distance(p, x, y, network)
  variational = None
  if isinstance(autoencoder, sd_vae.SDVAE):
    variational = train_step.Variational(
      functools.partial(autoencoder.apply, method="reconstruct_sample"),
      config.kl.weight,
      config.seed,
    )
  return train_step.create(
    apply=autoencoder.apply,
    phase=setup.phase,
    mask=setup.mask,
    optimizer=setup.optimizer,
    schedule=setup.schedule,
    ema=train_step.Ema(config.ema.decay, config.ema.ramp_steps),
    perceptual=perceptual if config.lpips.weight else None,
    perceptual_weight=config.lpips.weight,
    adversarial=setup.adversarial,
    variational=variational,
    accumulation=config.accumulation,
    gather=gather,
  )


def _abstract_arguments(config: ConfigDict, setup: _Setup) -> tuple[Any, Any]:
  side, channels = config.resolution, config.model.image_channels
  pixels = jax.ShapeDtypeStruct(
    (config.batch_size, side, side, channels),
    np.uint8,
    sharding=jax.sharding.NamedSharding(setup.mesh, sharding.IMAGES),
  )
  return training_run.placed(setup.abstract, setup.shardings), pixels


def _jitted(config: ConfigDict, setup: _Setup) -> Any:
  gather = sharding.gather(setup.shardings.params, setup.mesh)
  return jax.jit(
    _step(config, setup, setup.autoencoder, gather),
    donate_argnums=0,
    out_shardings=(setup.shardings, sharding.replicated(setup.mesh)),
  )


def _compile(config: ConfigDict, setup: _Setup, perceptual_parameters: Any):
  compiled = training_run.compiled(
    _jitted(config, setup),
    (*_abstract_arguments(config, setup), perceptual_parameters),
  )
  return lambda state, x: compiled(state, x, perceptual_parameters)


def _changed(config: ConfigDict, **model: bool) -> ConfigDict:
  """A copy, with other settings of its model."""
  config = config.copy_and_resolve_references()
  config.model.update(model)
  return config


def _flops(
  config: ConfigDict, setup: _Setup, perceptual_parameters: Any
) -> float:
  """Of one step over all devices; 0 where they cannot be counted."""
  config = _changed(config, scan=False)
  config.accumulation = 1  # the parts of a loop are counted once
  step = _step(config, setup, wiring.model(config.model))
  arguments = (*_abstract_arguments(config, setup), perceptual_parameters)
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments
  )
  try:  # the CPU's compiler counts for all: others cannot before compiling
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
      traced = jax.jit(step).trace(*arguments)
      # Without the CPU's own convolutions, which save multiplications.
      lowered = traced.lower(lowering_platforms=("tpu",))
      return lowered.cost_analysis()["flops"]
  except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
    return 0.0


def _held_out(
  config: ConfigDict, setup: _Setup, inputs: Inputs
) -> measuring.EvaluationImages:
  return measuring.EvaluationImages(
    inputs.held_out,
    inputs.held_out_decoding,
    setup.mesh,
    batch_size=config.evaluation.batch_size,
    max_images=config.evaluation.max_images,
    threads=config.data.threads,
  )


def _evaluate(
  config: ConfigDict,
  setup: _Setup,
  metrics: metric_networks.Opened,
  held_out: measuring.EvaluationImages,
  writer: metrics_writer.MetricsWriter,
) -> Callable[[int, state_lib.TrainState], dict[str, float]]:
  evaluation = measuring.Evaluation(
    measuring.networks_of(setup.autoencoder, metrics),
    held_out,
    setup.mesh,
    samples=config.evaluation.samples,
  )

  def evaluate(step, state):
    values = {}
    for resolution, prefix in _prefixes(config, "eval").items():
      found = evaluation.measure(state.ema, resolution)
      values |= {f"{prefix}/{k}": v for k, v in found.metrics.items()}
      picture = figures.grid(found.rows)
      writer.image(step, f"reconstructions_{resolution}px", picture)
    return values

  return evaluate


def _prefixes(config: ConfigDict, part: str) -> dict[int, str]:
  """Of the names of metrics, by resolution."""
  first, *others = config.evaluation.resolutions
  return {first: part} | {side: f"{part}/{side}px" for side in others}


def _floor(
  config: ConfigDict,
  setup: _Setup,
  inputs: Inputs,
  held_out: measuring.EvaluationImages,
) -> dict[str, float]:
  """What block PCA reaches on the held-out images; nothing where it cannot."""
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
  evaluation = measuring.Evaluation(
    measuring.networks_of(fitted, inputs.metrics),
    held_out,
    setup.mesh,
    samples=1,
  )
  variables = measuring.on_mesh(fitted.variables, setup.mesh)
  values = {}
  for resolution, prefix in _prefixes(config, "floor").items():
    found = evaluation.measure(variables, resolution)
    values |= {
      f"{prefix}/{key}": value
      for key, value in found.metrics.items()
      if key != "latent_rms"
    }
  return values


def _describe(config: ConfigDict, setup: _Setup, held_out: int) -> None:
  learning, frozen = freezing.partition(setup.abstract.params, setup.mask)
  _LOG.info(
    "%s of %s at %d px: %s parameters learn, %s are frozen; %d devices, "
    "%d held-out images",
    config.phase,
    config.model.variant,
    config.resolution,
    f"{freezing.count(learning):,}",
    f"{freezing.count(frozen):,}",
    setup.mesh.size,
    held_out,
  )


def _finished(workdir: epath.Path, step: int) -> dict[str, float]:
  """The result of a run that had ended at this step before; else nothing."""
  path = workdir / "result.json"
  if not path.exists():
    return {}
  result = json.loads(path.read_text())
  return result if result["step"] == step else {}


def _result(
  workdir: epath.Path, step: int, skipped: int, setup: _Setup
) -> dict[str, float]:
  """The last of each metric, and what the run is."""
  learning, _ = freezing.partition(setup.abstract.params, setup.mask)
  result = {"images_skipped": skipped}
  result |= metrics_writer.last_values(workdir / "metrics.jsonl")
  return result | {
    "step": step,
    "scaling_factor": 1 / result["eval/latent_rms"],
    "parameters": freezing.count(setup.abstract.params),
    "parameters_trained": freezing.count(learning),
  }


def _finish(
  config: ConfigDict, workdir: epath.Path, result: dict[str, float]
) -> None:
  """Writes `result.json`; says what the run has reached, and where it is."""
  metrics_writer.write_whole(
    workdir / "result.json", json.dumps(result, indent=2)
  )
  first = {}
  for line in metrics_writer.read_lines(workdir / "metrics.jsonl"):
    if line["step"] == 0:
      first |= line
  rows = {
    "step 0": _metrics(config, "eval", first),
    f"step {result['step']}": _metrics(config, "eval", result),
    floor.NAME: _metrics(config, "floor", result),
  }
  _LOG.info(
    "held-out images:\n\n%s\n\n%d images were skipped\nsamples: %s\n"
    "result: %s",
    text_table.of_metrics(rows), result["images_skipped"],
    workdir / "samples", workdir / "result.json",
  )  # fmt: skip


def _metrics(
  config: ConfigDict, part: str, values: Mapping[str, float]
) -> dict[int, dict[str, float]]:
  """By resolution; those without any are left out."""
  found = {}
  for resolution, prefix in _prefixes(config, part).items():
    of_size = {
      key: values[f"{prefix}/{key}"]
      for key in metrics_table.columns()
      if f"{prefix}/{key}" in values
    }
    if of_size:
      found[resolution] = of_size
  return found
