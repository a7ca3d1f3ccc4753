"""Parts of other sources: some of their images, or each a class of its own."""

import hashlib
from collections.abc import Sequence

import numpy as np

from dcae_jax import errors
from dcae_jax.data.sources import protocol


class Subset:
  """Some images of another source; its classes and labels stay."""

  def __init__(
    self, source: protocol.Source, indices: Sequence[int] | np.ndarray
  ):
    self.classes = source.classes
    self._source, self._indices = source, np.asarray(indices, np.int32)

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> protocol.Record:
    return self._source[int(self._indices[index])]

  def name(self, index: int) -> str:
    return self._source.name(int(self._indices[index]))

  def key(self, index: int) -> str:
    return self._source.key(int(self._indices[index]))

  def sizes(self) -> np.ndarray | None:
    sizes = protocol.sizes(self._source)
    return None if sizes is None else sizes[self._indices]

  def draws(self) -> np.ndarray:
    return protocol.draws(self._source)[self._indices]

  def groups(self) -> protocol.Groups | None:
    groups = protocol.groups(self._source)
    return groups and groups._replace(of=groups.of[self._indices])

  def fingerprint(self) -> str:
    """sha256 of the other one's, and of what is taken from it."""
    text = f"{self._indices.tolist()} of {self._source.fingerprint()}"
    return hashlib.sha256(text.encode()).hexdigest()


def at_least(source: protocol.Source, side: int) -> protocol.Source:
  """The images with no smaller side, where sizes are known without reading.

  Else the source as it is. Raises UserError if none is that large.
  """
  sizes = protocol.sizes(source) if side else None
  if sizes is None:
    return source
  is_large = sizes.min(1) >= side
  if not is_large.any():
    raise errors.UserError(
      f"none of the {len(source)} images, such as {source.name(0)}, has sides "
      f"of at least min_size={side} pixels; lower it"
    )
  return source if is_large.all() else Subset(source, np.flatnonzero(is_large))


def split(source: protocol.Source, held_out: float) -> tuple[Subset, Subset]:
  """A source in two: what is trained on, and what is held out.

  An image is held out by its `draws` alone: in every run the same, whatever is
  added to the source. If that would leave none of few images on a
  side, the one with the lowest or highest one is there. The held-out ones are
  in that order, so that the first of them are a fair choice.

  Raises UserError for fewer than two images, or a part not between 0 and 1.
  """
  if not 0 < held_out < 1:
    raise errors.UserError(
      f"the held-out part {held_out} is not between 0 and 1"
    )
  if len(source) < 2:
    raise errors.UserError(
      f"{source.name(0)} is the only image, and none is left to be held out; "
      "add more of them, or name other ones to evaluate on"
    )
  draws = protocol.draws(source)
  order = np.argsort(draws, kind="stable")
  count = np.count_nonzero(draws < held_out)
  count = min(max(count, 1), len(source) - 1)
  return Subset(source, np.sort(order[count:])), Subset(source, order[:count])


class ClassPerImage(Subset):
  """The first images of another source, each a class named by its key."""

  def __init__(self, source: protocol.Source, count: int):
    super().__init__(source, range(count))
    self.classes = [source.key(i) for i in range(count)]

  def __getitem__(self, index: int) -> protocol.Record:
    return super().__getitem__(index)._replace(label=index)

  def fingerprint(self) -> str:
    """sha256 of the other one's, and of what is different here."""
    text = f"{len(self)} classes of {self._source.fingerprint()}"
    return hashlib.sha256(text.encode()).hexdigest()
