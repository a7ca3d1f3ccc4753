"""What an export makes rows of: crops of images, or latents of other tools.

A row is a pair: the number of an image of the source, and that of its crop.
"""

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np

from dcae_jax import errors
from dcae_jax.data import captions as image_captions
from dcae_jax.data import crops, images, sources
from dcae_jax.data import decoding as image_decoding
from dcae_jax.latents import layout


class Row(NamedTuple):
  """A row before it is encoded, and what a denoiser is told of it.

  Values are uint8 [height, width, channels], or a latent, float32 [h, w, c].
  Conditions are by the name of their array.
  """

  values: np.ndarray
  conditions: Mapping[str, Any]


@runtime_checkable
class Rows(Protocol):
  """All rows that a source could give, if all of it is readable.

  Attributes:
    per_image: number of rows.
    description: how an image becomes rows: with the same one, the same rows.
  """

  source: sources.Source
  per_image: int
  conditions: Mapping[str, layout.Column]
  description: dict[str, Any]

  def load(self, index: int, crops: Sequence[int]) -> list[Row]:
    """Some rows of an image; UnusableError, with the reason, if it has none."""

  def zeros(self, count: int) -> np.ndarray:
    """The values of so many rows, to be filled."""


class _Images:
  """Rows of the images of a source.

  With captions, an image without any is unusable.
  """

  source: sources.Source

  def __init__(self, source: sources.Source, has_captions: bool):
    self.source = source
    self.conditions = layout.LABELS
    if has_captions:
      self.conditions = layout.LABELS | layout.CAPTIONS

  def _conditions_of(self, record: sources.Record) -> dict[str, Any]:
    """Raises UnusableError for an image that lacks its captions."""
    conditions = {"labels": record.label}
    if "captions" in self.conditions:
      if not record.captions:
        raise images.UnusableError("it has no caption")
      conditions["captions"] = image_captions.joined(record.captions)
    return conditions


class Crops(_Images):
  """Crops of images; the same ones whenever and wherever they are made."""

  def __init__(
    self,
    source: sources.Source,
    decoding: images.Decoding,
    cropping: images.Cropping,
    *,
    per_image: int,
    seed: int,
    has_captions: bool = False,
  ):
    """Opens nothing yet; random crops, `per_image` of them, follow the seed."""
    super().__init__(source, has_captions)
    self.per_image = per_image
    self._decoding, self._cropping, self._seed = decoding, cropping, seed

  @property
  def description(self) -> dict[str, Any]:
    kind = self._cropping.kind
    described = {"kind": kind, "per_image": self.per_image}
    if kind == "dm_crop":
      described["rule"] = images.EVALUATION_CROP
    else:
      described["seed"] = self._seed
    if kind == "random_resized_crop":
      described["min_area"] = self._cropping.min_area
    return described | {
      "min_size": self._decoding.min_size,
      "max_megapixels": self._decoding.max_megapixels,
    }

  def _open(self, index: int) -> tuple[Any, dict[str, Any]]:
    try:
      image, record = images.open_image(self.source, index, self._decoding)
      return image, self._conditions_of(record)
    except image_decoding.TooSmallError as error:
      raise images.UnusableError(
        f"{error} pixels: smaller than {self._decoding.min_size}"
      ) from error

  def load(self, index: int, crops: Sequence[int]) -> list[Row]:
    image, conditions = self._open(index)
    rngs = [np.random.default_rng((self._seed, index, i)) for i in crops]
    crop = lambda rng: images.crop(image, self._cropping, rng)
    return [Row(crop(rng), conditions) for rng in rngs]

  def zeros(self, count: int) -> np.ndarray:
    shape = (*crops.shape(self._cropping.size), self._decoding.channels)
    return np.zeros((count, *shape), np.uint8)


