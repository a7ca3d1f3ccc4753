"""The size of an image, from the first bytes of its file."""

import io

from PIL import ExifTags, Image

from dcae_jax.data import decoding

NO_IMAGE = 1, 1  # below any size that is asked for


def shown_size(file: io.IOBase) -> tuple[int, int]:
  """Width and height as a viewer shows it; `NO_IMAGE` if it is none.

  An orientation that a PNG has behind its pixels is not seen.
  """
  Image.MAX_IMAGE_PIXELS = None  # nothing is unpacked
  try:
    image = Image.open(file, formats=decoding.FORMATS)
    width, height = image.size
    if image.format == "PNG" and "exif" not in image.info:
      return width, height  # Pillow would unpack it
    orientation = image.getexif().get(ExifTags.Base.Orientation)
  except OSError as error:
    if error.errno is not None:  # of storage: Pillow's own have no number
      raise
    return NO_IMAGE
  except Exception:  # Pillow raises anything
    return NO_IMAGE
  return (height, width) if orientation in decoding.TURNED else (width, height)
