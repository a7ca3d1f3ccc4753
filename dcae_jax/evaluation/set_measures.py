"""Metrics of sets of images: of samples, or of reconstructions.

A set is compared with reference statistics, or with the originals where there
are none. Images stream through: what is kept of them is each metric's matter.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from dcae_jax.evaluation import metrics as metrics_table


def compared_with_originals(
  metrics: Mapping[str, metrics_table.Metric], references: Iterable[str]
) -> dict[str, metrics_table.Metric]:
  """The metrics of sets that no reference statistics are there for.

  Args:
    metrics: any.
    references: keys of the networks that there are statistics of.
  """
  return {
    key: metric
    for key, metric in metrics.items()
    if metric.of_sets is not None
    and metric.of_sets.reference
    and metric.network.key not in references
  }


def outputs(
  metrics: Mapping[str, metrics_table.Metric],
) -> dict[metrics_table.Network, list[str]]:
  """The outputs of networks that metrics of sets take."""
  found = {}
  for metric in metrics.values():
    if metric.of_sets is not None:
      found.setdefault(metric.network, []).extend(metric.of_sets.outputs)
  return {network: sorted(set(names)) for network, names in found.items()}


def describe(
  metrics: Mapping[str, metrics_table.Metric],
  parameters: Mapping[str, Any],
  images: Array,
) -> dict[str, dict[str, Array]]:
  """What metrics of sets see of images with values from 0 to 255, by network.

  Args:
    metrics: any; those of pairs see nothing here.
    parameters: by the network's key.
    images: [b, h, w, c].
  """
  described = {}
  for network, names in outputs(metrics).items():
    arrays = network.describe(parameters[network.key], images)
    described[network.key] = {name: arrays[name] for name in names}
  return described


class SetMeasures:
  """Metrics of sets of images that come in batches: of samples, or of
  reconstructions with their originals.
  """

  def __init__(
    self,
    metrics: Mapping[str, metrics_table.Metric],
    references: Mapping[str, Any],
  ):
    """Starts empty.

    Args:
      metrics: those of pairs are left aside.
      references: `fid.Statistics` by the network's key; without, metrics
        compare with the originals.
    """
    self.count = 0
    self._metrics = {k: m for k, m in metrics.items() if m.of_sets is not None}
    self._references = references
    self._measures, self._originals = (
      {key: metric.of_sets.create() for key, metric in chosen.items()}
      for chosen in (
        self._metrics,
        compared_with_originals(metrics, references),
      )
    )

  def update(
    self,
    images: int,
    described: Mapping[str, Mapping[str, np.ndarray]],
    originals: Mapping[str, Mapping[str, np.ndarray]] | None = None,
  ) -> None:
    """Adds so many images, of which `describe` returned these arrays."""
    self.count += images
    for measures, outputs in (
      (self._measures, described), (self._originals, originals)
    ):  # fmt: skip
      for key, measure in measures.items():
        measure.update(outputs[self._metrics[key].network.key])

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
      reference = self._originals.get(
        key, self._references.get(metric.network.key)
      )
      values = self._measures[key].compute(reference)
      if all(math.isfinite(value) for value in values):
        numbers |= dict(zip(metric.columns, values, strict=True))
      else:
        absent[key] = f"{metric.label} is beyond all numbers"
    return numbers, absent
