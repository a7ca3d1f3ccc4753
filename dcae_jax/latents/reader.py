"""Reading a latent store: at random, or in shuffled batches; local or `gs://`.

What comes out is what diffusion learns from: float32, normalised by the numbers
of the store's manifest.
"""

import functools
import itertools
import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from dcae_jax import errors
from dcae_jax.autoencoder import latent_statistics
from dcae_jax.data import batches
from dcae_jax.latents import layout, verification
from dcae_jax.runs import places, storage

# `(rows of the store, number of their images, random numbers from [0, 1))`
Prepare = Callable[[np.ndarray, np.ndarray, np.ndarray], Any]
_NOTHING = types.MappingProxyType({})
_UNIFORMS = 2**31 - 1  # beside the seed and a batch, where the order has epochs


class Latents:
  """A finished store as a random-access source, such as grain wants one.

  Element `i` is `{"latents": float32 [h, w, c], "labels": int32}`, with the
  conditions that the store has. With a second view, the mirrored images come
  after all others.

  Attributes:
    shape: [h, w, c] of a latent.
    conditions: the names of their arrays; "labels" is one.
    classes: names, by label; empty if the source had none.
    normalisation: of the latents that are read.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    *,
    conditions: Sequence[str] | None = None,
    cache_megabytes: float = 64,
    retries: int = storage.RETRIES,
    normalisation: str = "factor",
  ):
    """Reads the manifest.

    Args:
      path: of the store, local or `gs://`.
      conditions: the names of those that are read; None: all.
      cache_megabytes: of rows kept in memory; a store that fits is read once.
      retries: of a request to a bucket.
      normalisation: "factor", by the autoencoder's scaling and shift factor; or
        "channels", each of them to mean 0 and deviation 1 over the store.

    Raises:
      UserError: there is no finished store, or it lacks one of the conditions,
        or what the normalisation needs.
      OSError: no such bucket, no permission, no answer.
    """
    self._retries = retries
    self._place = storage.Storage(
      os.fspath(path), retries=retries, cache_megabytes=cache_megabytes
    )
    self.manifest = layout.read_manifest(self._place)
    made_with = self.manifest.get("autoencoder", {})
    if source := made_with.get("init_from"):
      made_with["init_from"] = places.found(source, self.path)
    self.shape = tuple(self.manifest["shape"])
    known = self.manifest["conditions"]
    self.conditions = tuple(known if conditions is None else conditions)
    for name in self.conditions:
      if name not in known:
        raise errors.UserError(
          f"{self.path} has no {name}, which the model is conditioned on; it "
          f"has {', '.join(known)}"
        )
    self.classes = self.manifest["classes"]
    self._dtype = layout.DTYPES[self.manifest["dtype"]]
    latent_statistics.check_normalisation(normalisation)
    create = latent_statistics.NORMALISATIONS[normalisation]
    try:
      self.normalisation = create(self.manifest)
    except errors.UserError as error:
      raise errors.UserError(
        f"{self.path} cannot be read with normalisation={normalisation!r}: "
        f"{error}; export it again, or use normalisation='factor'"
      ) from error
    self._arrays: dict[str, Any] = {}
    self._columns: dict[str, np.ndarray] = {}

  @property
  def shard_bytes(self) -> int:
    """Of the largest shard of a view, as it is kept in memory."""
    rows = max(shard["rows"] for shard in self.manifest["shards"])
    return rows * math.prod(self.shape) * self._dtype.itemsize

  @property
  def shards(self) -> int:
    """Of all views."""
    return len(self.manifest["shards"]) * len(self.manifest["views"])

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_arrays": {}}  # a worker opens its own

  @property
  def path(self) -> str:
    return self._place.path

  @property
  def shapes(self) -> list[tuple[int, int, int]]:
    """Those of the latents in batches: one."""
    return [self.shape]

  def batches(self, **options: Any) -> "LatentBatches":
    """With the options of `LatentBatches`."""
    return LatentBatches(self, **options)

  def __len__(self) -> int:
    return self.manifest["count"] * len(self.manifest["views"])

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if not 0 <= index < len(self):
      raise IndexError(f"row {index} of {len(self)}")
    return {name: part[0] for name, part in self.read([index]).items()}

  def read(self, rows: Any) -> dict[str, np.ndarray]:
    """Rows [n], in any order: `{"latents": [n, ...], "labels": [n], ...}`."""
    rows = np.asarray(rows, np.int64)
    latents = self.read_unscaled(rows)
    images = rows % self.manifest["count"]
    return {"latents": self.normalisation.apply(latents)} | {
      name: self.condition(name)[images] for name in self.conditions
    }

  def read_unscaled(self, rows: Any) -> np.ndarray:
    """Latents as the autoencoder decodes them, float32 [n, h, w, c]."""
    rows = np.asarray(rows, np.int64)
    if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
      raise IndexError(f"rows from {rows.min()} to {rows.max()} of {len(self)}")
    views, positions = np.divmod(rows, self.manifest["count"])
    latents = np.empty((len(rows), *self.shape), np.float32)
    with self._place.errors():
      parts = []
      for view in np.unique(views):
        chosen = np.flatnonzero(views == view)
        array = self._open(self.manifest["views"][view])
        parts.append((chosen, array[positions[chosen]].read()))
      for chosen, part in parts:
        latents[chosen] = part.result().view(self._dtype)
    return latents

  def condition(self, name: str) -> np.ndarray:
    """An array of `conditions`, a row for each image [count, ...].

    Raises UserError unless it is that of the manifest.
    """
    if name not in self._columns:
      if layout.is_of_strings(self._place, name):
        dtype = np.dtypes.StringDType()
        self._columns[name] = np.array(self._strings(name), dtype)
      else:
        with self._place.errors():
          column = self._open(name).read().result()
        start = 0
        for shard, record in enumerate(self.manifest["shards"]):
          stop = start + record["rows"]
          self._check_shard(name, shard, column[start:stop])
          start = stop
        self._columns[name] = column
    return self._columns[name]

  def _check_shard(
    self, name: str, shard: int, part: np.ndarray | bytes
  ) -> None:
    checksum = self.manifest["shards"][shard]["sha256"].get(name)
    if checksum != layout.sha256(part):
      raise errors.UserError(
        f"{self.path} is damaged: shard {shard} of {name} does not have the "
        "checksum of the manifest"
      )

  def keys(self) -> list[str]:
    """File names or ids of all images."""
    return self._strings("keys")

  def _strings(self, name: str) -> list[str]:
    shards = self.manifest["shards"]
    keys = [f"{name}/c/{i}" for i in range(len(shards))]
    texts = []
    for shard, data in enumerate(self._place.read_all(keys)):
      self._check_shard(name, shard, data)
      texts += layout.decode_strings(data)[: shards[shard]["rows"]]
    return texts

  def check(self) -> None:
    """Raises UserError unless the arrays are those of the manifest."""
    verification.check_arrays(self._place, self.manifest)

  def verify(
    self, on_rows: Callable[[int], None] = lambda count: None
  ) -> list[str]:
    """Reads all of it; returns what is wrong, see `verification.verify`."""
    place = storage.Storage(self.path, retries=self._retries)  # without cache
    return verification.verify(place, self.manifest, on_rows)

  def _open(self, name: str) -> Any:
    if name not in self._arrays:
      self._arrays[name] = self._place.open_array(name)
    return self._arrays[name]


class LatentBatches(batches.Batches):
  """An endless, shuffled, checkpointable iterator over batches of this process.

  Yields `{"latents": float32 [b, h, w, c], "labels": int32 [b]}`. Each epoch
  has another order, and every row at most once.
  """

  def __init__(
    self,
    latents: Latents,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int = 4,
    shuffle_shards: int = 0,
    shuffle_streams: int = 1,
    prepare: Mapping[str, Prepare] = _NOTHING,
  ):
    """Describes the iterator; nothing is read before the first batch.

    Args:
      latents: the store.
      batch_size: of this process.
      seed: of the order.
      process_index: of this process.
      process_count: processes that share the rows.
      workers: loader processes; 0 reads in threads of this one.
      threads: batches that each process reads at once.
      shuffle_shards: 0 shuffles all rows with each other. Else that many shards
        at a time, in random order: each is then read once an epoch, if the
        store's cache holds as many.
      shuffle_streams: equal parts of the batch of all processes, each of shards
        of its own and shuffled for itself. Where each process has one, or
        several, it reads other shards than the rest; with 1, all read all.
      prepare: of conditions by name, what they are made of in a batch; the
        others are as the store has them.

    Raises:
      UserError: a number that cannot be, or a store with fewer rows than a
        batch of all processes.
    """
    for name, value, least in (
      ("batch_size", batch_size, 1), ("seed", seed, 0), ("threads", threads, 1),
      ("workers", workers, 0), ("shuffle_shards", shuffle_shards, 0),
      ("shuffle_streams", shuffle_streams, 1),
    ):  # fmt: skip
      if value < least:
        raise errors.UserError(f"{name}={value} is below {least}")
    if not 0 <= process_index < process_count:
      raise errors.UserError(f"process {process_index} of {process_count}")
    order = _Order(
      latents, batch_size * process_count, seed, shuffle_shards, shuffle_streams
    )
    part = slice(process_index * batch_size, (process_index + 1) * batch_size)
    read = functools.partial(_read, latents, order, part, dict(prepare))
    dataset = grain.MapDataset.range(_Order.batches).map(read)
    super().__init__(
      dataset,
      workers=workers,
      threads=threads,
      fingerprint=layout.fingerprint(latents.manifest),
    )


def _read(
  latents: Latents,
  order: "_Order",
  part: slice,
  prepare: dict[str, Prepare],
  batch: int,
) -> dict[str, Any]:
  """A process's part of a batch."""
  rows = order.rows(batch)[part]
  arrays = latents.read(rows)
  images = rows % latents.manifest["count"]
  for name, of_rows in prepare.items():
    uniforms = order.uniforms(batch)[part]
    arrays[name] = of_rows(arrays[name], images, uniforms)
  return arrays


