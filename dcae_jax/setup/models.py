"""Autoencoders of configs, runs and released weights; nothing is allocated."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.autoencoder import families, network
from dcae_jax.autoencoder.weights import released
from dcae_jax.data import decoding
from dcae_jax.evaluation import image_metrics
from dcae_jax.runs import differences, work_directory
from dcae_jax.setup import keys


def create(config: ConfigDict) -> network.Network:
  """The autoencoder of `config.model`."""
  return families.create(
    families.of_model(config.variant, config.architecture.to_dict()),
    image_channels=config.image_channels,
    residual_autoencoding=config.residual_autoencoding,
    remat=config.rematerialisation,
    scan=config.scan,
    dtype=config.dtype,
  )


class Identity(NamedTuple):
  """What makes parameters of one model fit another; keys of `config.model`."""

  variant: str
  image_channels: int
  residual_autoencoding: bool
  architecture: dict[str, Any]


def identity(model: Mapping[str, Any]) -> Identity:
  """Of the model's part of a config, with the architecture in whole."""
  architecture = families.described(
    model["variant"], model["architecture"], model["image_channels"]
  )
  whole = {**model, "architecture": architecture}
  return Identity(**{key: whole[key] for key in Identity._fields})


def identity_of(source: str) -> Identity:
  """Of the model of a run, or of released weights.

  Raises UserError if `source` is neither, or damaged.
  """
  if work_directory.is_run(source):
    config = work_directory.read_run_config(source)
    with work_directory.naming_plugins(source, config):
      return identity(config["model"])
  weights = released.find(source)
  architecture, channels = weights.architecture, weights.image_channels
  return Identity(
    families.name_of(architecture),
    channels,
    residual_autoencoding=True,
    architecture=families.to_config(architecture, channels, 1.0),
  )


def in_whole(config: dict[str, Any]) -> dict[str, Any]:
  """The config of a run, whose models may be variants' names, with all keys."""
  for part in (config, *(x for x in config.values() if isinstance(x, dict))):
    model = part.get("model", {})
    is_autoencoder = "image_channels" in model
    if is_autoencoder and "architecture" in model and model["variant"]:
      model |= identity(model)._asdict()
  return config


def check_same(before: Identity, now: ConfigDict, name: str) -> None:
  """Raises UserError unless parameters of a model fit `config.model` of now.

  `name` is what messages call the model of before.
  """
  there = differences.flat(before._asdict())
  here = differences.flat(identity(keys.resolved(now))._asdict())
  for key in here:
    if there.get(key) != here[key]:
      raise errors.UserError(
        f"{name} has config.model.{key}={there.get(key)!r}, and this config "
        f"{here[key]!r}; use weights of the same autoencoder, or take its "
        "model with config.model.variant=''"
      )


def variant_of(source: str) -> tuple[families.Architecture, int]:
  """The architecture and image channels; see `identity_of`."""
  model = identity_of(source)
  variant = families.of_model(model.variant, model.architecture)
  return variant, model.image_channels


def with_model(config: ConfigDict) -> ConfigDict:
  """The config with its model in whole: that of `init_from` if it has none."""
  if config.model.variant:
    model = identity(keys.resolved(config.model))
  elif config.init_from:
    model = identity_of(config.init_from)
  else:
    known = ", ".join(families.variants())
    raise errors.UserError(
      f"config.model.variant is empty; name one of {known}, or set "
      "config.init_from, whose model is taken then"
    )
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model.update(model._asdict())
  return config


def check_resolutions(
  resolutions: tuple[int, ...], config: ConfigDict, key: str
) -> None:
  """Raises UserError for images that a model cannot encode or evaluate.

  The key is that of the resolutions, as in `check_sides`.
  """
  decoding.check_channels(config.image_channels)
  check_sides(resolutions, create(config).spatial_compression, key)


def check_sides(
  resolutions: tuple[int, ...],
  compression: int,
  key: str = "config.resolutions",
) -> None:
  """Raises UserError for image sides that cannot be encoded or evaluated."""
  for resolution in resolutions:
    if not isinstance(resolution, int):
      raise errors.UserError(
        f"image side {resolution!r} in {key} is not a whole number"
      )
    network.check_side(resolution, compression, key=key)
    if resolution < image_metrics.SMALLEST_SIDE:
      raise errors.UserError(
        f"image side {resolution} in {key} is below "
        f"{image_metrics.SMALLEST_SIDE}, the smallest that SSIM can be "
        "computed for"
      )
