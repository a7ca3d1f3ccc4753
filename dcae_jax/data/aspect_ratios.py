"""Shapes of about equal area, and which images are trained on at which one.

Images keep about their aspect ratio where each batch has one of these shapes
(buckets, as of PixArt and SANA).
"""

import logging
from collections.abc import Sequence

import numpy as np

from dcae_jax import errors
from dcae_jax.data import headers, sources

_LOG = logging.getLogger(__name__)
Shape = tuple[int, int]  # height, width
Weighted = tuple[sources.Source, float]
_TOO_SMALL = 1e6  # above all ratios


def shapes(resolution: int, multiple: int, most: float) -> list[Shape]:
  """From the lowest one to the widest one, with the square.

  The shorter sides are all multiples from the square's on down, as long as the
  longer ones are at most `most` times them; those are the multiples that come
  closest to the square's area, which they miss by at most half of `multiple` in
  `resolution`.

  Raises UserError if that is the square alone.
  """
  found = []
  for short in range(resolution, 0, -multiple):
    long = round(resolution**2 / short / multiple) * multiple
    if long > most * short:
      break
    found.append((short, long))
  if len(found) < 2:
    raise errors.UserError(
      f"config.data.max_aspect_ratio={most} leaves no shape but the square at "
      f"config.resolution={resolution}, with sides that are multiples of "
      f"{multiple}; raise one of them, or set the ratio to 1 for squares"
    )
  return [(long, short) for short, long in found[:0:-1]] + [
    (short, long) for short, long in found
  ]


def nearest(sizes: np.ndarray, known: Sequence[Shape]) -> np.ndarray:
  """Of widths and heights [n, 2], which shape each image has: int32 [n].

  The one with the nearest aspect ratio among those that the image covers, so
  that it is not enlarged; if it covers none, among all.
  """
  width, height = np.asarray(sizes, np.float64).T
  least = np.full(len(sizes), np.inf)
  found = np.zeros(len(sizes), np.int32)
  for number, (h, w) in enumerate(known):
    # Without logarithms, which differ from machine to machine.
    ratio = width * h / (height * w)
    distance = np.maximum(ratio, 1 / ratio)
    distance[(width < w) | (height < h)] += _TOO_SMALL
    found[distance < least] = number
    least = np.minimum(least, distance)
  return found


def dealt(
  weighted_sources: Sequence[Weighted],
  known: Sequence[Shape],
  *,
  least: int,
  shorter_side: int,
) -> list[tuple[Shape, list[Weighted]]]:
  """The images of each shape, those of every source apart.

  A shape that fewer than `least` images have is left out, the rarest one first,
  and they go to others: no batch repeats an image, and no program is compiled
  for a few. The weights are such that all images of a source are drawn as
  often, whatever their shape. What is known to be no image is left out, and
  counted: else a shape may have no others.

  Args:
    weighted_sources: with the weights of their mixture.
    known: shapes.
    least: images of a shape.
    shorter_side: that larger images are reduced to before; 0: they are not.

  Raises:
    UserError: the sizes of a source's images are not known.
  """
  sizes = [_sizes(source, shorter_side) for source, _ in weighted_sources]
  # Images have few different sizes.
  different, which = np.unique(
    np.concatenate(sizes), axis=0, return_inverse=True
  )
  repeated = np.bincount(which.ravel())
  is_none = (different == headers.NO_IMAGE).all(1)
  if is_none.any():
    _LOG.warning("%d files left out, which are no images", repeated[is_none][0])
  repeated[is_none] = 0
  known = list(known)
  while True:
    of_size = nearest(different, known)
    counts = np.bincount(of_size, repeated, len(known))
    rarest = int(np.argmin(counts))
    if counts[rarest] >= least or len(known) == 1:
      break
    del known[rarest]
  of_size[is_none] = -1
  ends = np.cumsum([len(x) for x in sizes])[:-1]
  of_source = np.split(of_size[which.ravel()], ends)
  found = []
  for number, shape in enumerate(known):
    members = []
    for (source, weight), numbers in zip(
      weighted_sources, of_source, strict=True
    ):
      indices = np.flatnonzero(numbers == number)
      part = sources.Subset(source, indices)
      members.append((part, weight * len(part) / len(source)))
    found.append((shape, members))
  return found


def _sizes(source: sources.Source, shorter_side: int) -> np.ndarray:
  """As images are cropped, [n, 2]."""
  sizes = sources.sizes(source)
  if sizes is None:
    raise errors.UserError(
      f"config.data.max_aspect_ratio needs the sizes of the images, which are "
      f"not known of {source.name(0)} without reading it; train on what the "
      "task prepare makes of them (source.kind=records), or set it to 1"
    )
  if not shorter_side:
    return sizes
  shorter = sizes.min(1, keepdims=True)
  reduced = np.round(sizes * (shorter_side / shorter))
  return np.where(shorter > shorter_side, reduced, sizes).astype(np.int32)