class _Order:
  """The rows of each batch, without end."""

  batches = 2**40  # more than anybody reads

  def __init__(
    self,
    latents: Latents,
    batch_size: int,
    seed: int,
    shuffle_shards: int,
    shuffle_streams: int = 1,
  ):
    shards = latents.manifest["shards"]
    sizes = [shard["rows"] for shard in shards] * len(latents.manifest["views"])
    if batch_size % shuffle_streams:
      raise errors.UserError(
        f"shuffle_streams={shuffle_streams} does not divide {batch_size}, the "
        "batch of all processes; use a divisor, such as their number"
      )
    self._starts = [0, *itertools.accumulate(sizes)]
    self._batch_size, self._seed = batch_size, seed
    self._window = shuffle_shards or len(sizes)
    self._streams = shuffle_streams
    self._batches = len(latents) // batch_size  # of an epoch
    if not self._batches:
      raise errors.UserError(
        f"{latents.path} has {len(latents)} rows, and a batch of all processes "
        f"{batch_size}; use a smaller config.batch_size"
      )
    self._epoch = (-1, np.empty(0, np.int64))

  def rows(self, batch: int) -> np.ndarray:
    epoch, batch = divmod(batch, self._batches)
    rows = self._rows(epoch)
    return rows[batch * self._batch_size : (batch + 1) * self._batch_size]

  def uniforms(self, batch: int) -> np.ndarray:
    """A random number from [0, 1) for each row of a batch."""
    rng = np.random.default_rng((self._seed, _UNIFORMS, batch))
    return rng.random(self._batch_size)

  def _rows(self, epoch: int) -> np.ndarray:
    known, rows = self._epoch  # read at once: other threads replace it
    if known == epoch:
      return rows
    rng = np.random.default_rng((self._seed, epoch))
    shards = rng.permutation(len(self._starts) - 1)
    in_order = [
      np.arange(self._starts[shard], self._starts[shard + 1])
      for shard in shards
    ]
    # A stream has as many rows as the others, of shards that follow each other.
    ends = np.cumsum([len(rows) for rows in in_order])
    size = ends[-1] // self._streams
    cuts = {*ends[self._window - 1 :: self._window]}
    cuts |= {size * i for i in range(1, self._streams + 1)}
    windows = np.split(np.concatenate(in_order), sorted(cuts))
    rows = np.concatenate([rng.permutation(window) for window in windows])
    # Of each batch, a part from each stream.
    rows = rows[: size * self._streams].reshape(self._streams, size)
    part = self._batch_size // self._streams
    rows = rows[:, : self._batches * part]
    rows = rows.reshape(self._streams, self._batches, part)
    rows = rows.swapaxes(0, 1).reshape(-1)
    self._epoch = (epoch, rows)
    return rows
