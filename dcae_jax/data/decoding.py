"""Encoded bytes to a decoded RGB (or grey) image.

Everything that Pillow may meet is decoded as a viewer would show it, or refused
with an exception; sizes are read from the header first, so that a decompression
bomb is never unpacked.
"""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from dcae_jax import errors
from dcae_jax.data import crops

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MAX_ASPECT = 50  # crops enlarge to the shorter side: a strip would explode
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_MODES = {1: "L", 3: "RGB"}


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How files become images.

  Attributes:
    channels: 1 or 3.
    min_size: smallest allowed side, in pixels.
    max_megapixels: largest allowed size.
    shorter_side: larger images are reduced to it (antialiased); 0: never.
  """

  channels: int = 3
  min_size: int = 0
  max_megapixels: float = 89.0
  shorter_side: int = 0


class TooSmallError(Exception):
  """An image below the minimum size: left out on purpose, not an error."""


def check_channels(channels: int) -> None:
  """Raises UserError unless images can be decoded to that many channels."""
  if channels not in _MODES:
    raise errors.UserError(
      f"image files can be read with 1 (grey) or 3 (RGB) channels, "
      f"not {channels}"
    )


def halved(least: int, size: int) -> int:
  """How many times smaller a side of `least` pixels keeps `size` of them.

  What a JPEG can be decoded at, faster: 1, 2, 4 or 8.
  """
  return next((x for x in (8, 4, 2) if least >= x * size), 1)


def decode(
  encoded: bytes,
  decoding: Decoding,
  reduction: Callable[[tuple[int, int]], int] | None = None,
) -> Image.Image:
  """Decodes a whole file as a viewer would show it.

  The first frame of an animation; EXIF orientation applied; colours converted
  from the file's profile to sRGB; alpha composited over white; 16 bits scaled
  to 8; CMYK and palettes converted. Raises TooSmallError for a side below
  `min_size`, and any other exception for what cannot be decoded.

  A JPEG that is not reduced to a `shorter_side` is decoded as many times
  smaller as `reduction`, a power of two, says for the (width, height) that a
  viewer shows; of other files it is not asked.
  """
  Image.MAX_IMAGE_PIXELS = None  # the limit below is stricter
  try:
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
  except UnidentifiedImageError:
    raise errors.UserError(f"no image ({', '.join(FORMATS)})") from None
  width, height = image.size
  if min(width, height) < decoding.min_size:
    raise TooSmallError(f"{width}x{height}")
  most, shorter_side = decoding.max_megapixels, decoding.shorter_side
  if width * height > most * 1e6:
    raise errors.UserError(
      f"{width}x{height} pixels are more than {most} megapixels"
    )
  if max(width, height) > _MAX_ASPECT * min(width, height):
    raise errors.UserError(
      f"{width}x{height} pixels are too narrow: more than {_MAX_ASPECT}:1"
    )
  if image.format in ("JPEG", "MPO"):  # MPO: with previews, as of telephones
    times = 1
    if shorter_side:
      times = halved(min(width, height), shorter_side)
    elif reduction:
      is_turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
      times = reduction((height, width) if is_turned else (width, height))
    image.draft(None, (width // times, height // times))
  ImageOps.exif_transpose(image, in_place=True)
  image = _to_srgb(image)
  image = _to_mode(image, _MODES[decoding.channels])
  if shorter_side and min(image.size) > shorter_side:
    image = crops.resize_shorter_side(image, shorter_side)
  return image


def _to_srgb(image: Image.Image) -> Image.Image:
  """A profile that is damaged, or for another mode, is left aside."""
  embedded = image.info.get("icc_profile")
  if not embedded or image.mode not in ("RGB", "RGBA", "CMYK", "L"):
    return image
  try:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
    if "sRGB" in ImageCms.getProfileDescription(profile):
      return image
    return ImageCms.profileToProfile(
      image,
      profile,
      ImageCms.createProfile("sRGB"),
      outputMode="RGBA" if image.mode == "RGBA" else "RGB",
    )
  except (ImageCms.PyCMSError, OSError):
    return image


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
  if image.mode == "F":
    raise errors.UserError("floating-point images have no known range")
  if image.mode.startswith("I"):  # 16 bits, also where Pillow holds 32
    values = np.asarray(image).astype(np.float64)
    if values.min() < 0 or values.max() > 65535:
      raise errors.UserError("32-bit integer images have no known range")
    image = Image.fromarray(np.round(values / 257).astype(np.uint8))
  if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or (
    "transparency" in image.info
  ):
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return image if image.mode == mode else image.convert(mode)
