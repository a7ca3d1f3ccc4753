"""Squares of decoded images: at random for training, central for evaluation."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

CROPS = ("random_crop", "random_resized_crop", "dm_crop")


def resize_shorter_side(image: Image.Image, size: int) -> Image.Image:
  """The whole image at that shorter side; bicubic."""
  scale = size / min(image.size)
  shape = tuple(max(size, round(side * scale)) for side in image.size)
  return image.resize(shape, Image.Resampling.BICUBIC)


def dm_crop(image: Image.Image, size: int) -> Image.Image:
  """Centre crop of the evaluations: box halving, bicubic, central square.

  As in guided diffusion (arXiv 2105.05233), so that numbers compare.
  """
  image = dm_resize(image, size)
  left, top = ((side - size) // 2 for side in image.size)
  return image.crop((left, top, left + size, top + size))


def dm_resize(image: Image.Image, size: int) -> Image.Image:
  """The whole image at the shorter side that `dm_crop` crops it at."""
  while min(image.size) >= 2 * size:
    half = tuple(side // 2 for side in image.size)
    image = image.resize(half, Image.Resampling.BOX)
  return resize_shorter_side(image, size)


def random_crop(
  image: Image.Image, size: int, rng: np.random.Generator
) -> Image.Image:
  """A random square of the image's own pixels; smaller images grow first."""
  if min(image.size) < size:
    image = resize_shorter_side(image, size)
  left, top = (rng.integers(0, side - size + 1) for side in image.size)
  return image.crop((left, top, left + size, top + size))


class Box(NamedTuple):
  """A part of an image of a size, (width, height), all in pixels."""

  left: int
  top: int
  width: int
  height: int
  size: tuple[int, int]


def random_box(
  size: tuple[int, int], rng: np.random.Generator, min_area: float
) -> Box:
  """A random part of an image.

  It covers `min_area` to all of the area, at an aspect ratio of 3:4 to 4:3.
  """
  width, height = size
  for _ in range(10):
    area = width * height * rng.uniform(min_area, 1.0)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      break
  else:
    w = h = min(width, height)
  left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
  return Box(left, top, w, h, size)


def resized_crop(image: Image.Image, box: Box, size: int) -> Image.Image:
  """A part of the image, resized to a square; bicubic with antialiasing.

  The image may have been reduced since the box was drawn.
  """
  (width, height), (of_width, of_height) = image.size, box.size
  left, right = (x * width / of_width for x in (box.left, box.left + box.width))
  top, bottom = (
    y * height / of_height for y in (box.top, box.top + box.height)
  )
  return image.resize(
    (size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom)
  )
