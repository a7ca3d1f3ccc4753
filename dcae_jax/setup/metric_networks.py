"""Metrics of a config, opened: their networks' weights and reference files."""

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.evaluation import fid, set_measures
from dcae_jax.evaluation import metrics as metrics_table
from dcae_jax.evaluation.networks import pretrained

_LOG = logging.getLogger(__name__)


class Opened(NamedTuple):
  """Metrics that can be computed, and why others cannot."""

  metrics: dict[str, metrics_table.Metric]
  weights: dict[str, pretrained.Pretrained]  # by the network's key
  absent: dict[str, str]  # by metric, with the command that gets its weights

  @property
  def parameters(self) -> dict[str, dict[str, np.ndarray]]:
    """By the network's key."""
    return {key: x.parameters for key, x in self.weights.items()}

  @property
  def used_weights(self) -> dict[str, dict[str, str | bool]]:
    """By metric, the file that a result names."""
    used = {
      key: self.weights[metric.network.key]
      for key, metric in self.metrics.items()
      if metric.network
    }
    fields = ("file", "sha256", "is_published")
    return {key: {f: getattr(x, f) for f in fields} for key, x in used.items()}


def check_known(
  asked: Iterable[str], subject: metrics_table.Subject, key: str
) -> None:
  """Raises UserError for a metric that cannot be computed of the subject.

  `key` is where the metrics are named, for messages.
  """
  known = metrics_table.known(subject)
  for metric in asked:
    if metric not in known:
      raise errors.UserError(
        f"unknown metric {metric!r} in {key}; known of {subject} are "
        f"{', '.join(known)}"
      )


def check_without_prompts(asked: Iterable[str], key: str) -> None:
  """Raises UserError for a metric that cannot be of a model of classes.

  `key` is where the metrics are named, for messages.
  """
  for name in asked:
    of_sets = metrics_table.METRICS[name].of_sets
    if of_sets and of_sets.prompts:
      raise errors.UserError(
        f"{name} in {key} compares samples with the prompts that they were "
        "drawn for, and this model learned classes, not captions; leave it out"
      )


def check(config: ConfigDict, key: str = "config") -> None:
  """Raises UserError for metrics that cannot be computed at a resolution.

  `key` is where the config is, for messages.
  """
  check_known(config.metrics, "reconstructions", f"{key}.metrics")
  side = min(config.resolutions)
  chosen = metrics_table.chosen(config.metrics, "reconstructions")
  for metric in chosen.values():
    smallest = metric.of_pairs.smallest_side if metric.of_pairs else 1
    if side < smallest:
      raise errors.UserError(
        f"image side {side} is below {smallest}, the smallest that "
        f"{metric.label} can be computed for; leave it out of {key}.metrics"
      )


def check_reference(config: ConfigDict) -> None:
  """Raises UserError for reference statistics that nothing can use."""
  if not config.reference:
    return
  chosen = metrics_table.chosen(config.metrics, "reconstructions")
  if metrics_table.INCEPTION.key not in compared(chosen):
    raise errors.UserError(
      f"config.reference={config.reference} is for metrics such as rfid, which "
      "is not among config.metrics"
    )
  if "{resolution}" not in config.reference and len(config.resolutions) > 1:
    raise errors.UserError(
      f"config.reference={config.reference} is one file for several "
      "resolutions; put {resolution} into it, or evaluate one resolution"
    )


def compared(
  metrics: set_measures.Metrics,
) -> dict[str, metrics_table.Network]:
  """By key, the networks whose outputs are compared with a reference."""
  metrics = set_measures.compared_with_originals(metrics)
  return {metric.network.key: metric.network for metric in metrics.values()}


def warn_of_few(numbers: Mapping[str, float | None], images: int) -> None:
  """Names the metrics that want more images, if there are any."""
  few = metrics_table.with_too_few(numbers, images)
  if few:
    _LOG.warning(
      "%s of %d images, fewer than %d: the number orders runs at best",
      ", ".join(few), images, fid.FEWEST_IMAGES,
    )  # fmt: skip


def open_all(
  asked: Iterable[str],
  weights: Mapping[str, str] | None = None,
  subject: metrics_table.Subject = "reconstructions",
) -> Opened:
  """Opens metrics; logs which are left out for want of weights.

  Args:
    asked: keys of metrics, besides those that are always computed.
    weights: by metric, the file of its network's; "": the usual place.
    subject: what is measured.

  Raises:
    UserError: a file of weights has other contents.
  """
  paths = {
    metrics_table.METRICS[key].network: path
    for key, path in (weights or {}).items()
    if path
  }
  metrics, opened, absent = {}, {}, {}
  for key, metric in metrics_table.chosen(asked, subject).items():
    network = metric.network
    try:
      if network is not None and network.key not in opened:
        opened[network.key] = network.load(paths.get(network, ""))
    except pretrained.AbsentWeightsError as error:
      absent[key] = str(error)
      _LOG.warning("%s is absent: %s", key, error)
    else:
      metrics[key] = metric
  return Opened(metrics, opened, absent)


def load_reference(
  path: str,
  network: metrics_table.Network,
  metrics: set_measures.Metrics,
) -> fid.Statistics:
  """The statistics of a network's features that metrics compare with.

  Raises:
    UserError: a file of other contents, or without the features of single
      images that a metric needs.
  """
  statistics = fid.load_statistics(path, network.features)
  for key, metric in set_measures.compared_with_originals(metrics).items():
    if metric.network != network or "features" not in metric.of_sets.rows:
      continue
    features, least = statistics.features, metric.of_sets.least
    shape = (0, network.features) if features is None else features.shape
    if (
      shape[1:] != (network.features,)
      or shape[0] < least
      or not np.isfinite(features).all()
    ):
      raise errors.UserError(
        f"config.reference={path} has features {list(shape)} of single images, "
        f"and {metric.label} needs those of at least {least}, each "
        f"{network.features} finite numbers; make a reference with "
        f"configs/reference_statistics.py, or leave {key} out of config.metrics"
      )
  return statistics
