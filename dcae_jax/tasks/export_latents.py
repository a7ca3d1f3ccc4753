"""Images to latents in a store, by every process of a pod at once.

What can be read is found out first, so that each row has its place before
anything is encoded; then each process encodes whole shards of its own, while
images are loaded ahead and finished shards are written behind it. Started
again, it does what is missing.
"""

import json
import logging
import os
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dcae_jax.autoencoder import (
  autoencoder,
  families,
  latent_statistics,
  network,
)
from dcae_jax.autoencoder.weights import conversion
from dcae_jax.data import decoding, images, sources
from dcae_jax.latents import encode as latent_encoding
from dcae_jax.latents import rows
from dcae_jax.latents import store as latent_store
from dcae_jax.nn import precision
from dcae_jax.runs import (
  metrics_writer,
  processes,
  progress_lines,
  stopwatch,
  versions,
)
from dcae_jax.setup import image_sources, models, start
from dcae_jax.training import loop

_LOG = logging.getLogger(__name__)

# Smallest and largest value of each number.
_BOUNDS = {
  "scaling_factor": (0, 1e30),
  "space_to_channel": (1, 64),
  "max_images": (0, 2**31 - 1),
  "resolution": (1, 2**14),
  "min_area": (0.001, 1),
  "crops_per_image": (1, 2**20),
  "seed": (0, 2**31 - 1),
  "min_size": (0, 2**31 - 1),
  "max_megapixels": (0.001, 1e6),
  "batch_size_per_device": (1, 2**16),
  "shard_rows": (0, 2**20),
  "threads": (1, 1000),
  "retries": (0, 1000),
}


def check(config: ConfigDict) -> None:
  """Raises ValueError for a config that cannot be run; reads descriptions."""
  if not config.init_from:
    raise ValueError(
      "config.init_from is empty; name a run, a folder or file of released "
      "weights, or a hub id"
    )
  keys.check(config)
  if config.dtype not in latent_store.DTYPES:
    raise ValueError(
      f"config.dtype={config.dtype!r} is not among "
      f"{', '.join(latent_store.DTYPES)}"
    )
  if config.shard_rows % latent_store.CHUNK_ROWS:
    raise ValueError(
      f"config.shard_rows={config.shard_rows} is not a multiple of "
      f"{latent_store.CHUNK_ROWS}"
    )
  precision.check_dtype(config.compute_dtype)
  images.Cropping(config.crop, config.resolution)
  if config.crops_per_image > 1 and config.crop == "dm_crop":
    raise ValueError(
      f"config.crops_per_image={config.crops_per_image} of config.crop=dm_crop "
      "would all be the same; use random_crop or random_resized_crop"
    )
  if _is_import(config) and (config.flip or config.crops_per_image > 1):
    raise ValueError(
      "config.flip and config.crops_per_image need images; the source is of "
      "kind 'npy', latents"
    )
  decoding.check_channels(models.identity_of(config.init_from).image_channels)
  latent_shape(config)


def latent_shape(config: ConfigDict) -> tuple[int, int, int]:
  """[h, w, c] of the latents; ValueError for a resolution that does not fit."""
  model = models.identity_of(config.init_from)
  variant = families.of_model(model["variant"], model["architecture"])
  compression = variant.spatial_compression * config.space_to_channel
  network.check_side(config.resolution, compression)
  side = config.resolution // compression
  return side, side, variant.latent_channels * config.space_to_channel**2


