"""The table of denoisers: DiT and U-ViT of classes, PixArt and SANA of texts.

All are modules with one interface: `model.apply(variables, z, t, condition)`,
of noisy latents, times as `model_time` of the objective counts them and a
condition of the kind `model.conditioning`, gives what is predicted in the shape
of the latents. What that is (noise or velocity) is not decided here.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dcae_jax import errors
from dcae_jax.diffusion import conditioning as conditioning_lib
from dcae_jax.diffusion.denoisers import dit, pixart, sana, uvit
from dcae_jax.nn import precision

PATCH_SIZES = (1, 2, 4, 8)
_PLAIN = {int, float, bool, str, type(None)}
# Fields of modules that are no part of an architecture.
_NO_ARCHITECTURE = {
  "latent_size", "latent_channels", "conditioning", "patch_size",
  "learn_sigma", "remat", "dtype", "parent", "name",
}  # fmt: skip
Module = nn.Module  # of the interface above


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """A kind of denoiser.

  Attributes:
    module: its class. Besides the fields that `sizes` sets it has
      `conditioning`, `latent_size`, `latent_channels`, `patch_size`, `remat`
      and `dtype`, maybe `learn_sigma`, and the property `forward_macs`.
    sizes: the fields of each size, by its suffix, such as H of UViT-H.
    conditioning: the class of condition that it takes.
    check: raises UserError for fields that do not fit together.
  """

  module: type[Module]
  sizes: Mapping[str, Mapping[str, Any]]
  conditioning: type[conditioning_lib.Conditioning]
  check: Callable[..., None] = lambda **fields: None

  @property
  def predicts_variance(self) -> bool:
    """With `learn_sigma`, in as many channels again."""
    fields = dataclasses.fields(self.module)
    return "learn_sigma" in {field.name for field in fields}


_CLASSES = conditioning_lib.ClassLabels
_CAPTIONS = conditioning_lib.Captions
DENOISERS: dict[str, Denoiser] = {
  "DiT": Denoiser(dit.DiT, dit.SIZES, _CLASSES, dit.check),
  "UViT": Denoiser(uvit.UViT, uvit.SIZES, _CLASSES, uvit.check),
  "PixArt": Denoiser(pixart.PixArt, pixart.SIZES, _CAPTIONS, pixart.check),
  "SANA": Denoiser(sana.Sana, sana.SIZES, _CAPTIONS, sana.check),
}


@dataclasses.dataclass(frozen=True)
class Variant:
  """A key of `DENOISERS`, and fields of its module as in `Denoiser.sizes`."""

  family: str
  fields: Mapping[str, Any]


def variants() -> dict[str, Variant]:
  """All sizes of all denoisers by name, such as "UViT-H"."""
  return {
    f"{family}-{size}": Variant(family, fields)
    for family, kind in DENOISERS.items()
    for size, fields in kind.sizes.items()
  }


def find(name: str) -> Variant:
  """The variant of that name; raises UserError for an unknown one."""
  known = variants()
  if name not in known:
    raise errors.UserError(
      f"unknown denoiser {name!r}; known are {', '.join(known)}"
    )
  return known[name]


def list_denoisers() -> list[str]:
  """The names that `config.model.variant` of a denoiser takes."""
  return list(variants())


def of_model(name: str, architecture: Mapping[str, Any]) -> Variant:
  """The denoiser that `config.model` of a run describes.

  Args:
    name: a key of `variants()`, or one of `DENOISERS` alone, maybe with a dash
      and a word behind it, beside a whole architecture.
    architecture: `config.model.architecture`, the fields of the module in which
      it differs from the variant.

  Raises:
    UserError: an unknown name, or fields that there are not, that are of the
      wrong type, that are missing or that do not fit together.
  """
  family = name.partition("-")[0]
  if not architecture or (name not in variants() and family not in DENOISERS):
    return find(name)
  sizes = variants()[name].fields if name in variants() else {}
  fields = {**sizes, **architecture}
  with errors.prefixed(f"config.model.architecture of {name}: "):
    _check_fields(family, fields)
    DENOISERS[family].check(**fields)
  return Variant(family, fields)


def fields_of(module: type[Module]) -> dict[str, dataclasses.Field]:
  """The fields of a denoiser's class that its architecture is made of."""
  return {
    field.name: field
    for field in dataclasses.fields(module)
    if field.name not in _NO_ARCHITECTURE
  }


