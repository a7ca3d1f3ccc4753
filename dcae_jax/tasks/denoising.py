"""From config to a latent diffusion model: denoiser, objective, sampler."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dcae_jax import diffusion, samplers
from dcae_jax.data import latents
from dcae_jax.models import denoisers, dit, uvit
from dcae_jax.training import checkpoint

Denoiser = dit.DiT | uvit.UViT

_OBJECTIVES = {
  "scaled_linear": lambda c: diffusion.scaled_linear(),
  "improved_ddpm": lambda c: diffusion.improved_ddpm(),
  "flow": lambda c: diffusion.FlowMatching(
    tuple(c.logit_normal) or None, c.shift
  ),
}
_SAMPLERS = {
  "dpm_solver": lambda c: samplers.DPMSolver(),
  "ddpm": lambda c: samplers.DDPM(),
  "ddim": lambda c: samplers.DDIM(c.eta),
  "euler": lambda c: samplers.Euler(),
  "heun": lambda c: samplers.Heun(),
  "dopri5": lambda c: samplers.Dopri5(c.atol, c.rtol),
}


def _chosen(known: dict[str, Callable], config: ConfigDict, key: str) -> Any:
  if config.kind not in known:
    raise ValueError(
      f"unknown config.{key}.kind={config.kind!r}; known are {', '.join(known)}"
    )
  return known[config.kind](config)


def objective(config: ConfigDict) -> diffusion.Objective:
  """Of `config.objective`."""
  return _chosen(_OBJECTIVES, config, "objective")


def sampler(
  config: ConfigDict, objective: diffusion.Objective, guidance: tuple
) -> samplers.Sampler:
  """Of `config.sampler`.

  Raises:
    ValueError: it does not fit the objective, has too few steps, or a guidance
      scale is negative.
  """
  found = _chosen(_SAMPLERS, config, "sampler")
  samplers.check(found, objective, config.steps)
  for scale in guidance:
    diffusion.check_guidance(scale, tuple(config.interval) or None)
  return found


def with_store(config: ConfigDict, store: latents.Latents) -> ConfigDict:
  """The config, with the model's numbers taken from the store.

  Raises:
    ValueError: the config has others, or a label is out of range.
  """
  height, width, channels = store.shape
  if height != width:
    raise ValueError(f"{store.path} has latents that are not square")
  labels = store.labels()
  if labels.min() < 0 or (store.classes and labels.max() >= len(store.classes)):
    raise ValueError(
      f"{store.path} has labels from {labels.min()} to {labels.max()}, and "
      f"{len(store.classes)} classes; export it again"
    )
  found = {
    "latent_size": height,
    "latent_channels": channels,
    "num_classes": len(store.classes) or int(labels.max()) + 1,
  }
  config = config.copy_and_resolve_references()
  with config.unlocked():
    for key, value in found.items():
      if config.model[key] not in (0, value):
        raise ValueError(
          f"config.model.{key}={config.model[key]}, but {store.path} has "
          f"{value}; leave it 0, or name another config.latents"
        )
      config.model[key] = value
  return config


def model(
  config: ConfigDict, objective: diffusion.Objective, *, remat: bool
) -> Denoiser:
  """The denoiser of `config.model`, whose numbers are filled in."""
  channels = config.latent_channels
  return denoisers.create(
    config.variant,
    latent_size=config.latent_size,
    latent_channels=channels,
    num_classes=config.num_classes,
    patch_size=config.patch_size,
    learn_sigma=objective.output_channels(channels) > channels,
    rematerialisation=remat,
    dtype=config.dtype,
  )


def sample_function(
  denoiser: Denoiser,
  objective: diffusion.Objective,
  sampler: samplers.Sampler,
  config: ConfigDict,
  guidance: float,
  sharding: jax.sharding.Sharding,
) -> Callable[..., jax.Array]:
  """`(variables, key, labels [b]) -> z_0 [b, h, w, c]`, scaled; not jitted.

  `sharding` is of the latents while they are drawn; values do not depend on it.
  """
  interval = tuple(config.interval) or None
  shape = (*denoiser.latent_size, denoiser.latent_channels)

  def sample(variables, key, labels):
    noise_key, sampler_key = jax.random.split(key)
    z = jax.random.normal(noise_key, (len(labels), *shape), jnp.float32)
    z = jax.lax.with_sharding_constraint(z, sharding)
    network = lambda z, t, labels: denoiser.apply(variables, z, t, labels)
    model_fn = diffusion.guided(
      network, labels, denoiser.num_classes, guidance, interval
    )
    return sampler.sample(objective, model_fn, sampler_key, z, config.steps)

  return sample


def averages(run: str, denoiser: Denoiser) -> tuple[int, Any]:
  """Step, and `{"params": ...}` on one device, of a run's last checkpoint."""
  abstract = {"batch_stats": {}} | denoisers.abstract_variables(denoiser)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  placed = jax.tree.map(lambda _: device, abstract)
  step, found = checkpoint.restore_variables(run, "ema", abstract, placed)
  return step, {"params": found["params"]}
