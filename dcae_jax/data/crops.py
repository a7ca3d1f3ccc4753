"""Parts of decoded images: at random for training, central for evaluation.

A size is the side of a square, or a height and a width.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

CROPS = ("random_crop", "random_resized_crop", "dm_crop")


Size = int | tuple[int, int]


def shape(size: Size) -> tuple[int, int]:
  """The height and width of a size."""
  return (size, size) if isinstance(size, int) else size


def resize_shorter_side(image: Image.Image, size: int) -> Image.Image:
  """The whole image at that shorter side; bicubic."""
  return _resize_to_cover(image, size)


def _resize_to_cover(image: Image.Image, size: Size) -> Image.Image:
  """The whole image, as small as it can be and no smaller; bicubic."""
  height, width = shape(size)
  scale = max(width / image.width, height / image.height)
  sides = (round(image.width * scale), round(image.height * scale))
  return image.resize(
    (max(width, sides[0]), max(height, sides[1])), Image.Resampling.BICUBIC
  )


def dm_crop(image: Image.Image, size: Size) -> Image.Image:
  """Centre crop of the evaluations: box halving, bicubic, central part.

  As in guided diffusion (arXiv 2105.05233), so that numbers compare.
  """
  height, width = shape(size)
  image = dm_resize(image, size)
  left, top = (image.width - width) // 2, (image.height - height) // 2
  return image.crop((left, top, left + width, top + height))


def dm_resize(image: Image.Image, size: Size) -> Image.Image:
  """The whole image at the size that `dm_crop` crops it at."""
  height, width = shape(size)
  while image.width >= 2 * width and image.height >= 2 * height:
    half = tuple(side // 2 for side in image.size)
    image = image.resize(half, Image.Resampling.BOX)
  return _resize_to_cover(image, size)


def random_crop(
  image: Image.Image, size: Size, rng: np.random.Generator
) -> Image.Image:
  """A random part of the image's own pixels; smaller images grow first."""
  height, width = shape(size)
  if image.width < width or image.height < height:
    image = _resize_to_cover(image, size)
  left = rng.integers(0, image.width - width + 1)
  top = rng.integers(0, image.height - height + 1)
  return image.crop((left, top, left + width, top + height))


class Box(NamedTuple):
  """A part of an image of a size, (width, height), all in pixels."""

  left: int
  top: int
  width: int
  height: int
  size: tuple[int, int]


def random_box(
  of_size: tuple[int, int],
  size: Size,
  rng: np.random.Generator,
  min_area: float,
) -> Box:
  """A random part of an image of (width, height), to be resized to a size.

  It covers `min_area` to all of the area, at 3:4 to 4:3 of the aspect ratio of
  the size.
  """
  (width, height), (rows, columns) = of_size, shape(size)
  for _ in range(10):
    area = width * height * rng.uniform(min_area, 1.0)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    aspect *= columns / rows
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      break
  else:
    scale = min(width / columns, height / rows)
    w, h = max(1, round(columns * scale)), max(1, round(rows * scale))
  left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
  return Box(left, top, w, h, of_size)


def resized_crop(image: Image.Image, box: Box, size: Size) -> Image.Image:
  """A part of the image, resized; bicubic with antialiasing.

  The image may have been reduced since the box was drawn.
  """
  (width, height), (of_width, of_height) = image.size, box.size
  left, right = (x * width / of_width for x in (box.left, box.left + box.width))
  top, bottom = (
    y * height / of_height for y in (box.top, box.top + box.height)
  )
  return image.resize(
    shape(size)[::-1],
    Image.Resampling.BICUBIC,
    box=(left, top, right, bottom),
  )
