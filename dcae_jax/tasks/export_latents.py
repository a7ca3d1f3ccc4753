"""Images to latents in a store, by every process of a pod at once.

What can be read is found out first, so that each row has its place before
anything is encoded; then each process encodes whole shards of its own, while
images are loaded ahead and finished shards are written behind it. Started
again, it does what is missing.
"""

import collections
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dcae_jax import architecture, autoencoder, weights
from dcae_jax.data import images, latent_store, rows, sources, transforms
from dcae_jax.evaluation import latent_statistics
from dcae_jax.models import dcae
from dcae_jax.tasks import measuring, stopwatch, wiring
from dcae_jax.training import loop, metrics_writer

_LOG = logging.getLogger(__name__)
_IN_FLIGHT = 2  # batches on the devices
_UPLOADS = 2  # shards that are written at once, or wait for it

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
  for key, (least, most) in _BOUNDS.items():
    if not least <= config[key] <= most:  # also for NaN
      raise ValueError(
        f"config.{key}={config[key]} is not from {least} to {most}"
      )
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
  dcae.check_dtype(config.compute_dtype)
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
  model = wiring.model_of(config.init_from)
  transforms.check_channels(model["image_channels"])
  variant = architecture.of_model(model["variant"], model["architecture"])
  compression = variant.spatial_compression * config.space_to_channel
  dcae.check_side(config.resolution, compression)


def run(config: ConfigDict, workdir: epath.Path) -> bool:
  """Fills the store, and writes `result.json`."""
  watch = stopwatch.Stopwatch()
  with watch.measure("start"):
    check(config)
    wiring.check_work_directory(config, workdir)
    wiring.prepare_jax(config.compilation_cache)
    output = config.output or os.fspath(workdir / "latents")
    store = latent_store.LatentStore(output, retries=config.retries)
    source = _source(config.source)
    store.check()
    ae = autoencoder.load(
      config.init_from,
      scaling_factor=config.scaling_factor or None,
      dtype=config.compute_dtype,
      space_to_channel=config.space_to_channel,
    )
    identity = _identity(config, source, ae)
    store.check_identity(identity)
    wiring.write_config(config, workdir)
    wiring.wait_for_all("latents_identity")
    if jax.process_index() == 0:
      store.write_identity(identity)
    wiring.wait_for_all("latents_start")
  stop = loop.Sigterm(each_alone=True)
  export = _Export(config, store, source, ae, watch, stop)
  manifest = store.manifest()
  if manifest is None:
    manifest = export.fill(identity)
  elif jax.process_index() == 0:
    store.remove_progress()
  if manifest is None:
    _LOG.info("SIGTERM: stopped; run again to go on")
    return True
  wiring.wait_for_all("latents_finish")
  if jax.process_index() == 0:
    _write_result(workdir, store.storage.path, manifest, watch)
  return True


def _is_import(config: ConfigDict) -> bool:
  return config.source.kind == "npy"


def _source(config: ConfigDict) -> sources.Source:
  if config.kind == "npy":
    return sources.latent_files(config.path)
  return wiring.single_source(config)


