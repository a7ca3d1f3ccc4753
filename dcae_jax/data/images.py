"""The image pipeline: sources to batches of uint8 images, through grain.

Deterministic under a seed, whatever the number of workers; each process reads
its own share; the position is a small state that a checkpoint holds. An image
that cannot be decoded is replaced by another one, and named once.
"""

import dataclasses
import errno
import hashlib
import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator

import grain
import numpy as np
from PIL import Image

from dcae_jax import errors
from dcae_jax.data import batches, crops, sources
from dcae_jax.data import decoding as image_decoding

Decoding = image_decoding.Decoding

_LOG = logging.getLogger(__name__)
_ATTEMPTS = 10_000  # replacements in a row, before giving up

# What `evaluation_batches` does, for the record of an evaluation.
EVALUATION_CROP = (
  "dm_crop: halved by boxes while twice too large, then bicubic to the shorter "
  "side, central square"
)


@dataclasses.dataclass(frozen=True)
class Cropping:
  """How images become squares.

  Attributes:
    kind: one of `crops.CROPS`.
    size: side of the square, in pixels.
    min_area: least part of the image that a random-resized crop covers.
    flip: mirror at random.
  """

  kind: str
  size: int
  min_area: float = 0.25
  flip: bool = False

  def __post_init__(self):
    if self.kind not in crops.CROPS:
      raise errors.UserError(
        f"unknown crop {self.kind!r}; known are {', '.join(crops.CROPS)}"
      )


class UnusableError(Exception):
  """A file that is no image, now and later."""


_UNUSABLE = (errno.EFBIG, errno.ELOOP, errno.ENXIO)  # of files, for ever
_DELAYS = (1, 2, 4, 8, 16, 32)  # seconds before storage is asked again


def read_record(source: sources.Source, index: int) -> sources.Record:
  """A file as it is.

  What storage refuses is asked for again, ever later, for a minute: a passing
  fault must not change the data.

  Raises:
    UnusableError: it is no regular file, or a link to nothing.
    OSError: storage still refuses it, or it is gone.
  """
  for delay in (*_DELAYS, None):
    try:
      return source[index]
    except errors.UserError:
      raise
    except Exception as error:  # clients of storage have their own kinds
      name = source.name(index)
      is_broken_link = os.path.islink(name) and not os.path.exists(name)
      number = getattr(error, "errno", None)
      if is_broken_link or number in _UNUSABLE:
        raise UnusableError(errors.first_line(error)) from error
      reason = getattr(error, "strerror", None) or errors.first_line(error)
      if delay is None:
        raise OSError(
          number or errno.EIO,
          f"{reason}, for {sum(_DELAYS)} s; bring it back and run again: it "
          "goes on from what is saved",
          name,
        ) from error
      _LOG.warning("%r: %s; again in %d s", name, reason, delay)
    time.sleep(delay)


def open_image(
  source: sources.Source,
  index: int,
  decoding: Decoding,
  reduction: Callable[[tuple[int, int]], int] | None = None,
) -> tuple[Image.Image, sources.Record]:
  """Reads and decodes an image; returns it with its record.

  `reduction` is that of `decoding.decode`.

  Raises:
    decoding.TooSmallError: it is left out on purpose.
    UnusableError: the image is at fault, now and later.
    OSError: storage is at fault.
  """
  record = read_record(source, index)
  try:
    image = image_decoding.decode(record.encoded, decoding, reduction)
  except (image_decoding.TooSmallError, MemoryError):
    raise
  except Exception as error:  # Pillow raises anything
    reason = " ".join(str(error).split())
    raise UnusableError(reason or type(error).__name__) from error
  return image, record


def crop(
  image: Image.Image,
  cropping: Cropping,
  rng: np.random.Generator | None,
  box: crops.Box | None = None,
) -> np.ndarray:
  """A square of an image, uint8 [size, size, channels]; see `Cropping`.

  `rng` is not used by a `dm_crop` without flips. A `box` is that of a
  random-resized crop of which the place is drawn already.
  """
  if cropping.kind == "dm_crop":
    image = crops.dm_crop(image, cropping.size)
  elif cropping.kind == "random_crop":
    image = crops.random_crop(image, cropping.size, rng)
  else:
    box = box or crops.random_box(image.size, rng, cropping.min_area)
    image = crops.resized_crop(image, box, cropping.size)
  pixels = np.asarray(image).reshape(cropping.size, cropping.size, -1)
  if cropping.flip and rng.random() < 0.5:
    pixels = pixels[:, ::-1]
  return np.ascontiguousarray(pixels)


