"""The training of a latent diffusion model, built from its config.

Nothing is allocated, read or compiled, and no device is asked: what cannot be
trained is refused by what is built here.
"""

import dataclasses
import functools
import logging
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.diffusion import objectives, sampling, train_step
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
    model: the denoiser, what it learns, and how pictures are drawn.
    learning: how parameters do.
    mesh: of the devices.
  """

  config: ConfigDict
  model: sampling.LatentDiffusion
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
      self.config.init_from, self.model.denoiser, sharding.replicated(self.mesh)
    )
    _LOG.info("starting from step %d of %s", step, self.config.init_from)
    return jax.jit(self._state, out_shardings=self.shardings)(variables)

  def _initial(self, key: jax.Array) -> state_lib.TrainState:
    return self._state(denoisers.init(self.model.denoiser, key))

  def _state(self, variables: Any) -> state_lib.TrainState:
    return self.learning.init({"batch_stats": {}} | variables)

  def jitted(self) -> Any:
    """The step over the mesh; the state is donated."""
    step = train_step.create(
      denoiser=self.model.denoiser,
      objective=self.model.objective,
      dropout=self.config.label_dropout,
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
    denoiser, kind = self.model.denoiser, self.model.conditioning
    count, rows = self.config.batch_size, sharding.by_rows(self.mesh)
    shape = (count, *denoiser.latent_size, denoiser.latent_channels)
    batch = {
      "latents": jax.ShapeDtypeStruct(shape, np.float32),
      kind.name: kind.abstract(count),
    }
    return (
      sharding.placed(self.abstract, self.shardings),
      sharding.placed(batch, jax.tree.map(lambda _: rows, batch)),
    )

  def flops(self, remat: bool) -> float:
    """Of a step over all devices, with what is computed twice if asked.

    A multiply-accumulate is two; the backward pass costs twice the forward one.
    """
    twice = remat and self.config.model.rematerialisation
    forwards = 4 if twice else 3
    return (
      2.0 * forwards * self.model.denoiser.forward_macs * self.config.batch_size
    )

  def description(self) -> str:
    """One line: what is trained."""
    count = freezing.count(self.abstract.params)
    return (
      f"{self.config.model.variant}: {count:,} parameters, {self.mesh.size} "
      "devices"
    )


def check(config: ConfigDict) -> None:
  """Raises UserError for a config that no latents can be trained with."""
  keys.check(config)
  denoising.check_guidance("config.samples.guidance", config.samples.guidance)
  if config.samples.count and not config.samples.guidance:
    raise errors.UserError(
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
    UserError: the config cannot be run.
  """
  check(config)
  numbers = denoising.numbers_of_latents(config.model)
  for key in numbers:
    if not config.model[key]:
      raise errors.UserError(
        f"config.model.{key}=0 is filled in from the latents, and config."
        f"latents is empty; name a store, or set {', '.join(numbers)}"
      )
  model = denoising.create(config.model, config.objective, config.sampler)
  if config.channel_candidates:
    objectives.random_channel_mask(
      jax.random.key(0), 1, config.model.latent_channels,
      config.channel_candidates,
    )  # fmt: skip
  mesh = sharding.create_mesh(**config.mesh, devices=devices)
  if mesh.shape["spatial"] != 1:
    raise errors.UserError(
      f"config.mesh.spatial={mesh.shape['spatial']} splits images; latents are "
      "small: use 1"
    )
  sharding.check_batch(config.batch_size, 1, 1, mesh)
  transformation, schedule = optimizer.create(
    optimizer.Settings(**config.optimizer),
    config.steps,
    sharding.on_whole_arrays(mesh),
  )
  abstract = denoisers.abstract_variables(model.denoiser)
  return Training(
    config,
    model,
    learning.Learning(
      jax.tree.map(lambda _: True, abstract["params"]),
      transformation,
      schedule,
      learning.Ema(config.ema.decay, config.ema.ramp_steps),
    ),
    mesh,
  )
