"""Reconstruction quality over a set of images (DC-AE, section 4.1, table 2).

Metrics are computed per image on 8-bit values, as in the paper's tables, and
averaged over images in float64 on the host; images stream through, and memory
does not grow with their number.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dcae_jax import errors
from dcae_jax.autoencoder import latent_statistics, quantisation
from dcae_jax.evaluation import metrics as metrics_table
from dcae_jax.evaluation import set_measures


class Batch(NamedTuple):
  """Images uint8 [b, h, w, c], which of them count, their indices; sharded."""

  images: jax.Array
  mask: jax.Array
  indices: jax.Array


class Outputs(NamedTuple):
  """Of one batch, row by row.

  Networks describe reconstructions, and those originals that are compared with
  them, for metrics of sets.
  """

  batch: Batch
  values: dict[str, jax.Array]  # of the metrics of pairs, [b]
  latents: jax.Array  # [b, h, w, d]
  latent_means: jax.Array  # over the positions, [b, d]
  latent_variances: jax.Array  # [b, d]
  described: dict[str, dict[str, jax.Array]]
  originals: dict[str, dict[str, jax.Array]]
  reconstructions: jax.Array  # uint8 [b, h, w, c]


class Networks(NamedTuple):
  """What is measured, and the metrics with their networks' parameters."""

  encode: Callable[[Any, Array], Array]  # (variables, images in [-1, 1])
  decode: Callable[[Any, Array], Array]  # (variables, latents)
  metrics: Mapping[str, metrics_table.Metric]
  parameters: Mapping[str, Any]  # by the networks' keys


class Picture(NamedTuple):
  """One image, uint8 [h, w, c], its latents [h, w, d] and its metrics."""

  index: int
  original: np.ndarray
  reconstruction: np.ndarray
  latents: np.ndarray
  values: dict[str, float]


class Result(NamedTuple):
  """The result of a measurement of `count` images."""

  count: int
  metrics: dict[str, float]  # the numbers by column, and "latent_rms"
  latents: dict[str, Any]  # of `latent_statistics`
  absent: dict[str, str]  # why a metric could not be computed, by its key
  histograms: dict[str, list[int]]  # images in each bin, by metric of pairs
  samples: list[Picture]  # the first images
  worst: list[Picture]  # the lowest PSNR first
  best: list[Picture]  # the highest PSNR first

  @property
  def rows(self) -> tuple[np.ndarray, np.ndarray]:
    """The samples' originals and reconstructions, uint8 [n, h, w, c]."""
    return (
      np.stack([picture.original for picture in self.samples]),
      np.stack([picture.reconstruction for picture in self.samples]),
    )


class Measurement:
  """Measures reconstructions of batches of images."""

  def __init__(
    self,
    networks: Networks,
    whole: jax.sharding.Sharding,
    *,
    samples: int,
    extremes: int = 0,
  ):
    """Compiles nothing yet.

    Args:
      networks: what it calls.
      whole: for all but pictures and latents: on every device.
      samples: first images to return as pictures.
      extremes: worst and best images to return as pictures.
    """
    self._networks = networks
    self._parameters = jax.device_put(dict(networks.parameters), whole)
    self._samples, self._extremes = samples, extremes
    self._measure_batch = jax.jit(
      self._outputs,
      static_argnums=0,
      out_shardings=Outputs(
        Batch(None, whole, whole), whole, None, whole, whole, whole, whole, None
      ),
    )

  def measure(
    self,
    variables: Any,
    batches: Iterable[Batch],
    references: Mapping[str, Any] | None = None,
    on_batch: Callable[[list[dict[str, float]]], None] | None = None,
  ) -> Result:
    """Averages over batches.

    Args:
      variables: of the autoencoder.
      batches: images in any order; those count whose mask is True.
      references: `fid.Statistics` by the network's key; metrics through other
        networks compare with the originals.
      on_batch: called with the metrics of each image, and its "index".

    Raises:
      UserError: no image could be used.
      FloatingPointError: a reconstruction or latents are not finite.
    """
    metrics, references = self._networks.metrics, references or {}
    of_originals = set_measures.compared_with_originals(metrics, references)
    sets = set_measures.SetMeasures(metrics, references)
    totals = _Totals(metrics, sets, self._samples, self._extremes)
    dispatched = (
      self._measure_batch(
        tuple(of_originals), variables, self._parameters, batch
      )
      for batch in batches
    )
    for outputs in _one_behind(dispatched):
      rows = totals.update(outputs)
      if on_batch is not None:
        on_batch(rows)
    return totals.compute()

  def _outputs(
    self,
    of_originals: tuple[str, ...],
    variables: Any,
    parameters: Mapping[str, Any],
    batch: Batch,
  ) -> Outputs:
    """Traced; `of_originals` are the metrics that compare with originals."""
    metrics = self._networks.metrics
    images = batch.images.astype(jnp.float32)
    z = self._networks.encode(variables, quantisation.to_float(images))
    y = quantisation.quantise(self._networks.decode(variables, z))
    values = {}
    for key, metric in metrics.items():
      if metric.of_pairs:
        weights = metric.network and parameters[metric.network.key]
        values[key] = metric.of_pairs.compute(weights, y, images)
    return Outputs(
      batch,
      values,
      z,
      *_moments(z),
      set_measures.describe(metrics, parameters, y),
      set_measures.describe(
        {key: metrics[key] for key in of_originals}, parameters, images
      ),
      y.astype(jnp.uint8),
    )