def run(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm | None = None
) -> bool:
  """Fills the store, and writes `result.json`; False if SIGTERM stopped it."""
  watch, is_first = stopwatch.Stopwatch(), jax.process_index() == 0
  sigterm = sigterm or loop.Sigterm(each_alone=True)
  with watch.measure("start"):
    check(config)
    start.begin(config, workdir)
    output = config.output or os.fspath(workdir / "latents")
    if epath.Path(output).expanduser() == workdir:
      raise ValueError(
        f"config.output={output} is --workdir; use a place of its own for the "
        "store"
      )
    store = latent_store.LatentStore(output, retries=config.retries)
    source = open_source(config)
    store.check(jax.process_index())
    ae = autoencoder.load(
      config.init_from,
      scaling_factor=config.scaling_factor or None,
      dtype=config.compute_dtype,
      space_to_channel=config.space_to_channel,
    )
    export = _Export(config, store, source, ae, watch, sigterm)
    identity = _identity(config, source, ae)
    store.check_identity(identity)
    start.write_config(config, workdir)
    processes.wait_for_all("latents_identity")
    if is_first:
      store.write_identity(identity)
    processes.wait_for_all("latents_start")
    store.confirm_identity(identity)
  if store.manifest() is not None:
    _LOG.info("%s is finished", store.storage.path)
    if is_first:
      store.remove_progress()
    return True
  shards = export.fill()
  if shards is None:
    _LOG.info("SIGTERM: stopped; run again to go on")
    if jax.process_count() > 1:
      processes.leave(0)
    return False
  _LOG.info("time of this process:\n%s", watch.table())
  if is_first:
    store.confirm_identity(identity)
    manifest = export.manifest(identity, shards)
    store.finish(manifest)
    _write_result(workdir, store.storage.path, manifest, watch)
  processes.wait_for_all("latents_finish")
  return True


def _is_import(config: ConfigDict) -> bool:
  return config.source.kind == "npy"


def open_source(config: ConfigDict) -> sources.Source:
  """The images, or latents, that are exported."""
  if _is_import(config):
    source = sources.latent_files(config.source.path)
    source = image_sources.part_of(source, config.source)
  else:
    source = image_sources.single_source(config.source)
  if not config.class_per_image:
    return source
  return sources.ClassPerImage(
    source, sources.limited(source, config.max_images)
  )


def _identity(
  config: ConfigDict, source: sources.Source, ae: autoencoder.Autoencoder
) -> dict[str, Any]:
  """What must be the same for an export to go on with a store.

  None stands for what it will find out itself.
  """
  encoder = conversion.fingerprint(
    latent_encoding.encoder_variables(ae.variables)
  )
  crop = {"kind": config.crop, "per_image": config.crops_per_image}
  if config.crop == "dm_crop":
    crop["rule"] = images.EVALUATION_CROP
  else:
    crop["seed"] = config.seed
  if config.crop == "random_resized_crop":
    crop["min_area"] = config.min_area
  crop["min_size"] = config.min_size
  crop["max_megapixels"] = config.max_megapixels
  if _is_import(config):
    crop = {"kind": "not known: latents of another tool"}
  return {
    "autoencoder": {
      "variant": ae.variant,
      "image_channels": ae.image_channels,
      "spatial_compression": ae.spatial_compression,
      "latent_channels": ae.latent_channels,
      "space_to_channel": config.space_to_channel,
      "compute_dtype": config.compute_dtype,
      "encoder_sha256": encoder,
    },
    "scaling_factor": ae.scaling_factor,
    "shift_factor": ae.shift_factor,
    "resolution": config.resolution,
    "crop": crop,
    "views": list(latent_store.VIEWS[: 1 + config.flip]),
    "dtype": config.dtype,
    "shard_rows": config.shard_rows or None,
    "source": {
      "kind": config.source.kind,
      "images": sources.limited(source, config.max_images),
      "fingerprint": source.fingerprint(),
    },
  }


