"""The training of a latent diffusion model, built from its config.

Nothing is allocated, read or compiled, and no device is asked: what cannot be
trained is refused by what is built here.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.autoencoder import latent_statistics
from dcae_jax.diffusion import (
  conditioning,
  objectives,
  sampling,
  train_step,
)
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.setup import denoising, keys, text, training_run
from dcae_jax.training import freezing, sharding
from dcae_jax.training import state as state_lib

_INITIAL = 0  # what the seed is for; 1 is the steps, 2 are samples


@dataclasses.dataclass(frozen=True)
class Training(training_run.Training):
  """That of a denoiser; the config has the numbers of its latents."""

  model: sampling.LatentDiffusion
  loaded: conditioning.Loaded
  # Of captions: the one that begins as the null caption; None: a random one.
  null_caption: np.ndarray | None = None
  takes_parts = False
  advice = (
    "lower config.batch_size, take a smaller model, or split the parameters "
    "with config.mesh.data=1 and config.mesh.fsdp=-1"
  )

  @functools.cached_property
  def abstract(self) -> state_lib.TrainState:
    return jax.eval_shape(self._initial, jax.random.key(0))

  def begin(self) -> state_lib.TrainState:
    if not self.config.init_from:
      key = jax.random.fold_in(jax.random.key(self.config.seed), _INITIAL)
      return jax.jit(self._initial, out_shardings=self.shardings)(key)
    variables = denoising.starting_variables(
      self.config.init_from,
      self.model.denoiser,
      sharding.replicated(self.mesh),
      self.null_caption,
    )
    return jax.jit(self._state, out_shardings=self.shardings)(variables)

  def _initial(self, key: jax.Array) -> state_lib.TrainState:
    variables = denoisers.init(self.model.denoiser, key)
    if self.null_caption is not None:
      variables["params"]["null_caption"] = jnp.asarray(self.null_caption)
    return self._state(variables)

  def _state(self, variables: Any) -> state_lib.TrainState:
    return self.learning.init({"batch_stats": {}} | variables)

  def step(self, gather: Callable[[Any], Any]) -> Callable[..., Any]:
    return train_step.create(
      denoiser=self.model.denoiser,
      objective=self.model.objective,
      dropout=self.config.label_dropout,
      channel_candidates=self.config.channel_candidates,
      learning=self.learning,
      loaded=self.loaded,
      seed=self.config.seed,
      gather=gather,
    )

  def inputs(self) -> tuple[Any, ...]:
    denoiser, kind = self.model.denoiser, self.model.conditioning
    count, rows = self.config.batch_size, sharding.by_rows(self.mesh)
    shape = (count, *denoiser.latent_size, denoiser.latent_channels)
    batch = {
      "latents": jax.ShapeDtypeStruct(shape, np.float32),
      kind.name: self.loaded.abstract(count),
    }
    batch = sharding.placed(batch, jax.tree.map(lambda _: rows, batch))
    return (batch, *self.loaded.constants)

  def check_shapes(self, shapes: Sequence[tuple[int, int, int]]) -> None:
    """Raises UserError for latents that the denoiser cannot take."""
    denoiser, kind = self.model.denoiser, self.model.conditioning
    for shape in shapes:
      jax.eval_shape(
        denoiser.apply,
        {"params": self.abstract.params},
        jax.ShapeDtypeStruct((1, *shape), np.float32),
        jax.ShapeDtypeStruct((1,), np.float32),
        kind.abstract(1),
      )

  def flops(self, remat: bool) -> float:
    # A multiply-accumulate is two; the backward pass costs two forward ones.
    forwards = 4 if remat and self.config.model.rematerialisation else 3
    macs = forwards * self.model.denoiser.forward_macs + self.loaded.macs
    return 2.0 * macs * self.config.batch_size

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
  latent_statistics.check_normalisation(config.data.normalisation)
  denoising.check_guidance("config.samples.guidance", config.samples.guidance)
  if config.samples.count and not config.samples.guidance:
    raise errors.UserError(
      "config.samples.guidance is empty; name at least one scale, or set "
      "config.samples.count=0"
    )


def build(
  config: ConfigDict,
  devices: list[jax.Device] | None = None,
  variant: denoisers.Variant | None = None,
) -> Training:
  """The training of a config that has the numbers of its latents.

  The devices need not be there; None: all that are. The variant is that of
  `denoising.create`. Raises UserError if it cannot be run.
  """
  check(config)
  numbers = denoising.numbers_of_latents(config.model)
  for key, number in numbers.items():
    if not number:
      raise errors.UserError(
        f"config.model.{key}=0 is filled in from the latents, and config."
        f"latents is empty; name a store, or set {', '.join(numbers)}"
      )
  model = denoising.create(
    config.model, config.objective, config.sampler, variant
  )
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
  params = denoisers.abstract_variables(model.denoiser)["params"]
  learns = jax.tree.map(lambda _: True, params)
  loaded = conditioning.as_it_is(model.conditioning)
  if model.conditioning.is_text:
    text.check_null(config.text)
    learns["null_caption"] = config.text.null == "learned"
    loaded = conditioning.of_states(model.conditioning)
    if not config.text.cache:
      loaded = conditioning.of_tokens(text.abstract(config.text, mesh))
  learning = training_run.how_parameters_learn(config, learns, mesh)
  return Training(config, mesh, learning, model, loaded)
