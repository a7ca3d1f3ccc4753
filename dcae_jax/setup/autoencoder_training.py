"""The training of an autoencoder, built from its config.

Nothing is allocated, read or compiled, and no device is asked: what cannot be
trained is refused by what is built here.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.autoencoder import (
  families,
  family,
  network,
  patchgan,
  phases,
  train_step,
)
from dcae_jax.autoencoder.weights import conversion, released
from dcae_jax.data import aspect_ratios, images
from dcae_jax.evaluation.networks import lpips
from dcae_jax.runs import work_directory
from dcae_jax.setup import keys, metric_networks, models, training_run
from dcae_jax.training import (
  checkpoint,
  freezing,
  optimizer,
  overview,
  program_cost,
  sharding,
)
from dcae_jax.training import state as state_lib

_INITIAL, _DISCRIMINATOR = 0, 1  # what the seed is for; 2 is sampled latents


@dataclasses.dataclass(frozen=True)
class Training(training_run.Training):
  """That of an autoencoder, with the shapes of its variables."""

  autoencoder: network.Network
  phase: phases.Phase
  adversarial: train_step.Adversarial | None
  variables: Any
  takes_parts = True
  advice = (
    "lower config.batch_size or config.resolution, take a smaller model, or "
    "split the parameters with config.mesh.data=1 and config.mesh.fsdp=-1"
  )

  @property
  def shapes(self) -> list[aspect_ratios.Shape]:
    """Heights and widths of batches; []: squares alone."""
    return _shapes(self.config, self.mesh)

  @property
  def _family(self) -> family.Family:
    return families.of(self.autoencoder.architecture)

  @functools.cached_property
  def abstract(self) -> state_lib.TrainState:
    return jax.eval_shape(self._state, self.variables)

  def begin(self) -> state_lib.TrainState:
    if not self.config.init_from:
      key = jax.random.key(self.config.seed)
      create = lambda key: self._state(self._initial_variables(key))
      return jax.jit(create, out_shardings=self.shardings)(
        jax.random.fold_in(key, _INITIAL)
      )
    first = "ema" if self.config.start_from_averages else "params"
    variables, ema = self._predecessor(first), None  # starts as a copy
    if work_directory.is_run(self.config.init_from):
      ema = self._predecessor("ema")
    create = jax.jit(
      self._state, out_shardings=self.shardings, donate_argnums=(0, 1)
    )
    return create(variables, ema)

  def averages_before(self) -> Any:
    """The averages that the run started from, those of `init_from`.

    Raises UserError if they are no longer there, or of another model.
    """
    _check_predecessor(self.config, self.phase)
    return self._predecessor("ema")

  def _predecessor(self, item: str) -> Any:
    """Variables of `init_from`; the item "params" or "ema" if it is a run."""
    source, abstract = self.config.init_from, self.abstract.variables
    placed = sharding.shardings(abstract, self.mesh)
    if work_directory.is_run(source):
      return checkpoint.restore_variables(source, item, abstract, placed)[1]
    weights = released.find(source)
    return conversion.read(weights.entries, weights.files, placed)[0]

  def _initial_variables(self, key: jax.Array) -> Any:
    variables = network.initial_variables(
      self.autoencoder, self.config.model.image_channels, key
    )
    params = self._family.with_branch_scale(
      variables["params"], self.config.initial_branch_scale
    )
    return variables | {"params": params}

  def _state(self, variables: Any, ema: Any = None) -> state_lib.TrainState:
    state = self.learning.init(variables, ema)
    if self.adversarial is None:
      return state
    c = self.config
    key = jax.random.fold_in(jax.random.key(c.seed), _DISCRIMINATOR)
    shape = (1, c.resolution, c.resolution, c.model.image_channels)
    parameters = _discriminator(c).init(key, jnp.zeros(shape))["params"]
    return state.replace(
      discriminator=parameters,
      discriminator_optimizer=self.adversarial.optimizer.init(parameters),
    )

  def step(
    self, gather: Callable[[Any], Any] = lambda params: params
  ) -> train_step.TrainStep:
    c = self.config
    distance = functools.partial(lpips.distance, network=c.lpips.network)
    return train_step.TrainStep(
      reconstruct=train_step.reconstruct_with(
        self.autoencoder.apply, self._family.samples_latents, gather
      ),
      phase=self.phase,
      learning=self.learning,
      perceptual=train_step.Perceptual(distance, c.lpips.weight)
      if c.lpips.weight
      else None,
      adversarial=self.adversarial,
      kl_weight=c.kl.weight,
      seed=c.seed,
      grad_accum_steps=c.accumulation,
    )

  def inputs(self) -> tuple[Any, ...]:
    c, replicated = self.config, sharding.replicated(self.mesh)
    pixels = jax.ShapeDtypeStruct(
      (c.batch_size, c.resolution, c.resolution, c.model.image_channels),
      np.uint8,
      sharding=jax.sharding.NamedSharding(self.mesh, sharding.IMAGES),
    )
    shapes = lpips.parameter_shapes(c.lpips.network) if c.lpips.weight else {}
    perceptual_parameters = {
      name: jax.ShapeDtypeStruct(shape, np.float32, sharding=replicated)
      for name, shape in shapes.items()
    }
    return pixels, perceptual_parameters

  def flops(self, remat: bool) -> float:
    config = self.config.copy_and_resolve_references()
    config.model.scan = False
    config.accumulation = 1  # the parts of a loop are counted once
    if not remat:
      config.model.rematerialisation = False
    unrolled = dataclasses.replace(
      self, config=config, autoencoder=models.create(config.model)
    )
    try:
      return program_cost.counted(unrolled.step(), *self.arguments()).flops
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
      return 0.0

  def description(self) -> str:
    """One line: what is trained, and how much of it learns."""
    c = self.config
    counts = overview.summary(self.abstract.params, self.learning.mask)
    return (
      f"{c.phase} of {c.model.variant} at {c.resolution} px: {counts}; "
      f"{self.mesh.size} devices"
    )


def build(
  config: ConfigDict,
  devices: list[jax.Device] | None = None,
  predecessor_is_pending: bool = False,
) -> Training:
  """The training of a config; raises UserError if it cannot be run.

  The devices need not be there; None: all that are. Where the predecessor is
  pending, `init_from` names a run that is still to come, or none.
  """
  keys.check(config)
  _check_images(config)
  phase = phases.create(config.phase, config.trainable)
  if not predecessor_is_pending:
    _check_predecessor(config, phase)
  mesh = sharding.create_mesh(**config.mesh, devices=devices)
  for resolution in (config.resolution, *config.evaluation.resolutions):
    sharding.check_batch(
      config.batch_size, config.accumulation, resolution, mesh
    )
  _check_smallest_side(config, phase, mesh)
  autoencoder = models.create(config.model)
  variables = network.abstract_variables(
    autoencoder, config.model.image_channels
  )
  mask = freezing.trainable_mask(variables["params"], phase.trainable)
  if config.model.scan and not phases.blocks_learn_alike(mask):
    # Stacked blocks are differentiated together, frozen ones too.
    unrolled = config.model.copy_and_resolve_references()
    unrolled.scan = False
    autoencoder = models.create(unrolled)
  learning = training_run.how_parameters_learn(config, mask, mesh)
  adversarial = _adversarial(config, mask) if phase.adversarial else None
  return Training(
    config, mesh, learning, autoencoder, phase, adversarial, variables
  )


def _discriminator(config: ConfigDict) -> patchgan.PatchGAN:
  c = config.discriminator
  return patchgan.PatchGAN(c.width, c.layers)


def _adversarial(config: ConfigDict, mask: Any) -> train_step.Adversarial:
  c = config.discriminator
  if c.adaptive and not train_step.last_layer(mask):
    raise errors.UserError(
      "config.discriminator.adaptive needs decoder/project_out/conv among "
      "the trainable parameters; set it to False, or add the pattern"
    )
  discriminator = _discriminator(config)
  settings = optimizer.of_discriminator(
    optimizer.Settings(**config.optimizer), c.learning_rate
  )
  return train_step.Adversarial(
    lambda params, x: discriminator.apply({"params": params}, x),
    optimizer.create(settings, config.steps)[0],
    c.weight,
    c.adaptive,
    c.start_step,
  )


def _check_images(config: ConfigDict) -> None:
  """Refuses sides that the network, crops, metrics or LPIPS cannot take."""
  sides = config.evaluation.resolutions
  if not sides:
    raise errors.UserError(
      "config.evaluation.resolutions is empty; name at least one"
    )
  for key, resolutions in (
    ("config.resolution", (config.resolution,)),
    ("config.evaluation.resolutions", sides),
  ):
    models.check_resolutions(resolutions, config.model, key)
  images.Cropping(config.data.crop, config.resolution)
  metric_networks.check(config.evaluation, "config.evaluation")
  for key in ("min_size", "shorter_side"):
    if 0 < config.data[key] < config.resolution:
      raise errors.UserError(
        f"config.data.{key}={config.data[key]} is below config.resolution="
        f"{config.resolution}, so that images would be enlarged; set it to "
        f"{config.resolution}, or to 0 to allow that"
      )
  lpips.parameter_shapes(config.lpips.network)


def _shapes(config: ConfigDict, mesh: Mesh) -> list[aspect_ratios.Shape]:
  most = config.data.max_aspect_ratio
  if most == 1:
    return []
  compression = models.create(config.model).spatial_compression
  multiple = math.lcm(compression, mesh.shape["spatial"])
  return aspect_ratios.shapes(config.resolution, multiple, most)


def _check_smallest_side(
  config: ConfigDict, phase: phases.Phase, mesh: Mesh
) -> None:
  """Refuses sides that LPIPS or the discriminator cannot take."""
  side = min([config.resolution, *itertools.chain(*_shapes(config, mesh))])
  needed, c = {}, config.discriminator
  if config.lpips.weight:
    network = config.lpips.network
    needed[f"LPIPS with {network}"] = lpips.SMALLEST_SIDE[network]
  if phase.adversarial:
    layers = f"a discriminator with {c.layers} layers"
    needed[layers] = patchgan.smallest_side(c.layers)
  for what, smallest in needed.items():
    if side < smallest:
      raise errors.UserError(
        f"config.resolution={config.resolution}, of which the shortest side "
        f"is {side}, is too small for {what}; use at least {smallest}"
      )


def _check_predecessor(config: ConfigDict, phase: phases.Phase) -> None:
  if config.init_from:
    models.check_same(
      models.identity_of(config.init_from),
      config.model,
      f"config.init_from={config.init_from!r}",
    )
  elif not phase.from_scratch:
    raise errors.UserError(
      f"phase {config.phase!r} starts from a trained autoencoder; set "
      "--config.init_from to the work directory of the phase before it"
    )
