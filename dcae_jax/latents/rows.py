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
from dcae_jax.data import decoding as image_decoding
from dcae_jax.data import images, sources
from dcae_jax.latents import layout


class Row(NamedTuple):
  """A row before it is encoded, and what a denoiser is told of it.

  Values are uint8 [size, size, channels], or a latent, float32 [h, w, c].
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

  def reason(self, index: int) -> str | None:
    """Why an image of the source cannot be used; None if it can."""

  def load(self, index: int, crops: Sequence[int]) -> list[Row]:
    """Some rows of an image; UserError if it can no longer be used."""


class _Images:
  """Rows of what `_open` returns of an image, unless that is unusable.

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

  def reason(self, index: int) -> str | None:
    try:
      self._open(index)
    except images.UnusableError as error:
      return str(error)
    return None

  def _still_usable(self, index: int) -> Any:
    try:
      return self._open(index)
    except images.UnusableError as error:
      raise errors.UserError(
        f"{self.source.name(index)} could be used when the export began, and "
        f"can no longer be ({error}); bring it back, or export to another place"
      ) from error


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
    image, conditions = self._still_usable(index)
    rngs = [np.random.default_rng((self._seed, index, i)) for i in crops]
    crop = lambda rng: images.crop(image, self._cropping, rng)
    return [Row(crop(rng), conditions) for rng in rngs]


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
    return [self._still_usable(index) for _ in crops]

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
  """Rows of one shard that one device encodes at once: how many, and whether
  they are the last ones of their shard.
  """

  shard: int
  rows: int
  conditions: dict[str, list[Any]]
  is_last: bool


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
  groups of a batch. Shards are their number, and (image, crop) of each row.
  """
  plan = [
    (number, part[i : i + group_size], i + group_size >= len(part))
    for number, part in shards
    for i in range(0, len(part), group_size)
  ]
  # An image is opened once for all its crops in a group: those of a whole shard
  # could be more than memory holds.
  loads = [
    (index, [crop for _, crop in places])
    for _, part, _ in plan
    for index, places in itertools.groupby(part, key=lambda place: place[0])
  ]
  together = min(rows.per_image, group_size)
  ahead = 2 * max(-(-group_size * groups // together), threads)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
  loaded = itertools.chain.from_iterable(
    grain.MapDataset.source(loads)
    .map(lambda load: rows.load(*load))
    .to_iter_dataset(options)
  )
  for i in range(0, len(plan), groups):
    values, loaded_groups = None, []
    for k, (number, part, is_last) in enumerate(plan[i : i + groups]):
      members = [next(loaded) for _ in part]
      if values is None:
        row = members[0].values
        values = np.zeros((groups * group_size, *row.shape), row.dtype)
      for j, row in enumerate(members):
        values[k * group_size + j] = row.values
      conditions = {
        name: [row.conditions[name] for row in members]
        for name in rows.conditions
      }
      loaded_groups.append(Group(number, len(part), conditions, is_last))
    yield Batch(values, loaded_groups)
