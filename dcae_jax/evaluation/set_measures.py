"""Metrics of sets of images: of samples, or of reconstructions.

A set is compared with reference statistics, or else with the originals. Images
stream through; what is kept of them depends on the metric.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from dcae_jax.autoencoder import streaming_moments
from dcae_jax.evaluation import metrics as metrics_table
from dcae_jax.evaluation.networks import pretrained

Metrics = Mapping[str, metrics_table.Metric]
Described = Mapping[str, Mapping[str, Any]]  # by network and output


def compared_with_originals(
  metrics: Metrics, references: Iterable[str] = ()
) -> dict[str, metrics_table.Metric]:
  """The metrics of sets without reference statistics of their network."""
  return {
    key: metric
    for key, metric in metrics.items()
    if metric.of_sets
    and metric.of_sets.is_compared
    and metric.network.key not in references
  }


def outputs(metrics: Metrics) -> dict[metrics_table.Network, list[str]]:
  """The outputs of networks that metrics of sets take."""
  by_network = {}
  for metric in metrics.values():
    if metric.of_sets:
      of_network = by_network.setdefault(metric.network, set())
      of_network.update(metric.of_sets.rows)
      of_network.update(["features"] * metric.of_sets.moments)
  return {network: sorted(names) for network, names in by_network.items()}


def describe(
  metrics: Metrics, parameters: Mapping[str, Any], images: Array
) -> dict[str, dict[str, Array]]:
  """What metrics of sets see of images [b, h, w, c], values from 0 to 255."""
  described = {}
  for network, names in outputs(metrics).items():
    arrays = network.describe(parameters[network.key], images)
    described[network.key] = {name: arrays[name] for name in names}
  return described


def describe_prompts(
  metrics: Metrics,
  weights: Mapping[str, pretrained.Pretrained],
  prompts: Sequence[str] | np.ndarray,
) -> dict[str, dict[str, np.ndarray]]:
  """What metrics of sets see of texts that images were drawn for, by network.

  Weights are by the network's key. There is nothing in it for networks whose
  metrics need no texts.
  """
  networks = {
    metric.network
    for metric in metrics.values()
    if metric.of_sets and metric.of_sets.prompts
  }
  return {
    network.key: {
      "prompts": network.describe_prompts(weights[network.key], prompts)
    }
    for network in networks
  }


class _Images:
  """What metrics need to know of a set of images, through one network."""

  def __init__(self, of_sets: Sequence[metrics_table.OfSets]):
    self._moments = None
    self._needs_moments = any(metric.moments for metric in of_sets)
    self._rows = {name: [] for metric in of_sets for name in metric.rows}
    if any(metric.prompts for metric in of_sets):
      self._rows["prompts"] = []

  def update(self, arrays: Mapping[str, np.ndarray]) -> None:
    for name, rows in self._rows.items():
      rows.append(arrays[name])
    if self._needs_moments:
      features = arrays["features"]
      self._moments = self._moments or streaming_moments.Moments(
        features.shape[1]
      )
      self._moments.update(features)

  def __getattr__(self, name: str) -> np.ndarray:
    if name in ("mean", "covariance"):
      return getattr(self._moments, name)
    return np.concatenate(self._rows[name])


class SetMeasures:
  """Metrics of sets of images that come in batches: of samples, or of
  reconstructions with their originals.
  """

  def __init__(self, metrics: Metrics, references: Mapping[str, Any]):
    """Starts empty; references are `fid.Statistics` by the network's key."""
    self.count = 0
    self._metrics = {k: m for k, m in metrics.items() if m.of_sets}
    self._images = _by_network(self._metrics)
    self._originals = _by_network(compared_with_originals(metrics, references))
    self._references = {**references, **self._originals}

  def update(
    self,
    count: int,
    images: Described,
    originals: Described | None = None,
    prompts: Described | None = None,
  ) -> None:
    """Adds so many images, as `describe` returned them.

    With a row for each image in `prompts`, as `describe_prompts` returned them,
    if a metric needs that.
    """
    self.count += count
    for key, seen in self._images.items():
      seen.update({**images[key], **(prompts or {}).get(key, {})})
    for key, seen in self._originals.items():
      seen.update(originals[key])

  def compute(self) -> tuple[dict[str, float], dict[str, str]]:
    """The numbers by column, and why others are absent by metric."""
    numbers, absent = {}, {}
    for key, metric in self._metrics.items():
      if self.count < metric.of_sets.least:
        absent[key] = (
          f"{metric.label} needs at least {metric.of_sets.least} images, not "
          f"{self.count}"
        )
        continue
      network = metric.network.key
      values = metric.of_sets.compute(
        self._images[network], self._references.get(network)
      )
      if all(math.isfinite(value) for value in values):
        numbers |= dict(zip(metric.columns, map(float, values), strict=True))
      else:
        absent[key] = f"{metric.label} is beyond all numbers"
    return numbers, absent


def _by_network(metrics: Metrics) -> dict[str, _Images]:
  by_network = {}
  for metric in metrics.values():
    by_network.setdefault(metric.network.key, []).append(metric.of_sets)
  return {key: _Images(of_sets) for key, of_sets in by_network.items()}