class _Export:
  """One process's part of an export."""

  def __init__(
    self,
    config: ConfigDict,
    store: latent_store.LatentStore,
    source: sources.Source,
    ae: autoencoder.Autoencoder,
    watch: stopwatch.Stopwatch,
    sigterm: loop.Sigterm,
  ):
    self._config, self._store, self._source = config, store, source
    self._ae, self._watch = ae, watch
    self._stop = sigterm
    self._total = sources.limited(source, config.max_images)
    side = config.resolution // ae.spatial_compression
    self._shape = (side, side, ae.latent_channels)
    self._views = latent_store.VIEWS[: 1 + config.flip]
    self._dtype = latent_store.DTYPES[config.dtype]
    self._unusable: dict[int, str] = {}
    if _is_import(config):
      self._rows = rows.LatentFiles(
        source,
        self._shape,
        scaling_factor=_known_scaling_factor(ae),
        shift_factor=ae.shift_factor,
      )
    else:
      self._rows = rows.Crops(
        source,
        images.Decoding(
          ae.image_channels,
          min_size=config.min_size,
          max_megapixels=config.max_megapixels,
        ),
        images.Cropping(config.crop, config.resolution, config.min_area),
        per_image=config.crops_per_image,
        seed=config.seed,
      )

  def fill(self) -> int | None:
    """Writes all that is missing; the number of shards, None if stopped."""
    with self._watch.measure("survey"):
      if not self._survey():
        return None
    places = [
      (index, crop)
      for index in range(self._total)
      if index not in self._unusable
      for crop in range(self._rows.per_image)
    ]
    if not places:
      raise ValueError(
        f"none of the {self._total} images can be used; the first: "
        f"{self._source.name(0)}: {self._unusable[0]}"
      )
    size = self._shard_rows(len(places))
    shards = [places[i : i + size] for i in range(0, len(places), size)]
    finished = set(self._store.finished(len(shards), self._views))
    missing = [i for i in range(len(shards)) if i not in finished]
    self._check_space(sum(len(shards[i]) for i in missing))
    processes.wait_for_all(
      "latents_plan"
    )  # nobody writes before all have looked
    if jax.process_index() == 0:
      self._store.create_arrays(
        len(places), self._shape, self._config.dtype, self._views, size
      )
    processes.wait_for_all("latents_arrays")
    own = missing[jax.process_index() :: jax.process_count()]
    _LOG.info(
      "%d rows of %d images, %d unusable; %d of %d shards of %d rows are "
      "missing, %d of them for this process",
      len(places), self._total, len(self._unusable), len(missing), len(shards),
      size, len(own),
    )  # fmt: skip
    if own and not self._encode({i: shards[i] for i in own}, size):
      return None
    with self._watch.measure("waiting for others"):
      processes.wait_for_all("latents_encoded")
    return len(shards)

  def _shard_rows(self, total: int) -> int:
    bytes_of_row = int(np.prod(self._shape)) * self._dtype.itemsize
    return self._config.shard_rows or latent_store.block_size(
      total, bytes_of_row
    )

  def _survey(self) -> bool:
    """Finds out what cannot be used; False if stopped."""
    progress = progress_lines.Progress(self._total // jax.process_count())
    _LOG.info("trying which of %d images can be used", self._total)
    self._store.survey(
      self._total,
      self._rows.reason,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      threads=self._config.threads,
      on_images=progress.add,
      stopped=lambda: self._stop.received,
    )
    if self._stop.received:
      return False
    processes.wait_for_all("latents_survey")
    self._unusable = self._store.unusable(self._total)
    for index, reason in sorted(self._unusable.items())[:20]:
      _LOG.warning("left out %s: %s", self._source.name(index), reason)
    return True

  def _check_space(self, missing_rows: int) -> None:
    values = missing_rows * len(self._views) * int(np.prod(self._shape))
    needed, free = (
      values * self._dtype.itemsize, self._store.storage.free_bytes()
    )  # fmt: skip
    if free is not None and free < needed:
      raise ValueError(
        f"no space left for latents: {self._store.storage.path} has "
        f"{free / 1e6:,.1f} MB free, and {needed / 1e6:,.1f} MB are missing; "
        "make room, or choose another config.output"
      )

  def _encode(
    self, shards: dict[int, list[tuple[int, int]]], shard_rows: int
  ) -> bool:
    """Encodes and writes shards; False if it was stopped before the end."""
    config, watch = self._config, self._watch
    size, devices = config.batch_size_per_device, jax.local_devices()
    size = min(size, shard_rows)  # a group has rows of one shard
    encode = latent_encoding.converted(self._views[0], self._dtype)
    if not _is_import(config):
      with watch.measure("compiling"):
        encode = latent_encoding.compiled(
          self._ae,
          self._views,
          self._dtype,
          resolution=config.resolution,
          group_size=size,
          devices=devices,
        )
    progress = progress_lines.Progress(
      sum(len(part) for part in shards.values())
    )
    loaded = rows.load_batches(
      self._rows,
      list(shards.items()),
      group_size=size,
      groups=len(devices),
      threads=config.threads,
    )
    with latent_encoding.ShardWriter(self._store, shard_rows) as writer:
      for batch, latents in latent_encoding.encoded(
        loaded, encode, writer, watch
      ):
        for k, group in enumerate(batch.groups):
          first, stop = k * size, k * size + len(group.labels)
          parts = {view: x[first:stop] for view, x in latents.items()}
          progress.add(len(group.labels))
          writer.add(parts, group.labels)
          if group.is_last:
            keys = [self._source.key(i) for i, _ in shards[group.shard]]
            writer.finish_shard(group.shard, keys)
        if self._stop.received:
          break
      with watch.measure("waiting for the store"):
        writer.wait()
    progress.finish()
    return not self._stop.received

  def manifest(self, identity: dict[str, Any], shards: int) -> dict[str, Any]:
    """Of a store whose shards are all written.

    Raises:
      ValueError: some are not, or all latents are zero.
    """
    missing = set(range(shards)) - set(
      self._store.finished(shards, self._views)
    )
    if missing:
      raise ValueError(
        f"{len(missing)} shards of {self._store.storage.path} are not there "
        f"after all, the first {min(missing)}; run again"
      )
    records = self._store.records(shards)
    statistics = latent_encoding.merged(records)
    factor, origin = self._scaling_factor(statistics)
    of_autoencoder = {
      "init_from": _found_again(self._config.init_from),
      "weights_sha256": conversion.fingerprint(self._ae.variables),
    }
    count = sum(record["rows"] for record in records)
    return identity | {
      "autoencoder": identity["autoencoder"] | of_autoencoder,
      "scaling_factor": factor,
      "scaling_factor_origin": origin,
      "statistics": statistics,
      "count": count,
      "shape": list(self._shape),
      "classes": list(self._source.classes),
      "unreadable": [
        {"index": index, "key": self._source.key(index), "reason": reason}
        for index, reason in sorted(self._unusable.items())
      ],
      "shard_rows": self._shard_rows(count),
      "shards": [
        {"rows": record["rows"], "sha256": record["sha256"]}
        for record in records
      ],
      "metadata_sha256": self._store.metadata_checksums(self._views),
      "versions": versions.versions(),
    }

  def _scaling_factor(self, statistics: dict[str, Any]) -> tuple[float, str]:
    """And where it comes from."""
    if self._config.scaling_factor:
      return self._config.scaling_factor, "given"
    if self._ae.scaling_factor is not None:
      return self._ae.scaling_factor, "the autoencoder's"
    factor = latent_statistics.scaling_factor(statistics, self._ae.shift_factor)
    if factor is None:
      raise ValueError("all latents are zero: they have no scaling factor")
    return factor, "1 / RMS of these latents"


def _known_scaling_factor(ae: autoencoder.Autoencoder) -> float:
  if ae.scaling_factor is None:
    raise ValueError(
      "the scaling factor that the latents were multiplied by is not known; "
      "give it, config.scaling_factor=..."
    )
  return ae.scaling_factor


def _found_again(path: str) -> str:
  """`init_from`, so that others find it from elsewhere."""
  local = os.path.abspath(os.path.expanduser(path))
  return local if "://" not in path and os.path.exists(local) else path


def _write_result(
  workdir: epath.Path,
  output: str,
  manifest: dict[str, Any],
  watch: stopwatch.Stopwatch,
) -> None:
  seconds = watch.seconds()
  share = seconds.get("encoder", 0.0) / seconds["total"]
  result = {
    "latents": output,
    "count": manifest["count"],
    "unreadable": len(manifest["unreadable"]),
    "scaling_factor": manifest["scaling_factor"],
    "seconds": seconds,
    "encoder_share": share,
  }
  metrics_writer.write_whole(
    workdir / "result.json", json.dumps(result, indent=2)
  )
  _LOG.info(
    "%d rows in %s, %d images unreadable; %.1f %% of the time in the encoder",
    manifest["count"], output, len(manifest["unreadable"]), 100 * share,
  )  # fmt: skip