def _check_fields(family: str, fields: Mapping[str, Any]) -> None:
  """Raises UserError for fields that a module cannot be made with."""
  known = fields_of(DENOISERS[family].module)
  for name, value in fields.items():
    if name not in known:
      raise errors.UserError(
        f"{name!r} is no field of {family}; {errors.meant(name, known)}"
      )
    kind = known[name].type
    kinds = kind.__args__ if isinstance(kind, types.UnionType) else (kind,)
    kinds = (*kinds, int) if float in kinds else kinds
    if _PLAIN.issuperset(kinds) and type(value) not in kinds:
      raise errors.UserError(
        f"{name}={value!r} is not of the type {' or '.join(map(_word, kinds))}"
      )
  for name, field in known.items():
    if name not in fields and field.default is dataclasses.MISSING:
      raise errors.UserError(f"{name} is missing")


def _word(kind: Any) -> str:
  return kind.__name__.replace("NoneType", "None")


def resized(variant: Variant, depth: int = 0, hidden: int = 0) -> Variant:
  """The variant with other sizes, 0: its own; heads are as wide.

  Raises UserError for a width that they do not divide.
  """
  fields = dict(variant.fields)
  width = fields["hidden"] // fields["heads"]
  if hidden % width:
    raise errors.UserError(
      f"hidden={hidden} is not a multiple of {width}, the width of a head of "
      f"this {variant.family}"
    )
  fields["depth"] = depth or fields["depth"]
  fields["hidden"] = hidden or fields["hidden"]
  fields["heads"] = fields["hidden"] // width
  return Variant(variant.family, fields)


def family_of(model: Module) -> str:
  """The key of `DENOISERS` whose module it is."""
  return next(
    name for name, kind in DENOISERS.items() if type(model) is kind.module
  )


def _check_latents(model: Module) -> None:
  """Raises UserError for latents that a denoiser cannot be made for."""
  if model.patch_size not in PATCH_SIZES:
    raise errors.UserError(
      f"patch_size={model.patch_size} is not one of "
      f"{', '.join(map(str, PATCH_SIZES))}"
    )
  for side in model.latent_size:
    if side < 1 or side % model.patch_size:
      raise errors.UserError(
        f"latent side {side} is not divisible by patch_size="
        f"{model.patch_size}; use a smaller one (1 always fits), or images of "
        "another size"
      )
  if model.latent_channels < 1:
    raise errors.UserError(
      f"latent_channels={model.latent_channels} is below 1; give the number of "
      "the autoencoder that the latents are of"
    )


def create(
  variant: str | Variant,
  *,
  conditioning: conditioning_lib.Conditioning,
  latent_size: int | tuple[int, int],
  latent_channels: int,
  learn_sigma: bool = False,
  **options: Any,
) -> Module:
  """The module of a variant.

  Args:
    variant: a key of `variants()`, or an architecture of your own.
    conditioning: what it is told besides the time.
    latent_size: the side of square latents, or their rows and columns.
    latent_channels: of the latents.
    learn_sigma: predict the variance too, in as many channels again.
    **options: `patch_size`, the side of the squares of latent positions that
      make a token (1: DC-AE leaves the compression to the autoencoder); `remat`
      to trade time for memory, block by block (False); `dtype` of the linear
      layers (float32, as all else always is).

  Raises:
    UserError: unknown variant, or numbers that do not fit together.
  """
  variant = find(variant) if isinstance(variant, str) else variant
  family, fields = variant.family, dict(variant.fields)
  if family not in DENOISERS:
    raise errors.UserError(
      f"unknown family {family!r} of denoisers; known are "
      f"{', '.join(DENOISERS)}"
    )
  kind = DENOISERS[family]
  kind.check(**fields)
  if isinstance(latent_size, int):
    latent_size = (latent_size, latent_size)
  if kind.predicts_variance:
    fields["learn_sigma"] = learn_sigma
  elif learn_sigma:
    able = [name for name, k in DENOISERS.items() if k.predicts_variance]
    raise errors.UserError(
      f"learn_sigma is for {', '.join(able)}: a {family} predicts no variance; "
      "switch it off"
    )
  model = kind.module(
    **fields,
    conditioning=conditioning,
    latent_size=tuple(latent_size),
    latent_channels=latent_channels,
    **options,
  )
  precision.check_dtype(model.dtype)
  _check_latents(model)
  return model


def init(model: Module, key: jax.Array) -> Any:
  """Initial values, `{"params": ...}`."""
  shape = (1, *model.latent_size, model.latent_channels)
  zeros = lambda x: jnp.zeros(x.shape, x.dtype)
  condition = jax.tree.map(zeros, model.conditioning.abstract(1))
  return model.init(key, jnp.zeros(shape), jnp.zeros(1), condition)


def abstract_variables(model: Module) -> Any:
  """Shapes of `{"params": ...}`; nothing is allocated."""
  return jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
