"""Reconstruction quality over a set of images (DC-AE, section 4.1, table 2).

Sees functions and batches only. Metrics are computed per image on 8-bit values,
as in the paper's tables, and averaged over images in float64 on the host;
images stream through, and memory does not grow with their number.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dcae_jax.autoencoder import (
  latent_statistics,
  quantisation,
  streaming_moments,
)
from dcae_jax.evaluation import fid, image_metrics

# Edges of histograms, per metric; what lies beyond counts in the last bin.
HISTOGRAM_EDGES = {
  "psnr": np.linspace(0, 60, 121),
  "ssim": np.linspace(0, 1, 101),
  "lpips": np.linspace(0, 1, 101),
}


class Batch(NamedTuple):
  """Images uint8 [b, h, w, c], which of them count, their indices; sharded."""

  images: jax.Array
  mask: jax.Array
  indices: jax.Array


class Outputs(NamedTuple):
  """Of one batch, row by row; `features` of reconstructions and originals."""

  batch: Batch
  values: dict[str, jax.Array]
  latents: jax.Array
  latent_means: jax.Array
  latent_variances: jax.Array
  features: dict[str, jax.Array]
  original_features: dict[str, jax.Array]
  reconstructions: jax.Array


class Networks(NamedTuple):
  """The functions that a measurement calls, and the weights of two of them.

  Attributes:
    encode: `(variables, images in [-1, 1]) -> latents`.
    decode: `(variables, latents) -> reconstructions`.
    lpips: `(parameters, images, others in [-1, 1]) -> [b]`, or None.
    features: by name, `(parameters, values 0 to 255) -> [b, d]`.
    parameters: of `lpips` and `features`, by name.
  """

  encode: Callable[[Any, Array], Array]
  decode: Callable[[Any, Array], Array]
  lpips: Callable[[Any, Array, Array], Array] | None = None
  features: Mapping[str, Callable[[Any, Array], Array]] = {}
  parameters: Mapping[str, Any] = {}


class Picture(NamedTuple):
  """One image, uint8 [h, w, c], its latents [h, w, d] and its metrics."""

  index: int
  original: np.ndarray
  reconstruction: np.ndarray
  latents: np.ndarray
  values: dict[str, float]


class Result(NamedTuple):
  """What `measure` found.

  Attributes:
    count: images that it is about.
    metrics: means over the images; distances between sets under their names.
    latents: of `latent_statistics`.
    absent: why a distance could not be computed, by its name.
    histograms: images in each bin of `HISTOGRAM_EDGES`.
    samples: the first images.
    worst: of the lowest PSNR, the lowest first.
    best: of the highest, the highest first.
  """

  count: int
  metrics: dict[str, float]
  latents: dict[str, Any]
  absent: dict[str, str]
  histograms: dict[str, list[int]]
  samples: list[Picture]
  worst: list[Picture]
  best: list[Picture]

  @property
  def rows(self) -> tuple[np.ndarray, np.ndarray]:
    """The samples' originals and reconstructions, uint8 [n, h, w, c]."""
    return (
      np.stack([picture.original for picture in self.samples]),
      np.stack([picture.reconstruction for picture in self.samples]),
    )


def create(
  networks: Networks,
  sharding: jax.sharding.Sharding,
  features_of_originals: Iterable[str] = (),
) -> Callable[[Any, Any, Batch], Outputs]:
  """The jitted measurement of one batch, for `measure`.

  Args:
    networks: what it calls.
    sharding: of numbers and features: whole on every device. Pictures and
      latents stay where they are computed.
    features_of_originals: names of features that originals are compared by.
  """
  of_originals = frozenset(features_of_originals)

  def moments(z: Float[Array, "b h w c"]) -> tuple[Array, Array]:
    mean = jnp.mean(z, axis=(1, 2), keepdims=True)
    return mean[:, 0, 0], jnp.mean(jnp.square(z - mean), axis=(1, 2))

  def measure_batch(variables, parameters, batch):
    images = batch.images.astype(jnp.float32)
    z = networks.encode(variables, images / 127.5 - 1.0)
    found = quantisation.quantise(networks.decode(variables, z))
    values = {
      "psnr": image_metrics.psnr(found, images),
      "ssim": image_metrics.ssim(found, images),
    }
    if networks.lpips is not None:
      values["lpips"] = networks.lpips(
        parameters["lpips"], found / 127.5 - 1.0, images / 127.5 - 1.0
      )
    features = {
      name: apply(parameters[name], found)
      for name, apply in networks.features.items()
    }
    original_features = {
      name: apply(parameters[name], images)
      for name, apply in networks.features.items()
      if name in of_originals
    }
    return Outputs(
      batch, values, z, *moments(z), features, original_features,
      found.astype(jnp.uint8),
    )  # fmt: skip

  shardings = Outputs(
    Batch(None, sharding, sharding), sharding, None, sharding, sharding,
    sharding, sharding, None,
  )  # fmt: skip
  return jax.jit(measure_batch, out_shardings=shardings)