def _moments(z: Float[Array, "b h w c"]) -> tuple[Array, Array]:
  mean = jnp.mean(z, axis=(1, 2), keepdims=True)
  return mean[:, 0, 0], jnp.mean(jnp.square(z - mean), axis=(1, 2))


def _one_behind(outputs: Iterator[Outputs]) -> Iterator[Outputs]:
  """So that devices have the next batch while the host reads this one."""
  previous = next(outputs, None)
  while previous is not None:
    following = next(outputs, None)
    yield previous
    previous = following


class _Selection:
  """The pictures with the highest keys; others are never copied to the host."""

  def __init__(self, size: int):
    self._size, self._heap = size, []

  def offer(self, key: float, index: int, picture: Callable[[], Picture]):
    entry = (key, -index)  # of equal ones the first
    if len(self._heap) < self._size:
      heapq.heappush(self._heap, (*entry, picture()))
    elif self._size and entry > self._heap[0][:2]:
      heapq.heapreplace(self._heap, (*entry, picture()))

  def pictures(self) -> list[Picture]:
    return [x[2] for x in sorted(self._heap, key=lambda x: x[:2], reverse=True)]


class _Totals:
  """Everything that is kept from batch to batch."""

  def __init__(
    self,
    metrics: Mapping[str, metrics_table.Metric],
    sets: set_measures.SetMeasures,
    samples: int,
    extremes: int,
  ):
    self._edges = {
      key: metric.of_pairs.edges
      for key, metric in metrics.items()
      if metric.of_pairs
    }
    self._sets = sets
    self._sums = dict.fromkeys(self._edges, 0.0)
    self._histograms = dict.fromkeys(self._edges, 0)
    self._latents = self._fetch = None
    self._first = _Selection(samples)
    self._worst, self._best = _Selection(extremes), _Selection(extremes)

  def update(self, outputs: Outputs) -> list[dict[str, float]]:
    """Adds a batch; returns the metrics of each of its images."""
    small = jax.device_get(
      outputs._replace(
        batch=outputs.batch._replace(images=()),
        latents=(),
        reconstructions=(),
      )
    )
    good = np.flatnonzero(small.batch.mask)
    # With several processes a batch is one's images, then the other's.
    good = good[np.argsort(small.batch.indices[good])]
    indices = small.batch.indices[good]
    values = {name: v[good].astype(float) for name, v in small.values.items()}
    means, variances = small.latent_means[good], small.latent_variances[good]
    _check_finite(indices, (means, variances, *values.values()))
    for name, v in values.items():
      edges = self._edges[name]
      bins = np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0]
      self._sums[name] += v.sum()
      self._histograms[name] = self._histograms[name] + bins
    if self._latents is None:
      whole = outputs.batch.mask.sharding
      self._fetch = jax.jit(lambda x, i: x[i], out_shardings=whole)
      channels = means.shape[1]
      self._latents = latent_statistics.LatentStatistics(channels)
    positions = math.prod(outputs.latents.shape[1:3])
    self._latents.update(means, variances, positions)
    described, originals = jax.tree.map(
      lambda rows: rows[good], (small.described, small.originals)
    )
    self._sets.update(len(good), described, originals)
    rows = [
      {"index": int(index)} | {name: float(v[i]) for name, v in values.items()}
      for i, index in enumerate(indices)
    ]
    for row, values_of_row in zip(good, rows, strict=True):
      self._offer(outputs, int(row), values_of_row)
    return rows

  def _offer(self, outputs: Outputs, row: int, values: dict[str, float]):
    index = values["index"]
    shown = outputs.batch.images, outputs.reconstructions, outputs.latents

    def picture():
      # Every process chooses the same rows, and takes part in fetching them.
      return Picture(
        index,
        *(jax.device_get(self._fetch(x, row)) for x in shown),
        {name: v for name, v in values.items() if name != "index"},
      )

    self._first.offer(-index, index, picture)
    self._worst.offer(-values["psnr"], index, picture)
    self._best.offer(values["psnr"], index, picture)

  def compute(self) -> Result:
    count = self._sets.count
    if not count:
      raise errors.UserError("no image of the evaluation source could be used")
    latents = self._latents.compute()
    of_sets, absent = self._sets.compute()
    means = {name: total / count for name, total in self._sums.items()}
    return Result(
      count,
      means | {"latent_rms": latents["rms"]} | of_sets,
      latents,
      absent,
      {name: bins.tolist() for name, bins in self._histograms.items()},
      self._first.pictures(),
      self._worst.pictures(),
      self._best.pictures(),
    )


def _check_finite(indices: np.ndarray, arrays: Iterable[np.ndarray]) -> None:
  """Raises FloatingPointError for the first image of which an array is not."""
  for index, *rows in zip(indices, *arrays, strict=True):
    if not all(np.isfinite(row).all() for row in rows):
      raise FloatingPointError(
        f"latents or reconstruction of image {index} are not finite"
      )
