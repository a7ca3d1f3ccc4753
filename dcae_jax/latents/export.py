"""An export: images to latents in a store, by every process of a pod at once.

What can be read is found out first, so that each row has its place before
anything is encoded; then each process encodes whole shards of its own, while
images are loaded ahead and finished shards are written behind it. Started
again, it does what is missing.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dcae_jax import errors
from dcae_jax.autoencoder import autoencoder, latent_statistics
from dcae_jax.latents import encode, rows
from dcae_jax.latents import layout as store_layout
from dcae_jax.latents import store as latent_store
from dcae_jax.runs import progress_lines, resumable, stopwatch

_LOG = logging.getLogger(__name__)


class Plan(NamedTuple):
  """Which row is where: the image and the crop of each row of each shard.

  `unusable` are the images that are left out, with the reason.
  """

  layout: store_layout.Layout
  shards: list[list[tuple[int, int]]]
  unusable: dict[int, str]


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
  ) -> Plan | None:
    """Writes all that is missing; None if it was stopped."""
    with watch.measure("survey"):
      unusable = self._survey(work)
    if unusable is None:
      return None
    plan = self._plan(unusable)
    finished = set(self.store.finished(plan.layout))
    missing = [i for i in range(plan.layout.shards) if i not in finished]
    self._check_space(sum(len(plan.shards[i]) for i in missing))
    own = work.share(missing)
    if jax.process_index() == 0:
      self.store.create_arrays(plan.layout)
    work.wait("arrays")
    _LOG.info(
      "%d rows of %d images, %d unusable; %d of %d shards of %d rows are "
      "missing, %d of them for this process",
      plan.layout.rows, self.images, len(unusable), len(missing),
      plan.layout.shards, plan.layout.shard_rows, len(own),
    )  # fmt: skip
    if own:
      self._encode(plan, own, work, watch)
    with watch.measure("waiting for others"):
      return plan if work.all_done("encoded") else None

  def _survey(self, work: resumable.Work) -> dict[int, str] | None:
    """Finds out which images cannot be used; None if it was stopped."""
    _LOG.info("trying which of %d images can be used", self.images)
    blocks = self.store.survey_blocks(self.images)
    own = {block: blocks[block] for block in work.share(list(blocks))}
    progress = progress_lines.Progress(sum(map(len, own.values())))
    for tried in self.store.survey(own, self.rows.reason, self.threads):
      progress.add(tried)
      if work.stopped():
        break
    if not work.all_done("survey"):
      return None
    unusable = self.store.unusable(self.images)
    for index, reason in sorted(unusable.items())[:20]:
      _LOG.warning("left out %s: %s", self.rows.source.name(index), reason)
    return unusable

  def _plan(self, unusable: dict[int, str]) -> Plan:
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
    return Plan(layout, shards, unusable)

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
    plan: Plan,
    own: list[int],
    work: resumable.Work,
    watch: stopwatch.Stopwatch,
  ) -> None:
    """Encodes and writes shards, as long as it is not stopped."""
    size = min(self.group_size, plan.layout.shard_rows)  # rows of one shard
    with watch.measure("compiling"):
      encoder = self.encoder(size)
    progress = progress_lines.Progress(sum(len(plan.shards[i]) for i in own))
    loaded = rows.load_batches(
      self.rows,
      [(i, plan.shards[i]) for i in own],
      group_size=size,
      groups=jax.local_device_count(),
      threads=self.threads,
    )
    with encode.ShardWriter(self.store, plan.layout) as writer:
      for batch, latents in encode.encoded(loaded, encoder, writer, watch):
        for k, group in enumerate(batch.groups):
          part = slice(k * size, k * size + group.rows)
          views = {view: x[part] for view, x in latents.items()}
          writer.add(views | group.conditions)
          progress.add(group.rows)
          if group.is_last:
            images = (image for image, _ in plan.shards[group.shard])
            keys = [self.rows.source.key(image) for image in images]
            writer.finish_shard(group.shard, keys)
        if work.stopped():
          break
      with watch.measure("waiting for the store"):
        writer.wait()
    progress.finish()

  def finish(
    self,
    plan: Plan,
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
    statistics = encode.merged(self.store.records(plan.layout.shards))
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
