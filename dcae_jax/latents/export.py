"""An export: images to latents in a store, by every process of a pod at once.

Each process encodes whole shards of its own, while images are loaded ahead and
finished shards are written behind it. Where images turn out to be unusable, the
rows after them move up in the end. Started again, it does what is missing.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import jax

from dcae_jax import errors
from dcae_jax.autoencoder import autoencoder, latent_statistics
from dcae_jax.latents import encode, placement, rows
from dcae_jax.latents import layout as store_layout
from dcae_jax.latents import store as latent_store
from dcae_jax.runs import progress_lines, resumable, stopwatch

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Export:
  """What is exported, and how.

  Attributes:
    images: number of images of the source; the first ones are used.
    shape: of a latent, [h / f, w / f, c].
    dtype: of the stored latents, a key of `layout.DTYPES`.
    views: of `layout.VIEWS`.
    encoder: makes the encoder, given the rows that a device encodes at once.
    group_size: that number; a shard that has fewer rows lowers it.
    shard_rows: 0: `layout.block_size`.
    threads: of the loader.
  """

  store: latent_store.LatentStore
  rows: rows.Rows
  images: int
  shape: tuple[int, int, int]
  dtype: str
  views: tuple[str, ...]
  encoder: Callable[[int], encode.Encode]
  group_size: int
  shard_rows: int
  threads: int

  def fill(
    self, work: resumable.Work, watch: stopwatch.Stopwatch
  ) -> placement.Plan | None:
    """Writes all that is missing; None if it was stopped."""
    plan = self._plan(self.store.surveyed())
    closed = self.store.closed()
    if closed is None and not self._encode_missing(plan, work, watch):
      return None
    unusable = closed or self._unusable(plan)
    for index, reason in sorted(unusable.items())[:20]:
      _LOG.warning("left out %s: %s", self.rows.source.name(index), reason)
    if unusable == plan.unusable:
      return plan
    after = self._plan(unusable)
    closing = placement.Closing(self.store, plan, after)
    with watch.measure("closing gaps"):
      is_moved = closed or self._move(closing, after, work)
      return after if is_moved and self._replace(closing, work) else None

  def _encode_missing(
    self, plan: placement.Plan, work: resumable.Work, watch: stopwatch.Stopwatch
  ) -> bool:
    """Whether all shards are written, but for gaps; False if it was stopped."""
    there = {*self.store.finished(plan.layout), *self.store.empty()}
    missing = [i for i in range(plan.layout.shards) if i not in there]
    self._check_space(sum(len(plan.shards[i]) for i in missing))
    own = work.share(missing)
    if jax.process_index() == 0:
      self.store.create_arrays(plan.layout)
      if missing:  # then they may have other gaps than when rows moved
        self.store.discard_moved()
    work.wait("arrays")
    _LOG.info(
      "%d rows of %d images, if all can be used; %d of %d shards of %d rows "
      "are missing, %d of them for this process",
      plan.layout.rows, self.images, len(missing), plan.layout.shards,
      plan.layout.shard_rows, len(own),
    )  # fmt: skip
    if own:
      self._encode(plan, own, work, watch)
    with watch.measure("waiting for others"):
      return work.all_done("encoded")

  def _unusable(self, plan: placement.Plan) -> dict[int, str]:
    """All images that are, when all shards are written."""
    found = plan.unusable.copy()
    for gaps in self.store.gaps(plan.layout.shards):
      found |= gaps
    return found

  def _move(
    self,
    closing: placement.Closing,
    after: placement.Plan,
    work: resumable.Work,
  ) -> bool:
    """Whether all shards that change are made anew; False if stopped."""
    missing = closing.missing()
    _LOG.info(
      "%d images are unusable: %d rows of %d shards, of which %d are made anew",
      len(after.unusable), after.layout.rows, after.layout.shards, len(missing),
    )  # fmt: skip
    self._check_space(sum(len(after.shards[i]) for i in missing))
    own = work.share(missing)
    if jax.process_index() == 0:
      closing.begin()
    work.wait("arrays")
    total = sum(len(after.shards[i]) for i in own)
    with progress_lines.Progress(total, "rows") as progress:
      for rows_of_shard in closing.move(own, work.stopped):
        progress.add(rows_of_shard)
    return work.all_done("moved")

  def _replace(self, closing: placement.Closing, work: resumable.Work) -> bool:
    """Whether they have taken the places of those with gaps."""
    if jax.process_index() == 0:
      closing.begin_replacing()
    closing.replace(work.share(closing.unreplaced()), work.stopped)
    return work.all_done("replaced")

  def _plan(self, unusable: dict[int, str]) -> placement.Plan:
    places = [
      (index, crop)
      for index in range(self.images)
      if index not in unusable
      for crop in range(self.rows.per_image)
    ]
    if not places:
      raise errors.UserError(
        f"none of the {self.images} images can be used; the first: "
        f"{self.rows.source.name(0)}: {unusable[0]}"
      )
    size = self.shard_rows or store_layout.block_size(
      len(places), self._latent_bytes
    )
    layout = store_layout.Layout(
      len(places), self.shape, self.dtype, self.views, size,
      self.rows.conditions,
    )  # fmt: skip
    shards = [places[i : i + size] for i in range(0, len(places), size)]
    return placement.Plan(layout, shards, unusable)

  @property
  def _latent_bytes(self) -> int:
    itemsize = store_layout.DTYPES[self.dtype].itemsize
    return math.prod(self.shape) * itemsize

  def _check_space(self, missing_rows: int) -> None:
    needed = missing_rows * len(self.views) * self._latent_bytes
    free = self.store.storage.free_bytes()
    if free is not None and free < needed:
      raise errors.UserError(
        f"no space left for latents: {self.store.storage.path} has "
        f"{free / 1e6:,.1f} MB free of {needed / 1e6:,.1f} MB that are needed; "
        "make room, or choose another config.output"
      )

  def _encode(
    self,
    plan: placement.Plan,
    own: list[int],
    work: resumable.Work,
    watch: stopwatch.Stopwatch,
  ) -> None:
    """Encodes and writes shards, as long as it is not stopped."""
    size = min(self.group_size, plan.layout.shard_rows)  # rows of one shard
    with watch.measure("compiling"):
      encoder = self.encoder(size)
    total = sum(len(plan.shards[i]) for i in own)
    loaded = rows.load_batches(
      self.rows,
      [(i, plan.shards[i]) for i in own],
      group_size=size,
      groups=jax.local_device_count(),
      threads=self.threads,
    )
    with (
      progress_lines.Progress(total) as progress,
      encode.ShardWriter(self.store, plan.layout) as writer,
    ):
      for batch, latents in encode.encoded(loaded, encoder, writer, watch):
        for k, group in enumerate(batch.groups):
          if group.images:
            part = slice(k * size, k * size + len(group.images))
            views = {view: x[part] for view, x in latents.items()}
            keys = [self.rows.source.key(image) for image in group.images]
            writer.add(views | group.conditions, keys)
            progress.add(len(group.images))
          if group.unusable is not None:
            writer.finish_shard(group.shard, group.unusable)
            gaps = [
              i for i, _ in plan.shards[group.shard] if i in group.unusable
            ]
            progress.add(0, left_out=len(gaps))
        if work.stopped():
          break
      with watch.measure("waiting for the store"):
        writer.wait()
    progress.finish()

  def finish(
    self,
    plan: placement.Plan,
    ae: autoencoder.Autoencoder,
    factor_origin: str,
    described: dict[str, Any],
  ) -> None:
    """Writes the manifest, of which `described` is known before the export.

    `factor_origin` is of the autoencoder's scaling factor, if it has one.

    Raises:
      UserError: some shards are gone, or all latents are zero.
    """
    finished = self.store.finished(plan.layout)
    missing = set(range(plan.layout.shards)).difference(finished)
    if missing:
      raise errors.UserError(
        f"{len(missing)} shards of {self.store.storage.path} are gone, the "
        f"first {min(missing)}; run again"
      )
    statistics = encode.merged(self.store.records(range(plan.layout.shards)))
    factor = ae.scaling_factor
    if factor is None:
      factor_origin = "1 / RMS of these latents"
      factor = latent_statistics.scaling_factor(statistics, ae.shift_factor)
    if factor is None:
      raise errors.UserError("all latents are zero: there is nothing to scale")
    source = self.rows.source
    computed = {
      "scaling_factor": factor,
      "scaling_factor_origin": factor_origin,
      "statistics": statistics,
      "classes": list(source.classes),
      "unreadable": [
        {"index": index, "key": source.key(index), "reason": reason}
        for index, reason in sorted(plan.unusable.items())
      ],
    }
    self.store.finish(plan.layout, described | computed)
