"""From config to a latent diffusion model: denoiser, objective, sampler."""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.diffusion import (
  conditioning,
  guidance,
  objectives,
  samplers,
  sampling,
)
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.diffusion.denoisers import released
from dcae_jax.latents import aspect_ratios, reader
from dcae_jax.runs import differences, work_directory
from dcae_jax.setup import latent_reading, text
from dcae_jax.training import checkpoint

_LOG = logging.getLogger(__name__)
_OBJECTIVES = {
  "scaled_linear": lambda c: dataclasses.replace(
    objectives.scaled_linear(), first_time=c.first_time
  ),
  "improved_ddpm": lambda c: objectives.improved_ddpm(),
  "flow": lambda c: objectives.FlowMatching(
    _pair(c, "objective", "logit_normal"), c.shift, c.convention
  ),
}
# Of modules, what does not decide on their parameters and what they mean.
_OF_USE = ("dtype", "remat", "parent", "name")
_SAMPLERS = {
  "dpm_solver": lambda c: samplers.DPMSolver(),
  "dpm_solver_time": lambda c: samplers.TimeDPMSolver(),
  "ddpm": lambda c: samplers.DDPM(),
  "ddim": lambda c: samplers.DDIM(c.eta),
  "euler": lambda c: samplers.Euler(),
  "heun": lambda c: samplers.Heun(),
  "dopri5": lambda c: samplers.Dopri5(c.atol, c.rtol),
  "flow_dpm_solver": lambda c: samplers.FlowDPMSolver(),
}


def _pair(
  config: ConfigDict, name: str, key: str
) -> tuple[float, float] | None:
  """Two numbers, or None for an empty tuple."""
  values = tuple(config[key])
  if len(values) not in (0, 2) or not all(map(_is_number, values)):
    raise errors.UserError(
      f"config.{name}.{key}={values} is not two numbers; () leaves it out"
    )
  return values or None


def _is_number(value: Any) -> bool:
  return type(value) in (int, float) and math.isfinite(value)


def check_guidance(key: str, scales: Sequence[Any]) -> None:
  """Raises UserError for scales that are not finite, or given twice."""
  for scale in scales:
    if not _is_number(scale):
      raise errors.UserError(
        f"{key}={scales}: {scale!r} is not a finite number"
      )
    guidance.check_guidance(scale, None)
  if len({f"{scale:g}" for scale in scales}) < len(scales):
    raise errors.UserError(
      f"{key}={scales} names a scale twice (six digits count)"
    )


def _chosen(known: dict[str, Callable], config: ConfigDict, key: str) -> Any:
  if config.kind not in known:
    raise errors.UserError(
      f"unknown config.{key}.kind={config.kind!r}; known are {', '.join(known)}"
    )
  return known[config.kind](config)


def conditioning_of(config: ConfigDict) -> type[conditioning.Conditioning]:
  """The kind of condition that the denoiser of `config.model` takes."""
  return denoisers.DENOISERS[variant_of(config).family].conditioning


def variant_of(config: ConfigDict) -> denoisers.Variant:
  """The denoiser of `config.model`; UserError if there can be none."""
  architecture = config.architecture.to_dict()
  return denoisers.of_model(config.variant, architecture)


def open_store(config: ConfigDict) -> aspect_ratios.Store:
  """The latents of a training, with the conditions that its denoiser takes."""
  open_one = lambda path, count: reader.Latents(
    path,
    conditions=(conditioning_of(config.model).name,),
    cache_megabytes=latent_reading.cache_megabytes(config) / count,
    retries=config.data.retries,
    normalisation=config.data.normalisation,
  )
  return aspect_ratios.opened(config.latents, open_one, config.data.retries)


def with_store(config: ConfigDict, store: aspect_ratios.Store) -> ConfigDict:
  """The config, with the model's numbers taken from the store.

  Raises UserError if the config has others, or for conditions that cannot be.
  """
  store.check()
  rows = store.condition(conditioning_of(config.model).name)
  return with_numbers(config, store.path, store.shape, rows, store.classes)


def with_numbers(
  config: ConfigDict,
  path: str,
  shape: tuple[int, int, int],
  rows: np.ndarray,
  classes: Sequence[str],
) -> ConfigDict:
  """The config, with the model's numbers for latents [h, w, c] filled in.

  Those of its conditions are of the rows of the store, or of the text encoder.
  Messages name the path of the store. Raises UserError if the config has
  others, or latents are not square.
  """
  height, width, channels = shape
  if height != width:
    raise errors.UserError(
      f"{path} has latents of {height} x {width}, and only square ones can be "
      "trained on; export square crops"
    )
  conditions = conditioning_of(config.model).of_latents(rows, classes, path)
  numbers = {"latent_size": height, "latent_channels": channels}
  if conditions.is_text:
    config = with_captions(config)
  else:
    numbers |= dataclasses.asdict(conditions)
  return _filled(config, numbers, path, "config.latents")


def with_captions(config: ConfigDict) -> ConfigDict:
  """The config, with the numbers of captions taken from its text encoder.

  As it is, if its model is told none. Raises UserError if it has others.
  """
  if not conditioning_of(config.model).is_text:
    return config
  numbers = dataclasses.asdict(text.conditioning_of(config.text))
  return _filled(config, numbers, config.text.encoder, "config.text")


