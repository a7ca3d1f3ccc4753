"""Fits block PCA to images: the floor that reports show beside autoencoders."""

import concurrent.futures
import logging
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from dcae_jax import errors
from dcae_jax.autoencoder import block_pca
from dcae_jax.data import crops, decoding, images, sources
from dcae_jax.runs import work_directory
from dcae_jax.setup import image_sources, keys

_LOG = logging.getLogger(__name__)
NAME = "floor: block PCA"  # of its row in tables and pictures
_MOST_IMAGES = 2_000
_BLOCKS = 2**15  # over all images, about: ten for each of 3072 values
_ROWS = 4_096  # blocks that enter the moments at once, in few large products


class Material(NamedTuple):
  """The images that a floor is fitted to."""

  weighted_sources: list[tuple[sources.Source, float]]
  decoding: images.Decoding
  cropping: images.Cropping | None = None  # of a training run


def of_run(run: str, workdir: epath.Path | None = None) -> Material:
  """What a run of train_autoencoder sees; UserError if it is not here."""
  config = keys.completed(work_directory.read_run_config(run), run)
  c = config.data
  return Material(
    image_sources.weighted_sources(c.source, workdir, c.min_size),
    images.Decoding(
      config.model.image_channels, c.min_size, c.max_megapixels, c.shorter_side
    ),
    images.Cropping(c.crop, config.resolution, c.min_area, c.flip),
  )


def fit(
  material: Material,
  spatial_compression: int,
  latent_channels: int,
  resolutions: Iterable[int],
  *,
  threads: int,
) -> block_pca.BlockPCA:
  """Block PCA with latents of the size of an autoencoder's.

  Of a bounded number of images, evenly spaced over the sources, blocks at
  random places: in a crop as training takes it, and in the whole image at each
  resolution that is measured, since the statistics of blocks change with the
  scale. The same arguments give the same blocks.

  Raises:
    UserError: there is no block PCA of that size, or no usable image.
  """
  channels = material.decoding.channels
  f, c = block_pca.shape(spatial_compression, latent_channels, channels)
  start = time.perf_counter()
  pca = block_pca.fit(_batches(material, f, tuple(resolutions), threads), c)
  if jax.process_count() > 1:
    # Of the first process: libraries of linear algebra may round differently.
    pca.variables = multihost_utils.broadcast_one_to_all(pca.variables)
  _LOG.info(
    "%s with latents f%dc%d, fitted in %.1f s",
    NAME, f, c, time.perf_counter() - start,
  )  # fmt: skip
  return pca


def _batches(
  material: Material, f: int, resolutions: tuple[int, ...], threads: int
) -> Iterator[np.ndarray]:
  """Blocks [n, f, f, channels] in [-1, 1]."""
  chosen = _chosen(material.weighted_sources)
  views = len(resolutions) + (material.cropping is not None)
  blocks_of_view = -(-_BLOCKS // (len(chosen) * views))

  def blocks(numbered: tuple[int, tuple[sources.Source, int]]):
    number, (source, index) = numbered
    rng = np.random.default_rng(number)
    try:
      image, _ = images.open_image(source, index, material.decoding)
    except (decoding.TooSmallError, images.UnusableError):  # training names it
      return None
    seen = [crops.dm_resize(image, side) for side in resolutions]
    pixels = [np.asarray(x).reshape(*x.size[::-1], -1) for x in seen]
    if material.cropping is not None:
      pixels.append(images.crop(image, material.cropping, rng))
    return np.concatenate(
      [_random_blocks(x, f, blocks_of_view, rng) for x in pixels]
    )

  waiting, total = [], 0
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for of_image in pool.map(blocks, enumerate(chosen)):
      if of_image is not None:
        waiting.append(of_image)
        total += 1
      if sum(map(len, waiting)) >= _ROWS:
        yield np.concatenate(waiting) / 127.5 - 1.0
        waiting = []
  if not total:
    raise errors.UserError(
      f"none of {len(chosen)} images can be used to fit block PCA"
    )
  if waiting:
    yield np.concatenate(waiting) / 127.5 - 1.0


def _chosen(
  weighted_sources: list[tuple[sources.Source, float]],
) -> list[tuple[sources.Source, int]]:
  """Evenly spaced images of each source, in the proportions of the mixture."""
  total = sum(weight for _, weight in weighted_sources)
  chosen = []
  for source, weight in weighted_sources:
    number = max(1, round(_MOST_IMAGES * weight / total))
    number = min(number, len(source))
    chosen += [(source, i * len(source) // number) for i in range(number)]
  return chosen


def _random_blocks(
  pixels: np.ndarray, f: int, number: int, rng: np.random.Generator
) -> np.ndarray:
  """Of an image uint8 [h, w, c]: [number, f, f, c]."""
  windows = np.lib.stride_tricks.sliding_window_view(pixels, (f, f), (0, 1))
  height, width = windows.shape[:2]
  tops = rng.integers(height, size=number)
  lefts = rng.integers(width, size=number)
  return windows[tops, lefts].transpose(0, 2, 3, 1)
