"""Images and latents as people pass them: checked, converted, padded."""

import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcae_jax import errors
from dcae_jax.autoencoder import network, quantisation

_TOLERANCE = 1e-3  # of [-1, 1]


def checked_images(images: Any, image_channels: int) -> np.ndarray:
  """uint8, or float32 in [-1, 1]; raises UserError for anything else."""
  if hasattr(images, "getbands"):  # of an image of PIL
    raise errors.UserError(
      "images are one PIL image, not an array; pass "
      f"{_of_pil('image', image_channels)}"
    )
  x = _array(images, "images", "images", image_channels)
  _check_channels(x, "images", "images", image_channels)
  if x.dtype == np.uint8:
    return x
  x = _checked_floats(x, "images", "uint8, or float in [-1, 1]")
  low, high = float(x.min()), float(x.max())
  if low < -1 - _TOLERANCE or high > 1 + _TOLERANCE:
    advice = "pass pixels as uint8, or scale them: images / 127.5 - 1"
    if max(-low, high) < 2:
      advice = "clip them: np.clip(images, -1, 1)"
    raise errors.UserError(
      f"images have values from {low:.4g} to {high:.4g}, outside [-1, 1]; "
      f"{advice}"
    )
  return x


def may_be_from_zero(x: np.ndarray) -> bool:
  """Whether images that are allowed may have been scaled to [0, 1] instead.

  All of them are nowhere below 0, then, which is mid-grey; constant ones, such
  as zeros to try something with, do not count.
  """
  return x.dtype != np.uint8 and bool(0 <= x.min() < x.max())


def checked_latents(
  latents: Any, latent_channels: int, channels: int | None
) -> np.ndarray:
  """float32, all channels; those after the first `channels` are zero.

  Raises UserError for any other numbers, axes or channels.
  """
  z = _array(latents, "latents", "z", channels or latent_channels)
  z = _checked_floats(z, "latents", "float, as encode returns them,")
  if channels is not None:
    if z.shape[-1] not in (channels, latent_channels):
      raise errors.UserError(
        f"latents have {z.shape[-1]} channels, neither {channels} nor "
        f"{latent_channels}"
      )
    # Zeros are what a projection sliced to the first channels would see.
    missing = latent_channels - channels
    z = np.pad(z[..., :channels], [(0, 0)] * 3 + [(0, missing)])
  _check_channels(z, "latents", "z", latent_channels)
  return z


def _of_pil(image: str, channels: int) -> str:
  """What makes an array of an image of PIL, as code."""
  mode, axes = ("L", "None, ..., None") if channels == 1 else ("RGB", "None")
  return f'np.asarray({image}.convert("{mode}"))[{axes}]'


def _array(given: Any, name: str, variable: str, channels: int) -> np.ndarray:
  if isinstance(given, jax.core.Tracer):
    raise errors.UserError(
      "an Autoencoder cannot be used inside jit, vmap or grad; use "
      'ae.model.apply(ae.variables, x, method="encode") there'
    )
  try:
    x = np.asarray(given)
  except ValueError as error:
    raise errors.UserError(
      f"{name} differ in size and are no one array "
      f"({errors.first_line(error)}); pass those of each size in turn"
    ) from error
  if x.dtype.kind in "USO":
    advice = "pass what encode returned"
    if name == "images":
      advice = f"read files first: {_of_pil('Image.open(path)', channels)}"
    raise errors.UserError(
      f"{name} are {reprlib.repr(given)}, no array of numbers; {advice}"
    )
  if x.ndim != 4:
    raise errors.UserError(
      f"{name} have {x.ndim} axes {list(x.shape)}, not 4, [b, h, w, c]"
      f"{_advice(x, name, variable, channels)}"
    )
  if not x.size:
    raise errors.UserError(f"{name} are empty: {list(x.shape)}")
  return x


def _check_channels(
  x: np.ndarray, name: str, variable: str, channels: int
) -> None:
  if x.shape[-1] != channels:
    raise errors.UserError(
      f"{name} have {x.shape[-1]} channels, and this autoencoder {channels}"
      f"{_advice(x, name, variable, channels)}"
    )


def _advice(x: np.ndarray, name: str, variable: str, channels: int) -> str:
  """How to make [b, h, w, channels] of it, if that can be told."""
  is_one = x.ndim == 3
  if is_one and x.shape[-1] == channels:
    return f"; for a single one, {variable}[None]"
  if x.ndim in (3, 4) and x.shape[-3] == channels:
    order = "1, 2, 0)[None]" if is_one else "0, 2, 3, 1)"
    return f"; channels stand last here: {variable}.transpose({order}"
  if name != "images" or x.ndim not in (2, 3, 4):
    return ""
  if x.shape[-1] == 4:
    return "; composite the alpha channel over a colour first"
  if x.ndim == 2:
    grey = "images[None, ..., None]"
  elif is_one:
    grey = "images[None]" if x.shape[-1] == 1 else "images[..., None]"
  elif x.shape[-1] == 1:
    grey = "images"
  elif x.shape[1] == 1:
    grey = "images.transpose(0, 2, 3, 1)"
  else:
    return ""
  if channels > 1:
    grey = f"np.repeat({grey}, {channels}, axis=-1)"
  return f"; if they are grey, {grey}"


def _checked_floats(x: np.ndarray, name: str, allowed: str) -> np.ndarray:
  if not jnp.issubdtype(x.dtype, jnp.floating):
    advice = ""
    if (
      name == "images"
      and x.dtype.kind in "iu"
      and 0 <= x.min() <= x.max() < 256
    ):
      advice = "; if these are pixels from 0 to 255, images.astype(np.uint8)"
    raise errors.UserError(
      f"{name} are {x.dtype}; {allowed} is allowed{advice}"
    )
  x = x.astype(np.float32, copy=False)
  if not np.isfinite(x).all():
    raise errors.UserError(f"{name} have values that are not finite")
  return x


def to_float(x: np.ndarray) -> np.ndarray:
  """What `checked_images` lets pass, as float32 in [-1, 1]."""
  return quantisation.to_float(x) if x.dtype == np.uint8 else x


def check_pad(pad: str | None) -> None:
  """Raises UserError for an unknown way to fill up images."""
  known = ("reflect", "edge")
  if pad is not None and pad not in known:
    raise errors.UserError(f"unknown pad={pad!r}; known are {', '.join(known)}")


def padded(x: np.ndarray, factor: int, pad: str | None) -> np.ndarray:
  """Sides filled up to multiples of `factor`; without `pad`, a UserError."""
  check_pad(pad)
  missing = [-side % factor for side in x.shape[1:3]]
  if not any(missing):
    return x
  if pad is None:
    for side in x.shape[1:3]:
      network.check_side(side, factor, ', or pad with pad="reflect"')
  return np.pad(x, [(0, 0), *((0, m) for m in missing), (0, 0)], mode=pad)


def check_size(
  size: tuple[int, int], shape: tuple[int, ...], factor: int
) -> None:
  """Raises UserError for a size that latents of `shape` do not cover."""
  largest = tuple(side * factor for side in shape[1:3])
  fits = np.shape(size) == (2,) and all(
    isinstance(side, int | np.integer) and 0 < side <= most
    for side, most in zip(size, largest, strict=True)
  )
  if not fits:
    raise errors.UserError(
      f"size={size} is not a height and a width up to {largest}, the size of "
      "the decoded images"
    )