def _filled(
  config: ConfigDict, numbers: dict[str, int], path: str, owner: str
) -> ConfigDict:
  """The config with the model's numbers; UserError if it has others."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    for key, value in numbers.items():
      group = config.model
      if key not in group:
        group = group.condition
      if group.get(key, 0) not in (0, value):
        raise errors.UserError(
          f"config.model.{key}={group[key]}, but {path} has {value}; leave it "
          f"0, or name another {owner}"
        )
      group[key] = value
  return config


def numbers_of_latents(model: ConfigDict) -> dict[str, int]:
  """What `with_numbers` fills in of `config.model`; 0: it has not yet."""
  known = model.to_dict() | model.condition.to_dict()
  fields = dataclasses.fields(conditioning_of(model))
  names = ("latent_size", "latent_channels", *(field.name for field in fields))
  return {name: known.get(name, 0) for name in names}


def create(
  model: ConfigDict,
  objective: ConfigDict,
  sampler: ConfigDict,
  variant: denoisers.Variant | None = None,
) -> sampling.LatentDiffusion:
  """The model of a config whose numbers are filled in.

  Its denoiser has the sizes of the `variant`, or those that it names.
  Raises UserError for a sampler or steps that do not fit the objective, or an
  interval of guidance that is none.
  """
  learned = _chosen(_OBJECTIVES, objective, "objective")
  drawn = _chosen(_SAMPLERS, sampler, "sampler")
  samplers.check(drawn, learned, sampler.steps)
  interval = _pair(sampler, "sampler", "interval")
  guidance.check_guidance(1.0, interval)
  kind, channels = conditioning_of(model), model.latent_channels
  numbers = numbers_of_latents(model)
  fields = {x.name: numbers[x.name] for x in dataclasses.fields(kind)}
  denoiser = denoisers.create(
    variant or variant_of(model),
    conditioning=kind(**fields),
    latent_size=model.latent_size,
    latent_channels=channels,
    patch_size=model.patch_size,
    learn_sigma=learned.output_channels(channels) > channels,
    remat=model.rematerialisation,
    dtype=model.dtype,
  )
  return sampling.LatentDiffusion(
    denoiser, learned, drawn, sampler.steps, interval
  )


def check_same_model(
  source: str, config: ConfigDict, model: sampling.LatentDiffusion
) -> None:
  """Raises UserError unless a run, or released weights, are of this model."""
  if not work_directory.is_run(source):
    found = released.find(source)
    there = _described(released.create(found), found.objective)
    here = _described(model.denoiser, model.objective)
    there["normalisation"] = "channels" if found.normalisation else "factor"
    here["normalisation"] = config.data.normalisation
    differences.check_same(
      there,
      here,
      f"the model of config.init_from={source} is another one",
      "set config.model, config.objective and config.data.normalisation to "
      "what it has",
    )
    return
  before = work_directory.read_run_config(source, "train_diffusion")
  shaping = ("patch_size", *numbers_of_latents(config.model))

  def of_config(config):
    model = config["model"]
    architecture = model.get("architecture", {})  # earlier ones had none
    variant = denoisers.of_model(model["variant"], architecture)
    return {key: model.get(key) for key in shaping} | {
      "condition": model.get("condition", {}),
      "denoiser": {"family": variant.family} | dict(variant.fields),
      "objective": config["objective"]["kind"] == "improved_ddpm",
      "normalisation": config.get("data", {}).get("normalisation", "factor"),
    }

  with work_directory.naming_plugins(source, before):
    models = [of_config(x) for x in (before, config.to_dict())]
  differences.check_same(
    *models,
    f"the model of config.init_from={source} is another one",
    "name another run, or the same model",
  )


def _described(
  denoiser: denoisers.Module, objective: objectives.Objective
) -> dict[str, Any]:
  fields = {
    field.name: getattr(denoiser, field.name)
    for field in dataclasses.fields(denoiser)
    if field.name not in _OF_USE
  }
  kind = type(objective).__name__
  return fields | {
    "conditioning": dataclasses.asdict(denoiser.conditioning),
    "objective": {"kind": kind} | dataclasses.asdict(objective),
  }


def starting_variables(
  source: str,
  denoiser: denoisers.Module,
  sharding: jax.sharding.Sharding,
  null_caption: np.ndarray | None,
) -> Any:
  """`{"params": ...}` of a run's averages, or of released weights.

  Those that have no null caption get the one that is given.
  """
  if work_directory.is_run(source):
    step, variables = averages(source, denoiser, sharding)
    _LOG.info("starting from step %d of %s", step, source)
    return variables
  found = released.find(source)
  variables = jax.device_get(released.read(found))
  if not found.has_null and null_caption is not None:
    variables["params"]["null_caption"] = null_caption
  _LOG.info("starting from %s", found.label)
  return variables


def averages(
  run: str, denoiser: denoisers.Module, sharding: jax.sharding.Sharding
) -> tuple[int, Any]:
  """Step, and `{"params": ...}`, of a run's last checkpoint."""
  abstract = {"batch_stats": {}} | denoisers.abstract_variables(denoiser)
  placed = jax.tree.map(lambda _: sharding, abstract)
  step, restored = checkpoint.restore_variables(run, "ema", abstract, placed)
  return step, {"params": restored["params"]}