def _identity(
  config: ConfigDict, source: sources.Source, ae: autoencoder.Autoencoder
) -> dict[str, Any]:
  """What must be the same for the export to go on; None: it will find out."""
  crop = {"kind": config.crop, "images": config.crops_per_image}
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
  total = min(len(source), config.max_images or len(source))
  return {
    "autoencoder": {
      "variant": ae.variant,
      "image_channels": ae.image_channels,
      "spatial_compression": ae.spatial_compression,
      "latent_channels": ae.latent_channels,
      "space_to_channel": config.space_to_channel,
      "compute_dtype": config.compute_dtype,
      "weights_sha256": weights.fingerprint(ae.variables),
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
      "images": total,
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
    stop: loop.Sigterm,
  ):
    self._config, self._store, self._source = config, store, source
    self._ae, self._watch, self._stop = ae, watch, stop
    self._total = min(len(source), config.max_images or len(source))
    side = config.resolution // ae.spatial_compression
    self._shape = (side, side, ae.latent_channels)
    self._views = latent_store.VIEWS[: 1 + config.flip]
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

  def fill(self, identity: dict[str, Any]) -> dict[str, Any] | None:
    """All that is missing; returns the manifest, None if it was stopped."""
    with self._watch.measure("survey"):
      unusable = self._survey()
    if unusable is None:
      return None
    places = [
      (index, crop)
      for index in range(self._total)
      if index not in unusable
      for crop in range(self._rows.per_image)
    ]
    if not places:
      raise ValueError(
        f"none of the {self._total} images can be used; the first: "
        f"{self._source.name(0)}: {unusable[0]}"
      )
    shard_rows = self._config.shard_rows or latent_store.block_size(len(places))
    shards = [
      places[i : i + shard_rows] for i in range(0, len(places), shard_rows)
    ]
    finished = set(self._store.finished(len(shards), self._views))
    missing = [i for i in range(len(shards)) if i not in finished]
    self._check_space(sum(len(shards[i]) for i in missing))
    wiring.wait_for_all("latents_plan")
    if jax.process_index() == 0:
      self._store.create_arrays(
        len(places), self._shape, self._config.dtype, self._views, shard_rows
      )
    wiring.wait_for_all("latents_arrays")
    own = missing[jax.process_index() :: jax.process_count()]
    _LOG.info(
      "%d rows of %d images, %d unusable; %d of %d shards of %d rows are "
      "missing, %d of them for this process",
      len(places), self._total, len(unusable), len(missing), len(shards),
      shard_rows, len(own),
    )  # fmt: skip
    if own and not self._encode({i: shards[i] for i in own}, shard_rows):
      return None
    with self._watch.measure("waiting for others"):
      wiring.wait_for_all("latents_encoded")
    manifest = self._manifest(identity, unusable, len(shards), shard_rows)
    if jax.process_index() == 0:
      self._store.finish(manifest)
    return manifest

  def _survey(self) -> dict[int, str] | None:
    progress = measuring.Progress(self._total)
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
      return None
    wiring.wait_for_all("latents_survey")
    unusable = self._store.unusable(self._total)
    for index, reason in sorted(unusable.items())[:20]:
      _LOG.warning("left out %s: %s", self._source.name(index), reason)
    return unusable

  def _check_space(self, missing_rows: int) -> None:
    size = latent_store.DTYPES[self._config.dtype].itemsize
    needed = missing_rows * len(self._views) * int(np.prod(self._shape)) * size
    free = self._store.storage.free_bytes()
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
    encode = self._convert
    if not _is_import(config):
      with watch.measure("compiling"):
        encode = self._compiled(devices)
    progress = measuring.Progress(sum(len(part) for part in shards.values()))
    loaded = rows.load_batches(
      self._rows,
      list(shards.items()),
      group_size=size,
      groups=len(devices),
      threads=config.threads,
    )
    with _Writer(self._store, shard_rows) as writer:
      for batch, latents in self._encoded(loaded, encode, writer):
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

  def _encoded(
    self, loaded: Iterator[rows.Batch], encode: Any, writer: "_Writer"
  ) -> Iterator[tuple[rows.Batch, dict[str, np.ndarray]]]:
    """Batches with their latents; the devices have the next one already.

    The encoder's time is that in which at least one batch was on the devices;
    when there was none, images were missing, or the writer was too slow.
    """

    def fetch(latents):
      return jax.device_get(latents), time.monotonic()

    in_flight, last, waited = collections.deque(), time.monotonic(), 0.0
    with futures.ThreadPoolExecutor(1) as fetcher:
      batch = next(loaded, None)
      while batch is not None or in_flight:
        if batch is not None:
          sent, store = time.monotonic(), writer.waited - waited
          waited = writer.waited
          future = fetcher.submit(fetch, encode(batch.values))
          in_flight.append((batch, sent, store, future))
          batch = next(loaded, None)
        if batch is None or len(in_flight) >= _IN_FLIGHT:
          done, sent, store, future = in_flight.popleft()
          latents, ready = future.result()
          idle = max(sent - last, 0.0)
          self._watch.add("encoder", ready - max(sent, last))
          self._watch.add("waiting for images", idle - min(idle, store))
          self._watch.add("waiting for the store", min(idle, store))
          last = ready
          yield done, latents

  def _convert(self, values: np.ndarray) -> dict[str, np.ndarray]:
    with np.errstate(over="ignore"):  # the writer refuses what is not finite
      latents = values.astype(latent_store.DTYPES[self._config.dtype])
    return {self._views[0]: latents}

  def _compiled(self, devices: list[jax.Device]) -> Any:
    """The encoder over this process's devices, one group on each."""
    config, ae = self._config, self._ae
    mesh = Mesh(np.array(devices), ("data",))
    dtype = latent_store.DTYPES[config.dtype]
    whole = NamedSharding(mesh, PartitionSpec())
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    batch_size = config.batch_size_per_device * len(devices)
    variables = jax.device_put(jax.device_get(ae.variables), whole)

    def encode(variables, pixels):
      x = pixels.astype(jnp.float32) / 127.5 - 1
      return {
        view: ae.apply(variables, images, method="encode").astype(dtype)
        for view, images in zip(self._views, (x, x[:, :, ::-1]), strict=False)
      }

    side = config.resolution
    pixels = jax.ShapeDtypeStruct(
      (batch_size, side, side, ae.image_channels), jnp.uint8, sharding=by_row
    )
    program = (
      jax.jit(encode, out_shardings=by_row).lower(variables, pixels).compile()
    )
    return lambda values: program(variables, jax.device_put(values, by_row))

  def _manifest(
    self,
    identity: dict[str, Any],
    unusable: dict[int, str],
    shards: int,
    shard_rows: int,
  ) -> dict[str, Any]:
    records = self._store.records(shards)
    statistics = latent_statistics.LatentStatistics(self._shape[-1])
    for record in records:
      moments = record["moments"]
      mean, variance = (
        np.array([moments["mean"]]),
        np.array([moments["variance"]]),
      )
      statistics.update(mean, variance, moments["positions"])
    found = statistics.compute()
    factor, origin = self._ae.scaling_factor, "the autoencoder's"
    if factor is None:
      factor = latent_statistics.scaling_factor(found, self._ae.shift_factor)
      origin = "1 / RMS of these latents"
    elif self._config.scaling_factor:
      origin = "given"
    if factor is None:
      raise ValueError("all latents are zero: they have no scaling factor")
    own = {"init_from": _found_again(self._config.init_from)}
    return identity | {
      "autoencoder": identity["autoencoder"] | own,
      "scaling_factor": factor,
      "scaling_factor_origin": origin,
      "statistics": found,
      "count": sum(record["rows"] for record in records),
      "shape": list(self._shape),
      "classes": list(self._source.classes),
      "unreadable": [
        {"index": index, "key": self._source.key(index), "reason": reason}
        for index, reason in sorted(unusable.items())
      ],
      "shard_rows": shard_rows,
      "shards": [
        {"rows": record["rows"], "sha256": record["sha256"]}
        for record in records
      ],
      "versions": _versions(),
    }


class _Writer:
  """Gathers batches into shards, and writes those behind the encoder.

  Attributes:
    waited: seconds that it made the encoder wait.
  """

  def __init__(self, store: latent_store.LatentStore, shard_rows: int):
    self._store, self._shard_rows = store, shard_rows
    self._pool = futures.ThreadPoolExecutor(_UPLOADS)
    self._pending = collections.deque()
    self.waited = 0.0
    self._parts, self._labels = collections.defaultdict(list), []

  def __enter__(self) -> "_Writer":
    return self

  def __exit__(self, *_) -> None:
    self._pool.shutdown(cancel_futures=True)

  def add(self, latents: dict[str, np.ndarray], labels: list[int]) -> None:
    for view, values in latents.items():
      self._parts[view].append(values)
    self._labels += labels

  def finish_shard(self, shard: int, keys: list[str]) -> None:
    """Starts to write what was added; waits for an earlier shard, perhaps."""
    latents = {view: np.concatenate(x) for view, x in self._parts.items()}
    labels, self._labels = np.array(self._labels, np.int32), []
    self._parts.clear()
    self._pending.append(
      self._pool.submit(self._write, shard, latents, labels, keys)
    )
    start = time.monotonic()
    while len(self._pending) > _UPLOADS:
      self._pending.popleft().result()
    self.waited += time.monotonic() - start

  def wait(self) -> None:
    while self._pending:
      self._pending.popleft().result()

  def _write(self, shard, latents, labels, keys) -> None:
    values = np.concatenate(list(latents.values())).astype(np.float64)
    values = values.reshape(-1, values.shape[-1])
    if not np.isfinite(values).all():
      stored = next(iter(latents.values())).dtype
      raise FloatingPointError(
        f"latents of shard {shard} (images {keys[0]} to {keys[-1]}) are not "
        f"finite in {stored}; where the autoencoder is sound, use "
        "config.dtype=float32"
      )
    moments = {
      "mean": values.mean(axis=0).tolist(),
      "variance": values.var(axis=0).tolist(),
      "positions": len(values),
    }
    self._store.write_shard(
      shard, self._shard_rows, latents, labels, keys, {"moments": moments}
    )


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


def _versions() -> dict[str, str]:
  return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}


def _write_result(
  workdir: epath.Path,
  output: str,
  manifest: dict[str, Any],
  watch: stopwatch.Stopwatch,
) -> None:
  seconds = watch.seconds()
  share = seconds.get("encoder", 0) / seconds["total"]
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
    "%d rows in %s, %d images unreadable\ntime of this process, of which "
    "%.1f %% in the encoder:\n%s",
    manifest["count"], output, len(manifest["unreadable"]), 100 * share,
    watch.table(),
  )  # fmt: skip