class LatentFiles(_Images):
  """The authors' layout: `.npy` files, float32 [c, h, w], already scaled."""

  per_image = 1

  def __init__(
    self,
    source: sources.Files,
    shape: tuple[int, int, int],
    *,
    scaling_factor: float,
    shift_factor: float = 0.0,
    has_captions: bool = False,
  ):
    """Opens nothing yet; `shape` is [h, w, c] of each latent.

    The shift factor was subtracted from the latents, and they were multiplied
    by the scaling factor; both are undone.
    """
    super().__init__(source, has_captions)
    self.description = {"kind": "not known: latents of another tool"}
    self._shape = shape
    self._scale, self._shift = scaling_factor, shift_factor

  def load(self, index: int, crops: Sequence[int]) -> list[Row]:
    return [self._open(index) for _ in crops]

  def zeros(self, count: int) -> np.ndarray:
    return np.zeros((count, *self._shape), np.float32)

  def _open(self, index: int) -> Row:
    record = images.read_record(self.source, index)
    try:
      latent = np.load(io.BytesIO(record.encoded), allow_pickle=False)
    except Exception as error:  # whatever a damaged file makes of numpy
      raise images.UnusableError(f"no .npy file: {error}") from error
    height, width, channels = self._shape
    if not isinstance(latent, np.ndarray):
      raise images.UnusableError("no .npy file: an archive of several")
    if latent.shape != (channels, height, width) or latent.dtype.kind != "f":
      raise images.UnusableError(
        f"{latent.dtype} {list(latent.shape)} instead of float32 "
        f"{[channels, height, width]}"
      )
    with np.errstate(over="ignore"):
      values = np.moveaxis(latent.astype(np.float32), 0, -1)
    if not np.isfinite(values).all():
      raise images.UnusableError("it has values that are not finite")
    values = values / np.float32(self._scale) + np.float32(self._shift)
    return Row(values, self._conditions_of(record))


class Group(NamedTuple):
  """Rows of one shard that one device encodes at once.

  Attributes:
    shard: its number.
    images: of each row. The last group may have none.
    conditions: by the name of their array.
    unusable: the images that left no rows in this shard, with the reason; of
      its last group only, None in those before.
  """

  shard: int
  images: list[int]
  conditions: dict[str, list[Any]]
  unusable: dict[int, str] | None


class Batch(NamedTuple):
  """Groups for all devices, each filled up with zeros to the same size.

  Values are [devices x size, ...]; the last batch may have fewer groups.
  """

  values: np.ndarray
  groups: list[Group]


def load_batches(
  rows: Rows,
  shards: Sequence[tuple[int, Sequence[tuple[int, int]]]],
  *,
  group_size: int,
  groups: int,
  threads: int,
) -> Iterator[Batch]:
  """Loads shards one after the other, ahead of their use.

  No group has rows of two shards: what is encoded together does not depend on
  which shards are missing, nor on the number of devices, which is that of the
  groups of a batch. Shards are their number, and (image, crop) of each row that
  they have if all images can be used.
  """
  # An image is opened once for its crops in a shard, but at most for as many as
  # a group has: a whole shard could be more than memory holds.
  loads = [
    (number, index, crops[i : i + group_size])
    for number, part in shards
    for index, places in itertools.groupby(part, key=lambda place: place[0])
    for crops in [[crop for _, crop in places]]
    for i in range(0, len(crops), group_size)
  ]

  def load(what):
    _, index, crops = what
    try:
      return rows.load(index, crops)
    except images.UnusableError as error:
      return str(error)

  together = min(rows.per_image, group_size)
  ahead = 2 * max(-(-group_size * groups // together), threads)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
  loaded = grain.MapDataset.source(loads).map(load).to_iter_dataset(options)
  of_images = (
    (number, index, result)
    for (number, index, _), result in zip(loads, loaded, strict=True)
  )
  made = _groups(rows, of_images, group_size)
  while members := list(itertools.islice(made, groups)):
    values = rows.zeros(groups * group_size)
    for k, (_, of_group) in enumerate(members):
      for j, row in enumerate(of_group):
        values[k * group_size + j] = row.values
    yield Batch(values, [group for group, _ in members])


def _groups(
  rows: Rows,
  of_images: Iterator[tuple[int, int, list[Row] | str]],
  size: int,
) -> Iterator[tuple[Group, list[Row]]]:
  """Groups with their rows.

  Args:
    rows: of which they are some.
    of_images: shard, image, and rows or the reason why it has none.
    size: of a group.
  """

  def group(shard, members, unusable=None):
    loaded = [row for _, row in members]
    conditions = {
      name: [row.conditions[name] for row in loaded] for name in rows.conditions
    }
    of_rows = [image for image, _ in members]
    return Group(shard, of_rows, conditions, unusable), loaded

  for shard, part in itertools.groupby(of_images, key=lambda x: x[0]):
    members, unusable, usable = [], {}, None  # the last usable image
    for _, image, result in part:
      if isinstance(result, str):
        unusable[image] = result
      else:
        members += [(image, row) for row in result]
        usable = image
      if usable in unusable:
        raise errors.UserError(
          f"{rows.source.name(image)} changed while it was read "
          f"({unusable[image]}); run again"
        )
      while len(members) > size:  # not the last group, which tells more
        yield group(shard, members[:size])
        members = members[size:]
    yield group(shard, members, unusable)