class _Reduction:
  """How many times smaller a JPEG is decoded than it is, for one crop.

  Attributes:
    times: 1 as long as nobody asked.
    size: (width, height) of the whole image; None likewise.
    box: of a random-resized crop; None likewise.
  """

  def __init__(self, cropping: Cropping, rng: np.random.Generator):
    self._cropping, self._rng = cropping, rng
    self.times, self.size, self.box = 1, None, None

  def __call__(self, size: tuple[int, int]) -> int:
    if self.size is None:  # else the box is drawn
      self.size, kind, least = size, self._cropping.kind, 0
      if kind == "dm_crop":
        least = min(size)
      elif kind == "random_resized_crop":
        self.box = crops.random_box(size, self._rng, self._cropping.min_area)
        least = min(self.box.width, self.box.height)
      self.times = image_decoding.halved(least, self._cropping.size)
    return self.times


class Skipped:
  """Names of the images that could not be decoded, over all workers.

  One file per image in a temporary directory: creating it succeeds once,
  whichever process or thread comes first, and that one warns.
  """

  def __init__(self):
    self._directory = tempfile.mkdtemp(prefix="dcae_jax_skipped_")
    self._cleanup = weakref.finalize(
      self, shutil.rmtree, self._directory, ignore_errors=True
    )

  def __getstate__(self):
    return self._directory

  def __setstate__(self, directory):
    self._directory = directory

  def add(self, name: str, reason: UnusableError) -> None:
    digest = hashlib.sha1(name.encode(errors="replace")).hexdigest()
    flags = os.O_CREAT | os.O_EXCL
    try:
      os.close(os.open(os.path.join(self._directory, digest), flags))
    except FileExistsError:
      return
    # In quotes: the log of a loader process escapes nothing.
    _LOG.warning("skipped image %r: %s", name, reason)

  def __len__(self) -> int:
    return len(os.listdir(self._directory))


class _Load:
  """Index to cropped image; each worker keeps a cache of decoded ones."""

  def __init__(
    self,
    source: sources.Source,
    decoding: Decoding,
    cropping: Cropping,
    skipped: Skipped,
    cache_megabytes: float = 0,
  ):
    self._source, self._decoding = source, decoding
    self._cropping, self._skipped = cropping, skipped
    self._cache, self._room = {}, cache_megabytes * 1e6

  def _open(self, index: int, reduction: _Reduction | None = None):
    """(image, label), or None for one that is too small or not decodable."""
    try:
      image, record = open_image(self._source, index, self._decoding, reduction)
    except image_decoding.TooSmallError:
      return None
    except UnusableError as error:
      self._skipped.add(self._source.name(index), error)
      return None
    return image, record.label

  def _cached(self, index: int, reduction: _Reduction):
    """The same, from the cache only at the same reduction: same pixels."""
    if index in self._cache:
      if self._cache[index] is None:
        return None
      size, label, images = self._cache[index]
      if size is not None:
        reduction(size)
      if reduction.times in images:
        return images[reduction.times], label
    opened = self._open(index, reduction)
    if opened is None:
      self._cache[index] = None
      return None
    image, label = opened
    size = image.width * image.height * len(image.getbands())
    if size <= self._room:
      self._room -= size
      known = self._cache.setdefault(index, (reduction.size, label, {}))
      known[-1][reduction.times] = image.copy()  # which holds no file
    return opened

  def random(self, index: int, rng: np.random.Generator) -> batches.Batch:
    """Training: a bad image is replaced by a random other one."""
    for _ in range(_ATTEMPTS):
      before = rng.bit_generator.state
      reduction = _Reduction(self._cropping, rng)
      opened = self._cached(index, reduction)
      if opened is not None:
        image, label = opened
        pixels = crop(image, self._cropping, rng, reduction.box)
        return {"images": pixels, "labels": np.int32(label)}
      rng.bit_generator.state = before  # as if it was known to be bad
      index = int(rng.integers(len(self._source)))
    raise errors.UserError(
      f"{_ATTEMPTS} images in a row could not be used, the last "
      f"{self._source.name(index)}"
    )

  def fixed(self, index: int) -> batches.Batch:
    """Evaluation: a bad image, or an index past the end, is masked."""
    decoded = self._open(index) if index < len(self._source) else None
    if decoded is None:
      size = self._cropping.size
      pixels = np.zeros((size, size, self._decoding.channels), np.uint8)
      label = -1
    else:
      image, label = decoded
      pixels = crop(image, self._cropping, None)
    return {
      "images": pixels,
      "labels": np.int32(label),
      "mask": np.bool_(decoded is not None),
      "indices": np.int32(index),
    }