def measure(
  measure_batch: Callable[[Any, Any, Batch], Outputs],
  variables: Any,
  parameters: Mapping[str, Any],
  batches: Iterable[Batch],
  *,
  samples: int,
  extremes: int = 0,
  references: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
  on_batch: Callable[[list[dict[str, float]]], None] | None = None,
) -> Result:
  """Averages over batches.

  Args:
    measure_batch: from `create`.
    variables: of the autoencoder.
    parameters: of the networks, by name.
    batches: images in any order, each counted where its mask is True.
    samples: first images to return as pictures.
    extremes: worst and best images to return as pictures.
    references: mean and covariance that features are compared with, by name;
      features without one are compared with those of the originals.
    on_batch: called with the metrics of each image, and its "index".

  Raises:
    ValueError: no image could be used.
    FloatingPointError: a reconstruction or latents are not finite.
  """
  totals = _Totals(samples, extremes, references or {})
  dispatched = (
    measure_batch(variables, parameters, batch) for batch in batches
  )
  for outputs in _one_behind(dispatched):
    rows = totals.update(outputs)
    if on_batch is not None:
      on_batch(rows)
  return totals.compute()


def _one_behind(outputs: Iterator[Outputs]) -> Iterator[Outputs]:
  """So that devices have the next batch while the host reads this one."""
  previous = None
  for found in outputs:
    if previous is not None:
      yield previous
    previous = found
  if previous is not None:
    yield previous


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

  def __init__(self, samples, extremes, references):
    self._references = references
    self._count = 0
    self._sums, self._histograms = {}, {}
    self._latents = self._fetch = None
    self._moments, self._original_moments = {}, {}
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
    finite = np.isfinite(means).all(1) & np.isfinite(variances).all(1)
    for v in values.values():
      finite &= np.isfinite(v)
    if not finite.all():
      raise FloatingPointError(
        f"latents or reconstruction of image {indices[~finite][0]} are not "
        "finite"
      )
    self._count += len(good)
    for name, v in values.items():
      self._sums[name] = self._sums.get(name, 0.0) + v.sum()
      edges = HISTOGRAM_EDGES[name]
      bins = np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0]
      self._histograms[name] = self._histograms.get(name, 0) + bins
    if self._latents is None:
      whole = outputs.batch.mask.sharding
      self._fetch = jax.jit(lambda x, i: x[i], out_shardings=whole)
      channels = means.shape[1]
      self._latents = latent_statistics.LatentStatistics(channels)
    positions = math.prod(outputs.latents.shape[1:3])
    self._latents.update(means, variances, positions)
    for moments, features in (
      (self._moments, small.features),
      (self._original_moments, small.original_features),
    ):
      for name, rows in features.items():
        moments.setdefault(
          name, streaming_moments.Moments(rows.shape[1])
        ).update(rows[good])
    rows = [
      {"index": int(index)} | {name: float(v[i]) for name, v in values.items()}
      for i, index in enumerate(indices)
    ]
    for row, values_of_row in zip(good, rows, strict=True):
      self._offer(outputs, int(row), values_of_row)
    return rows

  def _offer(self, outputs: Outputs, row: int, values: dict[str, float]):
    index = int(values["index"])

    def picture():
      # Every process chooses the same rows, and takes part in fetching them.
      pictures = (
        outputs.batch.images, outputs.reconstructions, outputs.latents
      )  # fmt: skip
      return Picture(
        index,
        *(jax.device_get(self._fetch(x, row)) for x in pictures),
        {name: v for name, v in values.items() if name != "index"},
      )

    self._first.offer(-index, index, picture)
    self._worst.offer(-values["psnr"], index, picture)
    self._best.offer(values["psnr"], index, picture)

  def compute(self) -> Result:
    if not self._count:
      raise ValueError("no image of the evaluation source could be used")
    metrics = {name: x / self._count for name, x in self._sums.items()}
    latents, absent = self._latents.compute(), {}
    metrics["latent_rms"] = latents["rms"]
    for name, moments in self._moments.items():
      if moments.count < 2:
        absent[name] = (
          f"a Frechet distance needs at least 2 images, not {moments.count}"
        )
        continue
      reference = self._references.get(name)
      if reference is None:
        originals = self._original_moments[name]
        reference = originals.mean, originals.covariance
      distance = fid.frechet_distance(
        moments.mean, moments.covariance, *reference
      )
      if math.isfinite(distance):
        metrics[name] = distance
      else:
        absent[name] = "the distance from the reference is beyond all numbers"
    return Result(
      self._count,
      metrics,
      latents,
      absent,
      {name: bins.tolist() for name, bins in self._histograms.items()},
      self._first.pictures(),
      self._worst.pictures(),
      self._best.pictures(),
    )
