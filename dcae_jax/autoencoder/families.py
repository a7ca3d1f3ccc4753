"""Autoencoders of either kind, DC-AE and SD-VAE, through one set of functions.

Variants by name, the module of one, and `config.json` as diffusers has it.
"""

from types import ModuleType
from typing import Any

from jax.typing import DTypeLike

from dcae_jax.autoencoder.dcae import hub_config as dcae_hub_config
from dcae_jax.autoencoder.dcae import network as dcae
from dcae_jax.autoencoder.dcae import variants as dcae_variants
from dcae_jax.autoencoder.sd_vae import hub_config as sd_vae_hub_config
from dcae_jax.autoencoder.sd_vae import network as sd_vae

Variant = dcae_variants.Variant | sd_vae.Variant
Model = dcae.DCAE | sd_vae.SDVAE
VARIANTS: dict[str, Variant] = dcae_variants.VARIANTS | sd_vae.VARIANTS
# By the classes that diffusers has for them; the first one where none is named.
_CONFIGS: dict[str, ModuleType] = {
  "AutoencoderDC": dcae_hub_config,
  "AutoencoderKL": sd_vae_hub_config,
}


def check_variant(name: str) -> Variant:
  """The variant of that name; ValueError with the known names otherwise."""
  if name not in VARIANTS:
    raise ValueError(
      f"unknown variant {name!r}; known are {', '.join(VARIANTS)}"
    )
  return VARIANTS[name]


def create(
  variant: str | Variant,
  *,
  image_channels: int = 3,
  residual_autoencoding: bool = True,
  rematerialisation: bool = False,
  scan: bool = False,
  dtype: DTypeLike = "float32",
  space_to_channel: int = 1,
) -> Model:
  """The module of a variant.

  Args:
    variant: a key of `VARIANTS`, or an architecture of one's own.
    image_channels: 3, 1 for grey images, or any other number.
    residual_autoencoding: False removes DC-AE's shortcuts, the paper's
      ablation.
    rematerialisation: trade time for memory, block by block.
    scan: compile the blocks of DC-AE's stages as loops.
    dtype: of the computation; attention and norms stay float32.
    space_to_channel: side of the squares of latent positions that are moved
      into channels; 1: none.

  Raises:
    ValueError: unknown variant, stages that do not fit together, or SD-VAE
      without shortcuts that it never had.
  """
  v = check_variant(variant) if isinstance(variant, str) else variant
  shared = {
    "image_channels": image_channels,
    "rematerialisation": rematerialisation,
    "dtype": dtype,
    "space_to_channel": space_to_channel,
  }
  if isinstance(v, dcae_variants.Variant):
    return dcae.create(
      v, residual_autoencoding=residual_autoencoding, scan=scan, **shared
    )
  if not residual_autoencoding:
    raise ValueError(
      "residual_autoencoding=False is DC-AE's ablation, and SD-VAE has no "
      "shortcuts around its resampling; leave it True"
    )
  return sd_vae.create(v, **shared)


def class_name(variant: Variant) -> str:
  """The class that diffusers has for it."""
  is_dc = isinstance(variant, dcae_variants.Variant)
  return "AutoencoderDC" if is_dc else "AutoencoderKL"


def from_config(config: dict[str, Any]) -> tuple[Variant, int]:
  """The variant and image channels of a `config.json`.

  Raises:
    ValueError: another class, an unknown block, norm or activation, or lists
      that do not fit.
  """
  variant, image_channels = _class_of(config).from_config(config)
  return VARIANTS.get(name_of(variant), variant), image_channels


def to_config(
  variant: Variant,
  image_channels: int,
  scaling_factor: float,
  shift_factor: float = 0.0,
) -> dict[str, Any]:
  """Inverse of `from_config`.

  Raises:
    ValueError: the class that diffusers has for it has no setting for it.
  """
  return _CONFIGS[class_name(variant)].to_config(
    variant, image_channels, scaling_factor, shift_factor
  )


def defaults(config: dict[str, Any]) -> dict[str, Any]:
  """All keys that a `config.json` of its class can have, with their defaults.

  Raises:
    ValueError: another class.
  """
  return _class_of(config).DEFAULTS


def _class_of(config: dict[str, Any]) -> ModuleType:
  name = config.get("_class_name") or next(iter(_CONFIGS))
  if not isinstance(name, str) or name not in _CONFIGS:
    raise ValueError(f"_class_name={name!r} is not among {', '.join(_CONFIGS)}")
  return _CONFIGS[name]


def of_model(variant: str, config: dict[str, Any]) -> Variant:
  """What a run's `config.model` says: a named variant, or one by its config."""
  return from_config(config)[0] if config else check_variant(variant)


def name_of(variant: Variant) -> str:
  """The key of `VARIANTS` that has this architecture, or "custom"."""
  for name, known in VARIANTS.items():
    if _plain(known) == _plain(variant):
      return name
  return "custom"


def _plain(variant: Variant) -> Variant:
  if isinstance(variant, dcae_variants.Variant):
    return dcae_hub_config.plain(variant)
  return variant