def check_not_empty(source: sources.Source, decoding: Decoding) -> None:
  """Raises UserError, with reasons, unless there is a usable image."""
  reasons = []
  for index in range(len(source)):
    try:
      open_image(source, index, decoding)
      return
    except image_decoding.TooSmallError as error:
      reason = f"only {error} pixels"
    except UnusableError as error:
      reason = str(error)
    if len(reasons) < 3:
      reasons.append(f"{source.name(index)}: {reason}")
  raise errors.UserError(
    f"none of the {len(source)} images can be used (min_size "
    f"{decoding.min_size}); {'; '.join(reasons)}"
  )


class TrainingImages(batches.Batches):
  """An endless, checkpointable iterator over batches of this process.

  Yields `{"images": uint8 [b, size, size, channels], "labels": int32 [b]}`.
  """

  def __init__(
    self,
    weighted_sources: list[tuple[sources.Source, float]],
    decoding: Decoding,
    cropping: Cropping,
    reading: batches.Reading,
    *,
    seed: int,
    cache_megabytes: float = 0,
  ):
    """Describes the pipeline; nothing starts before the first batch.

    Args:
      weighted_sources: with the weights of their mixture.
      decoding: of the files.
      cropping: of the images.
      reading: of this process.
      seed: of order, crops and flips.
      cache_megabytes: of decoded images, kept for each worker and source.
    """
    self.skipped = Skipped()
    members = []
    for i, (source, _) in enumerate(weighted_sources):
      load = _Load(source, decoding, cropping, self.skipped, cache_megabytes)
      members.append(
        grain.MapDataset.range(len(source))
        .seed(seed + i)
        .shuffle()
        .repeat()
        .random_map(load.random)
      )
    dataset = members[0]
    if len(members) > 1:
      weights = [weight for _, weight in weighted_sources]
      dataset = grain.MapDataset.mix(members, weights)
    dataset = dataset[reading.process_index :: reading.process_count].batch(
      reading.batch_size, drop_remainder=True
    )
    fingerprints = [source.fingerprint() for source, _ in weighted_sources]
    super().__init__(
      dataset,
      workers=reading.workers,
      threads=reading.threads,
      fingerprint=hashlib.sha256(repr(fingerprints).encode()).hexdigest(),
    )


def evaluation_batches(
  source: sources.Source,
  decoding: Decoding,
  size: int,
  reading: batches.Reading,
  *,
  max_images: int = 0,
  skipped: Skipped,
) -> Iterator[batches.Batch]:
  """Centre crops (`crops.dm_crop`) in order, with a mask and indices.

  Every process yields the same number of whole batches, in its own threads;
  `mask` is False for an image that is missing or not usable. `max_images` of 0
  means all.
  """
  total = sources.limited(source, max_images)
  at_once = reading.batch_size * reading.process_count
  load = _Load(source, decoding, Cropping("dm_crop", size), skipped)
  indices = np.arange(-(-total // at_once) * at_once)
  indices = np.where(indices < total, indices, len(source)).tolist()
  threads = reading.threads
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  yield from (
    grain.MapDataset.source(indices)
    .map(load.fixed)[reading.process_index :: reading.process_count]
    .batch(reading.batch_size)
    .to_iter_dataset(options)
  )
