"""The families of autoencoders, and what is the same for all of them.

A family is one file with a `family.Family`, and one line of `FAMILIES`.
"""

from typing import Any

from dcae_jax import errors
from dcae_jax.autoencoder import family, network
from dcae_jax.autoencoder.dcae import family as dcae
from dcae_jax.autoencoder.sd_vae import family as sd_vae

Architecture = family.Architecture
# By name; the first one where a `config.json` names no class.
FAMILIES: dict[str, family.Family] = {
  "DC-AE": dcae.DC_AE,
  "SD-VAE": sd_vae.SD_VAE,
}


def of(architecture: Architecture) -> family.Family:
  """The family that an architecture belongs to."""
  return {f.architecture: f for f in FAMILIES.values()}[type(architecture)]


def variants() -> dict[str, Architecture]:
  """The architectures of all families by name."""
  return {name: v for f in FAMILIES.values() for name, v in f.variants.items()}


def list_variants() -> list[str]:
  """The names that `config.model.variant` of an autoencoder takes."""
  return list(variants())


def check_variant(name: str) -> Architecture:
  """The variant of that name; raises UserError if there is none."""
  known = variants()
  if name not in known:
    raise errors.UserError(
      f"unknown variant {name!r}; known are {', '.join(known)}"
    )
  return known[name]


def create(
  variant: str | Architecture, *, image_channels: int = 3, **options: Any
) -> network.Network:
  """The network of a variant.

  Raises UserError for an unknown variant, stages that do not fit together, or
  options that the family does not have.

  Args:
    variant: a name among `variants`, or an architecture of your own.
    image_channels: 3, 1 for grey images, or any other number.
    **options: fields of `network.Options`.
  """
  if isinstance(variant, str):
    variant = check_variant(variant)
  return of(variant).create(variant, image_channels, network.Options(**options))


def by_class(config: dict[str, Any]) -> family.Family:
  """The family of the class that a `config.json` names.

  Raises UserError for a class of no family.
  """
  known = {f.class_name: f for f in FAMILIES.values()}
  name = config.get("_class_name") or next(iter(known))
  if not isinstance(name, str) or name not in known:
    raise errors.UserError(
      f"_class_name={name!r} is not among {', '.join(known)}; a family of your "
      "own is added by importing its module first"
    )
  return known[name]


def from_config(config: dict[str, Any]) -> tuple[Architecture, int]:
  """The architecture and image channels of a `config.json`.

  Raises UserError for unknown settings, or lists that do not fit.
  """
  architecture, image_channels = by_class(config).from_config(config)
  known = variants().get(name_of(architecture), architecture)
  return known, image_channels


def to_config(
  architecture: Architecture,
  image_channels: int,
  scaling_factor: float,
  shift_factor: float = 0.0,
) -> dict[str, Any]:
  """The inverse of `from_config`.

  Raises UserError if the class that diffusers has for it has no such setting.
  """
  return of(architecture).to_config(
    architecture, image_channels, scaling_factor, shift_factor
  )


def of_model(variant: str, config: dict[str, Any]) -> Architecture:
  """The architecture that `config.model` of a run describes.

  Raises UserError for an unknown variant without a whole config, or a key that
  the variant does not have.

  Args:
    variant: a name among `variants`, or any other beside a whole `config`.
    config: `config.model.architecture`, the keys of a `config.json`: none, or
      those in which it differs from the variant, or all of them.
  """
  if not config:
    return check_variant(variant)
  known = variants().get(variant)
  if known is None and variant != "custom" and "_class_name" not in config:
    check_variant(variant)  # it is unknown, and the config is not whole
  with errors.prefixed(f"config.model.architecture of {variant!r}: "):
    whole = {} if known is None else to_config(known, 3, 1.0)
    f = by_class(whole or config)
    if config.get("_class_name", f.class_name) != f.class_name:
      raise errors.UserError(
        f"_class_name={config['_class_name']!r} is not {f.class_name!r}, as "
        "that variant's is"
      )
    for key in config:
      if key not in {"_class_name", *f.config_defaults, *whole}:
        raise errors.UserError(
          f"{key!r} is no key of {f.class_name}; "
          f"{errors.meant(key, f.config_defaults)}"
        )
    return from_config(whole | config)[0]


def described(
  variant: str, config: dict[str, Any], image_channels: int
) -> dict[str, Any]:
  """`config.model.architecture` in whole, for runs that know no such variant.

  {} if its class in diffusers has no setting for the architecture, which then
  has its name alone.
  """
  architecture = of_model(variant, config)
  try:
    return to_config(architecture, image_channels, 1.0)
  except ValueError:
    return {}


def name_of(architecture: Architecture) -> str:
  """The name among `variants` of this architecture, or "custom"."""
  f = of(architecture)
  for name, known in f.variants.items():
    if f.plain(known) == f.plain(architecture):
      return name
  return "custom"
