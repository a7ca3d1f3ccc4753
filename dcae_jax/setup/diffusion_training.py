"""The training of a latent diffusion model, built from its config.

Nothing is allocated, read or compiled, and no device is asked: what cannot be
trained is refused by what is built here.
"""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dcae_jax.diffusion import objectives, samplers, train_step
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.setup import denoising, keys
from dcae_jax.training import freezing, learning, optimizer, sharding
from dcae_jax.training import state as state_lib

_LOG = logging.getLogger(__name__)
_INITIAL = 0  # what the seed is for; 1 is the steps, 2 are samples


@dataclasses.dataclass(frozen=True)
class Training:
  """What is known before anything is compiled.

  Attributes:
    config: of the run, with the numbers of its latents.
    denoiser: the module.
    objective: what is learned.
    sampler: how pictures are drawn.
    learning: how parameters do.
    mesh: of the devices.
  """

  config: ConfigDict
  denoiser: denoising.Denoiser
  objective: objectives.Objective
  sampler: samplers.Sampler
  learning: learning.Learning
  mesh: Mesh
  takes_parts = False

  @functools.cached_property
  def abstract(self) -> state_lib.TrainState:
    """Shapes of the state."""
    return jax.eval_shape(self._initial, jax.random.key(0))

  @functools.cached_property
  def shardings(self) -> Any:
    """Where the leaves of the state live."""
    return sharding.shardings(self.abstract, self.mesh)

  def begin(self) -> state_lib.TrainState:
    """Step 0: initial values, or the averages of `init_from`."""
    if not self.config.init_from:
      key = jax.random.fold_in(jax.random.key(self.config.seed), _INITIAL)
      return jax.jit(self._initial, out_shardings=self.shardings)(key)
    step, variables = denoising.averages(
      self.config.init_from, self.denoiser, sharding.replicated(self.mesh)
    )
    _LOG.info("starting from step %d of %s", step, self.config.init_from)
    return jax.jit(self._state, out_shardings=self.shardings)(variables)

  def _initial(self, key: jax.Array) -> state_lib.TrainState:
    denoiser = self.denoiser
    shape = (1, *denoiser.latent_size, denoiser.latent_channels)
    return self._state(
      denoiser.init(
        key, jnp.zeros(shape), jnp.zeros(1), jnp.zeros(1, jnp.int32)
      )
    )

  def _state(self, variables: Any) -> state_lib.TrainState:
    return self.learning.init({"batch_stats": {}} | variables)

  def jitted(self) -> Any:
    """The step over the mesh; the state is donated."""
    step = train_step.create(
      apply=self.denoiser.apply,
      objective=self.objective,
      num_classes=self.config.model.num_classes,
      label_dropout=self.config.label_dropout,
      channel_candidates=self.config.channel_candidates,
      learning=self.learning,
      seed=self.config.seed,
      gather=sharding.gather(self.shardings.params, self.mesh),
    )
    return jax.jit(
      step,
      donate_argnums=0,
      out_shardings=(self.shardings, sharding.replicated(self.mesh)),
    )

  def arguments(self) -> tuple[Any, Any]:
    """Shapes of what the step is called with, and where they live."""
    rows = sharding.by_rows(self.mesh)
    shape = (*self.denoiser.latent_size, self.denoiser.latent_channels)
    count = self.config.batch_size
    batch = {
      "latents": jax.ShapeDtypeStruct(
        (count, *shape), np.float32, sharding=rows
      ),
      "labels": jax.ShapeDtypeStruct((count,), np.int32, sharding=rows),
    }
    return sharding.placed(self.abstract, self.shardings), batch

  def flops(self, rematerialisation: bool) -> float:
    """Of a step over all devices, with what is computed twice if asked.

    A multiply-accumulate is two; the backward pass costs twice the forward one.
    """
    twice = rematerialisation and self.config.model.rematerialisation
    forwards = 4 if twice else 3
    return 2.0 * forwards * self.denoiser.forward_macs * self.config.batch_size

  def description(self) -> str:
    """One line: what is trained."""
    count = freezing.count(self.abstract.params)
    return (
      f"{self.config.model.variant}: {count:,} parameters, {self.mesh.size} "
      "devices"
    )


def check(config: ConfigDict) -> None:
  """Raises ValueError for a config that no latents can be trained with."""
  keys.check(config)
  denoising.check_guidance("config.samples.guidance", config.samples.guidance)
  if config.samples.count and not config.samples.guidance:
    raise ValueError(
      "config.samples.guidance is empty; name at least one scale, or set "
      "config.samples.count=0"
    )


def build(
  config: ConfigDict, devices: list[jax.Device] | None = None
) -> Training:
  """The training of a config.

  Args:
    config: of the run, with the numbers of its latents in `config.model`.
    devices: that it is for; they need not be there. None: all that are.

  Raises:
    ValueError: the config cannot be run.
  """
  check(config)
  for key in ("latent_size", "latent_channels", "num_classes"):
    if not config.model[key]:
      raise ValueError(
        f"config.model.{key}=0 is filled in from the latents, and config."
        "latents is empty; name a store, or set model.latent_size, "
        "model.latent_channels and model.num_classes"
      )
  objective = denoising.objective(config.objective)
  sampler = denoising.sampler(config.sampler, objective)
  denoiser = denoising.model(config.model, objective)
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
  abstract = denoisers.abstract_variables(denoiser)
  return Training(
    config,
    denoiser,
    objective,
    sampler,
    learning.Learning(
      jax.tree.map(lambda _: True, abstract["params"]),
      transformation,
      schedule,
      learning.Ema(config.ema.decay, config.ema.ramp_steps),
    ),
    mesh,
  )
