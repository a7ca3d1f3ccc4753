"""The denoisers by name: DiT and U-ViT in the sizes of DC-AE's table 3.

Both are modules with one interface: `model.apply(variables, z, t, labels)`, of
noisy latents, times of 0 to 999 and classes, gives what is predicted in the
shape of the latents. What that is (noise or velocity) is not decided here.
"""

import dataclasses
from typing import Any

import jax
from jax.typing import DTypeLike

from dcae_jax.diffusion.denoisers import dit, uvit
from dcae_jax.nn import precision

PATCH_SIZES = (1, 2, 4, 8)
_FAMILIES = ("DiT", "UViT")


@dataclasses.dataclass(frozen=True)
class Variant:
  """An architecture.

  Attributes:
    family: "DiT" or "UViT".
    depth: number of blocks; U-ViT has one more in the middle.
    hidden: channels of a token.
    heads: of the attention.
  """

  family: str
  depth: int
  hidden: int
  heads: int


VARIANTS: dict[str, Variant] = {
  "DiT-S": Variant("DiT", 12, 384, 6),
  "DiT-B": Variant("DiT", 12, 768, 12),
  "DiT-L": Variant("DiT", 24, 1024, 16),
  "DiT-XL": Variant("DiT", 28, 1152, 16),
  "DiT-tiny": Variant("DiT", 4, 128, 4),
  "UViT-S": Variant("UViT", 12, 512, 8),
  "UViT-M": Variant("UViT", 16, 768, 12),
  "UViT-L": Variant("UViT", 20, 1024, 16),
  "UViT-H": Variant("UViT", 28, 1152, 16),
  "UViT-2B": Variant("UViT", 28, 2048, 32),
  "UViT-tiny": Variant("UViT", 4, 128, 4),
}


def check_variant(name: str) -> Variant:
  """The variant of that name; ValueError with the known names otherwise."""
  if name not in VARIANTS:
    raise ValueError(
      f"unknown denoiser {name!r}; known are {', '.join(VARIANTS)}"
    )
  return VARIANTS[name]


def check_architecture(variant: Variant) -> None:
  """Raises ValueError for numbers that do not fit together."""
  v = variant
  if v.family not in _FAMILIES:
    raise ValueError(
      f"unknown family {v.family!r} of denoisers; known are "
      f"{', '.join(_FAMILIES)}"
    )
  if v.heads < 1 or v.hidden < 1 or v.hidden % v.heads:
    raise ValueError(
      f"hidden={v.hidden} is not divisible by heads={v.heads}: each head owns "
      "as many channels of a token; change one of them"
    )
  divisor = {"DiT": 4, "UViT": 2}[v.family]
  if v.hidden % divisor:
    raise ValueError(
      f"hidden={v.hidden} is not divisible by {divisor}, as the sines and "
      f"cosines of {v.family} need it; use {v.hidden // divisor * divisor} or "
      f"{(v.hidden // divisor + 1) * divisor}"
    )
  if v.depth < 1 or (v.family == "UViT" and v.depth % 2):
    raise ValueError(
      f"depth={v.depth} of a {v.family}; use at least 1 block, and an even "
      "number for UViT, half before and half behind the middle"
    )


def _check_settings(
  latent_size: tuple[int, int],
  latent_channels: int,
  num_classes: int,
  patch_size: int,
) -> None:
  """Raises ValueError for latents that a denoiser cannot be made for."""
  if patch_size not in PATCH_SIZES:
    raise ValueError(
      f"patch_size={patch_size} is not one of "
      f"{', '.join(map(str, PATCH_SIZES))}"
    )
  for side in latent_size:
    if side < 1 or side % patch_size:
      raise ValueError(
        f"latent side {side} is not divisible by patch_size={patch_size}; use "
        "a smaller patch size (1 always fits), or images of another size"
      )
  if latent_channels < 1:
    raise ValueError(
      f"latent_channels={latent_channels} is below 1; give the number of the "
      "autoencoder that the latents are of"
    )
  if num_classes < 1:
    raise ValueError(
      f"num_classes={num_classes} is below 1; give 1, and every image the "
      "label 0, for data without classes"
    )


def create(
  variant: str | Variant,
  *,
  latent_size: int | tuple[int, int],
  latent_channels: int,
  num_classes: int,
  patch_size: int = 1,
  learn_sigma: bool = False,
  rematerialisation: bool = False,
  dtype: DTypeLike = "float32",
) -> dit.DiT | uvit.UViT:
  """The module of a variant.

  Args:
    variant: a key of `VARIANTS`, or an architecture of one's own.
    latent_size: the side of square latents, or their rows and columns.
    latent_channels: of the latents.
    num_classes: without the null class, which is added.
    patch_size: side of the squares of latent positions that make a token; DC-AE
      leaves the compression to the autoencoder, and it is 1.
    learn_sigma: predict the variance too, in as many channels again; DiT only.
    rematerialisation: trade time for memory, block by block.
    dtype: of the linear layers; what else there is stays float32.

  Raises:
    ValueError: unknown variant, or numbers that do not fit together.
  """
  v = check_variant(variant) if isinstance(variant, str) else variant
  check_architecture(v)
  precision.check_dtype(dtype)
  if isinstance(latent_size, int):
    latent_size = (latent_size, latent_size)
  _check_settings(latent_size, latent_channels, num_classes, patch_size)
  settings = {
    "depth": v.depth,
    "hidden": v.hidden,
    "heads": v.heads,
    "latent_size": tuple(latent_size),
    "latent_channels": latent_channels,
    "num_classes": num_classes,
    "patch_size": patch_size,
    "rematerialisation": rematerialisation,
    "dtype": dtype,
  }
  if v.family == "DiT":
    return dit.DiT(**settings, learn_sigma=learn_sigma)
  if learn_sigma:
    raise ValueError(
      "learn_sigma is for DiT: a UViT predicts no variance; switch it off"
    )
  return uvit.UViT(**settings)


def abstract_variables(model: dit.DiT | uvit.UViT) -> Any:
  """Shapes of `{"params": ...}`; nothing is allocated."""
  shape = (1, *model.latent_size, model.latent_channels)
  return jax.eval_shape(
    model.init,
    jax.random.key(0),
    jax.ShapeDtypeStruct(shape, "float32"),
    jax.ShapeDtypeStruct((1,), "float32"),
    jax.ShapeDtypeStruct((1,), "int32"),
  )
