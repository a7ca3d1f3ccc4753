"""What an export makes rows of: crops of images, or latents of other tools.

A row is a number below `len(rows)`: the image it comes from, times the crops of
each image, plus the number of the crop.
"""

import functools
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import grain
import numpy as np

from dcae_jax.data import images, sources, transforms


class Row(NamedTuple):
  """Before it is encoded.

  Attributes:
    values: uint8 [size, size, channels], or a latent, float32 [h, w, c].
    label: of its class.
  """

  values: np.ndarray
  label: int


class Rows(Protocol):
  """All rows that a source could give, were all of it readable."""

  per_image: int

  def reason(self, index: int) -> str | None:
    """Why an image of the source cannot be used; None where it can."""

  def load(self, index: int, crop: int) -> Row:
    """Raises for an image that has a reason."""


class Crops:
  """Crops of images; the same ones whenever and wherever they are made."""

  def __init__(
    self,
    source: sources.Source,
    decoding: images.Decoding,
    cropping: images.Cropping,
    *,
    per_image: int,
    seed: int,
  ):
    """Opens nothing yet.

    Args:
      source: of the images.
      decoding: of its files.
      cropping: of the images; random ones follow the seed.
      per_image: crops of each image.
      seed: of random crops.
    """
    self.per_image = per_image
    self._source, self._decoding = source, decoding
    self._cropping, self._seed = cropping, seed
    # Crops of an image come one after the other.
    self._open = functools.lru_cache(2 if per_image > 1 else 0)(
      lambda index: images.open_image(source, index, decoding)
    )

  def reason(self, index: int) -> str | None:
    try:
      images.open_image(self._source, index, self._decoding)
    except transforms.TooSmallError as error:
      return f"{error} pixels: smaller than {self._decoding.min_size}"
    except images.UnusableError as error:
      return str(error)
    return None

  def load(self, index: int, crop: int) -> Row:
    image, label = self._open(index)
    rng = np.random.default_rng((self._seed, index, crop))
    return Row(images.crop(image, self._cropping, rng), label)


class LatentFiles:
  """The authors' layout: `.npy` files, float32 [c, h, w], already scaled."""

  per_image = 1

  def __init__(
    self,
    source: sources.Files,
    shape: tuple[int, int, int],
    *,
    scaling_factor: float,
    shift_factor: float = 0.0,
  ):
    """Opens nothing yet.

    Args:
      source: of the files.
      shape: [h, w, c] of each latent.
      scaling_factor: that the files were multiplied by: it is divided out.
      shift_factor: that was subtracted before; 0 for DC-AE.
    """
    self._source, self._shape = source, shape
    self._scale, self._shift = scaling_factor, shift_factor

  def reason(self, index: int) -> str | None:
    try:
      self.load(index, 0)
    except images.UnusableError as error:
      return str(error)
    return None

  def load(self, index: int, crop: int) -> Row:
    del crop
    try:
      record = self._source[index]
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
      raise images.UnusableError(error.strerror or "no such file") from error
    try:
      latent = np.load(io.BytesIO(record.encoded), allow_pickle=False)
    except Exception as error:  # whatever a damaged file makes of numpy
      raise images.UnusableError(f"no .npy file: {error}") from error
    height, width, channels = self._shape
    if latent.shape != (channels, height, width) or latent.dtype.kind != "f":
      raise images.UnusableError(
        f"{latent.dtype} {list(latent.shape)} instead of float32 "
        f"{[channels, height, width]}"
      )
    values = np.moveaxis(latent.astype(np.float32), 0, -1)
    return Row(
      values / np.float32(self._scale) + np.float32(self._shift), record.label
    )


class Batch(NamedTuple):
  """Rows of one shard, filled up with zeros to the size of a batch.

  Attributes:
    values: [batch, ...] of the rows.
    labels: of the rows, without the filling.
    shard: that they belong to.
    is_last: of its shard.
  """

  values: np.ndarray
  labels: list[int]
  shard: int
  is_last: bool


def load_batches(
  rows: Rows,
  shards: Sequence[tuple[int, Sequence[tuple[int, int]]]],
  *,
  batch_size: int,
  threads: int,
) -> Iterator[Batch]:
  """Loads shards one after the other, ahead of their use.

  No batch has rows of two shards: what is encoded together does not depend on
  which shards are missing.

  Args:
    rows: where from.
    shards: number, and (image, crop) of each row.
    batch_size: rows.
    threads: loader threads.
  """
  plan = [
    (number, part[i : i + batch_size], i + batch_size >= len(part))
    for number, part in shards
    for i in range(0, len(part), batch_size)
  ]
  places = [place for _, part, _ in plan for place in part]
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=2 * max(batch_size, threads)
  )
  loaded = iter(
    grain.MapDataset.source(places)
    .map(lambda place: rows.load(*place))
    .to_iter_dataset(options)
  )
  for number, part, is_last in plan:
    found = [next(loaded) for _ in part]
    values = np.stack([row.values for row in found])
    filling = [(0, batch_size - len(found))] + [(0, 0)] * (values.ndim - 1)
    labels = [row.label for row in found]
    yield Batch(np.pad(values, filling), labels, number, is_last)
