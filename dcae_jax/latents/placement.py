"""Which row is where in a store, and how rows move up to close gaps.

Rows are numbered before anybody knows which images can be decoded, as if all
could be, so that each image is decoded once. Where some cannot, their rows are
gaps. Then the shards that change are made anew, in a store below progress/;
when that has all of them, they take the places of those with gaps. Whoever is
killed meanwhile leaves all rows with gaps, or all shards without.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dcae_jax.latents import encode, layout, store


class Plan(NamedTuple):
  """Which row is where: the image and the crop of each row of each shard.

  `unusable` are the images that are left out, with the reason.
  """

  layout: layout.Layout
  shards: list[list[tuple[int, int]]]
  unusable: dict[int, str]


class Closing:
  """The rows of a store on their way from a plan to one without gaps."""

  def __init__(self, target: store.LatentStore, before: Plan, after: Plan):
    """Writes nothing yet; `before` is the plan of what was written."""
    self._store, self._moved = target, target.moved()
    self._before, self._after = before, after

  def begin(self) -> None:
    """Called by one process, before any of them moves; again does no harm."""
    self._moved.create_arrays(self._after.layout)

  def missing(self) -> list[int]:
    """The shards that change, and that were not made anew so far."""
    finished = set(self._moved.finished(self._after.layout))
    return [
      shard
      for shard in range(self._after.layout.shards)
      if shard not in finished and self._changes(shard)
    ]

  def _changes(self, shard: int) -> bool:
    before, after = self._before, self._after
    if before.layout.shard_rows != after.layout.shard_rows:
      return True
    return before.shards[shard] != after.shards[shard]

  def move(
    self, shards: Sequence[int], stopped: Callable[[], bool]
  ) -> Iterator[int]:
    """Makes shards anew, unless it is stopped; yields the rows of each."""
    size, moving = self._after.layout.shard_rows, self._positions()
    with encode.ShardWriter(self._moved, self._after.layout) as writer:
      for shard in shards:
        if stopped():
          break
        rows = moving[shard * size : (shard + 1) * size]
        arrays = self._store.read_rows(self._before.layout, rows)
        keys = arrays.pop("keys")
        writer.add(arrays, keys)
        writer.finish_shard(shard, {})
        yield len(rows)
      writer.wait()

  def _positions(self) -> np.ndarray:
    """Where each row of the new plan was written."""
    before, size = self._before, self._before.layout.shard_rows
    gaps = self._store.gaps(before.layout.shards)
    found = []
    for shard, (part, unusable) in enumerate(
      zip(before.shards, gaps, strict=True)
    ):
      written = [image for image, _ in part if image not in unusable]
      found += [
        shard * size + i
        for i, image in enumerate(written)
        if image not in self._after.unusable  # found so in another shard
      ]
    return np.array(found, np.int64)

  def begin_replacing(self) -> None:
    """Called by one process, before `replace`; again does no harm."""
    before, after = self._before.layout, self._after.layout
    self.begin()  # the metadata have no checksum yet
    self._store.write_closed(self._after.unusable)
    self._store.take_metadata(after, self._moved)
    gone = range(after.shards, before.shards)
    self._store.remove_shards(before, gone)

  def unreplaced(self) -> list[int]:
    return self._moved.finished(self._after.layout)

  def replace(self, shards: Sequence[int], stopped: Callable[[], bool]) -> None:
    """Shards take the places of those with gaps, unless it is stopped."""
    for shard in shards:
      if stopped():
        return
      self._store.take_shard(self._after.layout, shard, self._moved)
