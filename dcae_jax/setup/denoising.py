"""From config to a latent diffusion model: denoiser, objective, sampler."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dcae_jax.diffusion import guidance as classifier_free
from dcae_jax.diffusion import objectives, samplers
from dcae_jax.diffusion.denoisers import dit, uvit
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.latents import reader
from dcae_jax.runs import differences, work_directory
from dcae_jax.training import checkpoint

Denoiser = dit.DiT | uvit.UViT
_LOG = logging.getLogger(__name__)
# What makes parameters of one model fit another.
_SHAPING = (
  "variant", "patch_size", "latent_size", "latent_channels", "num_classes"
)  # fmt: skip

_OBJECTIVES = {
  "scaled_linear": lambda c: objectives.scaled_linear(),
  "improved_ddpm": lambda c: objectives.improved_ddpm(),
  "flow": lambda c: objectives.FlowMatching(
    _pair(c, "objective", "logit_normal"), c.shift
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


def _pair(
  config: ConfigDict, name: str, key: str
) -> tuple[float, float] | None:
  """Two numbers, or None for an empty tuple."""
  values = tuple(config[key])
  if len(values) not in (0, 2) or not all(map(_is_number, values)):
    raise ValueError(
      f"config.{name}.{key}={values} is not two numbers; () leaves it out"
    )
  return values or None


def _is_number(value: Any) -> bool:
  return type(value) in (int, float) and math.isfinite(value)


def check_guidance(key: str, scales: Sequence[Any]) -> None:
  """Raises ValueError for scales that cannot be, or that stand twice."""
  for scale in scales:
    if not _is_number(scale):
      raise ValueError(f"{key}={scales}: {scale!r} is not a finite number")
    classifier_free.check_guidance(scale, None)
  if len({f"{scale:g}" for scale in scales}) < len(scales):
    raise ValueError(f"{key}={scales} names a scale twice (six digits count)")


def _chosen(known: dict[str, Callable], config: ConfigDict, key: str) -> Any:
  if config.kind not in known:
    raise ValueError(
      f"unknown config.{key}.kind={config.kind!r}; known are {', '.join(known)}"
    )
  return known[config.kind](config)


def objective(config: ConfigDict) -> objectives.Objective:
  """Of `config.objective`."""
  return _chosen(_OBJECTIVES, config, "objective")


def sampler(
  config: ConfigDict, objective: objectives.Objective
) -> samplers.Sampler:
  """Of `config.sampler`.

  Raises:
    ValueError: it does not fit the objective, has too few steps, or an interval
      of guidance that is none.
  """
  found = _chosen(_SAMPLERS, config, "sampler")
  samplers.check(found, objective, config.steps)
  classifier_free.check_guidance(1.0, _pair(config, "sampler", "interval"))
  return found


def with_store(config: ConfigDict, store: reader.Latents) -> ConfigDict:
  """The config, with the model's numbers taken from the store.

  Raises:
    ValueError: the config has others, or a label is out of range.
  """
  store.check()
  labels, classes = store.labels(), len(store.classes)
  if labels.min() < 0 or (classes and labels.max() >= classes):
    raise ValueError(
      f"{store.path} has labels from {labels.min()} to {labels.max()}, and "
      f"{classes} classes; labels count from 0: export it again"
    )
  classes = classes or int(labels.max()) + 1
  empty = classes - len(np.unique(labels))
  if empty:
    _LOG.warning(
      "%d of %d classes of %s have no latents", empty, classes, store.path
    )
  return with_numbers(config, store.path, store.shape, classes)


def with_numbers(
  config: ConfigDict, path: str, shape: tuple[int, int, int], classes: int
) -> ConfigDict:
  """The config, with the model's numbers filled in.

  Args:
    config: of the training.
    path: of the store, for messages.
    shape: [h, w, c] of a latent.
    classes: number of classes.

  Raises:
    ValueError: the config has others, or latents are not square.
  """
  height, width, channels = shape
  if height != width:
    raise ValueError(
      f"{path} has latents of {height} x {width}, and only square ones can be "
      "trained on; export square crops"
    )
  found = {
    "latent_size": height, "latent_channels": channels, "num_classes": classes
  }  # fmt: skip
  config = config.copy_and_resolve_references()
  with config.unlocked():
    for key, value in found.items():
      if config.model[key] not in (0, value):
        raise ValueError(
          f"config.model.{key}={config.model[key]}, but {path} has {value}; "
          "leave it 0, or name another config.latents"
        )
      config.model[key] = value
  return config


def model(config: ConfigDict, objective: objectives.Objective) -> Denoiser:
  """The denoiser of `config.model`, whose numbers are filled in."""
  channels = config.latent_channels
  return denoisers.create(
    config.variant,
    latent_size=config.latent_size,
    latent_channels=channels,
    num_classes=config.num_classes,
    patch_size=config.patch_size,
    learn_sigma=objective.output_channels(channels) > channels,
    rematerialisation=config.rematerialisation,
    dtype=config.dtype,
  )


def sample_function(
  denoiser: Denoiser,
  objective: objectives.Objective,
  sampler: samplers.Sampler,
  config: ConfigDict,
  guidance: float,
  sharding: jax.sharding.Sharding,
) -> Callable[..., jax.Array]:
  """`(variables, key, labels [b]) -> z_0 [b, h, w, c]`, scaled; not jitted.

  `sharding` is of the latents while they are drawn; values do not depend on it.
  """
  interval = _pair(config, "sampler", "interval")
  shape = (*denoiser.latent_size, denoiser.latent_channels)

  def sample(variables, key, labels):
    noise_key, sampler_key = jax.random.split(key)
    z = jax.random.normal(noise_key, (len(labels), *shape), jnp.float32)
    z = jax.lax.with_sharding_constraint(z, sharding)
    network = lambda z, t, labels: denoiser.apply(variables, z, t, labels)
    model_fn = classifier_free.guided(
      network, labels, denoiser.num_classes, guidance, interval
    )
    return sampler.sample(objective, model_fn, sampler_key, z, config.steps)

  return sample


def check_same_model(run: str, config: ConfigDict) -> None:
  """Raises ValueError unless a training run has parameters of this model."""
  before = work_directory.read_run_config(run, "train_diffusion")
  models = [
    {key: x["model"][key] for key in _SHAPING} | {"objective": x["objective"]}
    for x in (before, config.to_dict())
  ]
  for model in models:
    model["objective"] = model["objective"]["kind"] == "improved_ddpm"
  found = differences.differences(*models)
  if found:
    raise ValueError(
      f"the model of config.init_from={run} is another one "
      f"({'; '.join(found.values())}); name another run, or the same model"
    )


def averages(
  run: str, denoiser: Denoiser, sharding: jax.sharding.Sharding
) -> tuple[int, Any]:
  """Step, and `{"params": ...}`, of a run's last checkpoint."""
  abstract = {"batch_stats": {}} | denoisers.abstract_variables(denoiser)
  placed = jax.tree.map(lambda _: sharding, abstract)
  step, found = checkpoint.restore_variables(run, "ema", abstract, placed)
  return step, {"params": found["params"]}
