"""The work of an export: rows to latents on the devices, shards to the store.

Rows are loaded ahead of the devices, shards written behind them; the stopwatch
gets to know who waited for whom.
"""

import collections
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcae_jax.autoencoder import autoencoder, latent_statistics, quantisation
from dcae_jax.latents import layout as store_layout
from dcae_jax.latents import rows
from dcae_jax.latents import store as latent_store
from dcae_jax.runs import compiling, stopwatch
from dcae_jax.training import hardware, program_cost, sharding

Encode = Callable[[np.ndarray], dict[str, Any]]  # rows to latents, by view

_ADVICE = "lower config.batch_size_per_device or config.resolution"
_IN_FLIGHT = 2  # batches on the devices
_UPLOADS = 2  # shards that are written at once
_MOMENT_ROWS = 64  # rows in float64 at once


def encoder_variables(variables: Any) -> Any:
  """The part that encodes: the decoder may change, and latents stay valid."""
  return {
    collection: {"encoder": tree["encoder"]}
    for collection, tree in variables.items()
    if "encoder" in tree
  }


def check_memory(
  ae: autoencoder.Autoencoder,
  views: tuple[str, ...],
  dtype: np.dtype,
  size: tuple[int, int],
  rows: int,
) -> None:
  """Raises UserError if a device surely cannot encode so many rows at once.

  They are images of a size, height and width.
  """
  area = size[0] * size[1]
  values = area // ae.spatial_compression**2 * ae.latent_channels
  values *= len(views)
  needed = rows * (area * ae.image_channels + values * dtype.itemsize)
  hardware.check_memory(
    {f"{rows} images of {size[0]}x{size[1]} px and their latents": needed},
    jax.local_devices(),
    _ADVICE,
  )


def compiled(
  ae: autoencoder.Autoencoder,
  views: tuple[str, ...],
  dtype: np.dtype,
  size: tuple[int, int],
  group_size: int,
) -> Encode:
  """A program that encodes `group_size` images of a size on each local device.

  The second of the views, if it is asked for, is of the mirrored images.
  """
  devices = jax.local_devices()
  mesh = sharding.create_mesh(-1, 1, 1, devices)
  whole, by_row = sharding.replicated(mesh), sharding.by_rows(mesh)
  variables = jax.device_get(encoder_variables(ae.variables))
  variables = jax.device_put(variables, whole)

  def encode(variables, pixels):
    x = quantisation.to_float(pixels)
    images = {views[0]: x}
    if len(views) > 1:
      images[views[1]] = x[:, :, ::-1]
    return {
      view: ae.apply(variables, x, method="encode").astype(dtype)
      for view, x in images.items()
    }

  shape = (len(devices) * group_size, *size, ae.image_channels)
  pixels = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=by_row)
  encode = jax.jit(encode, out_shardings=by_row)
  with compiling.announced("the encoder", (variables, pixels), devices):
    program = encode.lower(variables, pixels).compile()
  hardware.check_memory(
    {f"encoding {group_size} images at once": program_cost.memory(program)},
    devices,
    _ADVICE,
  )
  return lambda pixels: program(variables, jax.device_put(pixels, by_row))


def converted(view: str, dtype: np.dtype) -> Encode:
  """For rows that are latents already."""

  def encode(values):
    with np.errstate(over="ignore"):  # the writer refuses what is not finite
      return {view: values.astype(dtype)}

  return encode


def encoded(
  loaded: Iterator[rows.Batch],
  encode: Encode,
  writer: "ShardWriter",
  watch: stopwatch.Stopwatch,
) -> Iterator[tuple[rows.Batch, dict[str, np.ndarray]]]:
  """Batches with their latents; the devices have the next one already.

  The encoder's time is that in which at least one batch was on the devices;
  when there was none, rows were missing, or the writer was too slow.
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
        watch.add("encoder", ready - max(sent, last))
        watch.add("waiting for images", idle - min(idle, store))
        watch.add("waiting for the store", min(idle, store))
        last = ready
        yield done, latents


class ShardWriter:
  """Gathers rows into shards, and writes those behind the encoder."""

  def __init__(
    self, store: latent_store.LatentStore, layout: store_layout.Layout
  ):
    self.waited = 0.0  # seconds that the encoder had to
    self._store, self._layout = store, layout
    self._pool = futures.ThreadPoolExecutor(_UPLOADS)
    self._pending = collections.deque()
    self._parts, self._keys = collections.defaultdict(list), []

  def __enter__(self) -> "ShardWriter":
    return self

  def __exit__(self, *_) -> None:
    self._pool.shutdown(cancel_futures=True)

  def add(self, arrays: Mapping[str, Any], keys: list[str]) -> None:
    """Rows of the shard that is gathered: latents by view, conditions; keys."""
    self._keys += keys
    for name, values in arrays.items():
      self._parts[name].append(np.asarray(values))
    while self._pending and self._pending[0].done():
      self._pending.popleft().result()  # fails at once, if it failed

  def finish_shard(self, shard: int, unusable: Mapping[int, str]) -> None:
    """Starts to write what was added; waits for an earlier shard, perhaps.

    `unusable` are the images that left no rows in it, with the reason.
    """
    if self._keys:
      arrays = {name: np.concatenate(x) for name, x in self._parts.items()}
      work = self._write, shard, arrays, self._keys, unusable
    else:
      work = self._store.write_empty, shard, unusable
    self._parts.clear()
    self._keys = []
    self._pending.append(self._pool.submit(*work))
    start = time.monotonic()
    while len(self._pending) > _UPLOADS:
      self._pending.popleft().result()
    self.waited += time.monotonic() - start

  def wait(self) -> None:
    while self._pending:
      self._pending.popleft().result()

  def _write(self, shard, arrays, keys, unusable) -> None:
    views = [arrays[view] for view in self._layout.views]
    moments = _moments(views)
    if not np.isfinite([moments["mean"], moments["variance"]]).all():
      raise FloatingPointError(
        f"latents of shard {shard} (images {keys[0]} to {keys[-1]}) are not "
        f"finite in {views[0].dtype}; use config.dtype=float32 and another "
        "config.output, or another autoencoder"
      )
    record = {"moments": moments}
    if unusable:
      record["unusable"] = {str(i): reason for i, reason in unusable.items()}
    self._store.write_shard(self._layout, shard, arrays, keys, record)


def _moments(views: list[np.ndarray]) -> dict[str, Any]:
  """Of each channel, in float64, without holding all rows so."""
  statistics = latent_statistics.LatentStatistics(views[0].shape[-1])
  for values in views:
    for i in range(0, len(values), _MOMENT_ROWS):
      with np.errstate(invalid="ignore"):  # infinite ones are found after
        statistics.add(values[i : i + _MOMENT_ROWS])
  return statistics.moments()


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
  """Statistics of all latents, from the moments of their shards."""
  channels = len(records[0]["moments"]["mean"])
  statistics = latent_statistics.LatentStatistics(channels)
  for record in records:
    statistics.merge(record["moments"])
  return statistics.compute()
