"""Parts of other sources: some of their images, or each a class of its own."""

import hashlib
from collections.abc import Sequence

from dcae_jax import errors
from dcae_jax.data.sources import protocol


class Subset:
  """Some images of another source; its classes and labels stay."""

  def __init__(self, source: protocol.Source, indices: Sequence[int]):
    self.classes = source.classes
    self._source, self._indices = source, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> protocol.Record:
    return self._source[self._indices[index]]

  def name(self, index: int) -> str:
    return self._source.name(self._indices[index])

  def key(self, index: int) -> str:
    return self._source.key(self._indices[index])

  def fingerprint(self) -> str:
    """sha256 of the other one's, and of what is taken from it."""
    text = f"{list(self._indices)} of {self._source.fingerprint()}"
    return hashlib.sha256(text.encode()).hexdigest()


def split(source: protocol.Source, held_out: float) -> tuple[Subset, Subset]:
  """A source in two: what is trained on, and what is held out.

  An image is held out by the hash of its key alone: in every run the same,
  whatever is added to the source. If that would leave none of few images on a
  side, the one with the lowest or highest hash is there. The held-out ones are
  in the order of their hashes, so that the first of them are a fair choice.

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
  hashes = [_hash(source.key(i)) for i in range(len(source))]
  order = sorted(range(len(source)), key=hashes.__getitem__)
  count = sum(value < held_out for value in hashes)
  count = min(max(count, 1), len(source) - 1)
  return Subset(source, sorted(order[count:])), Subset(source, order[:count])


def _hash(key: str) -> float:
  """From 0 to 1, evenly."""
  digest = hashlib.sha256(key.encode("utf-8", "backslashreplace")).digest()
  return int.from_bytes(digest[:8], "big") / 2**64


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
