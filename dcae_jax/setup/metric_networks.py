"""The networks of rFID, LPIPS and the like, their weights and references."""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dcae_jax.evaluation import fid, reconstruction
from dcae_jax.evaluation.networks import (
  efficientnet,
  inception,
  lpips,
  pretrained,
)

_LOG = logging.getLogger(__name__)
_LPIPS_NETWORK = "alexnet"  # of the paper's tables; training uses VGG16


class _Metric(NamedTuple):
  """What finds its weights, given a path or ""; its features, if it has any."""

  load: Callable[[str], pretrained.Pretrained]
  features: Callable[[Any, Any], Any] | None = None


METRICS = {
  "rfid": _Metric(
    inception.load, lambda parameters, x: inception.features(parameters, x)[0]
  ),
  "lpips": _Metric(functools.partial(lpips.load, _LPIPS_NETWORK)),
  "frechet_efficientnet_lite0": _Metric(
    efficientnet.load, efficientnet.features
  ),
}
_ANYWHERE = dict.fromkeys(METRICS, "")


class Opened(NamedTuple):
  """Weights of networks, why others are absent, and reference statistics.

  Attributes:
    found: by metric.
    absent: by metric, why, with the command that gets it.
    references: by resolution, mean and covariance by metric.
    reference_files: file and sha256 by resolution.
  """

  found: dict[str, pretrained.Pretrained]
  absent: dict[str, str]
  references: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]]
  reference_files: dict[str, dict[str, str]]


def check(config: ConfigDict, key: str = "config") -> None:
  """Raises ValueError for metrics that cannot be computed as asked.

  Args:
    config: with `metrics` and `resolutions`.
    key: where it stands, for messages.
  """
  for metric in config.metrics:
    if metric not in METRICS:
      raise ValueError(
        f"unknown metric {metric!r} in {key}.metrics; known are "
        f"{', '.join(METRICS)}"
      )
  smallest = lpips.SMALLEST_SIDE[_LPIPS_NETWORK]
  if "lpips" in config.metrics and min(config.resolutions) < smallest:
    raise ValueError(
      f"image side {min(config.resolutions)} is below {smallest}, the smallest "
      f"that LPIPS can be computed for; leave it out of {key}.metrics"
    )


def check_reference(config: ConfigDict) -> None:
  """Raises ValueError for reference statistics that nothing can use."""
  if config.reference and "rfid" not in config.metrics:
    raise ValueError(
      f"config.reference={config.reference} is for rfid, which is not among "
      "config.metrics"
    )
  is_one_file = "{resolution}" not in config.reference
  if config.reference and is_one_file and len(config.resolutions) > 1:
    raise ValueError(
      f"config.reference={config.reference} is one file for several "
      "resolutions; put {resolution} into it, or evaluate one resolution"
    )


def open_all(
  metrics: Iterable[str], weights: Mapping[str, str] = _ANYWHERE
) -> Opened:
  """Reads weights.

  Args:
    metrics: keys of `METRICS`.
    weights: by metric, where they are; "": the cache, or the package that
      brings them.

  Raises:
    ValueError: a file that is not what it should be.
  """
  found, absent = {}, {}
  for metric in metrics:
    try:
      found[metric] = METRICS[metric].load(weights[metric])
    except pretrained.AbsentWeightsError as error:
      absent[metric] = str(error)
      _LOG.warning("%s is absent: %s", metric, error)
  return Opened(found, absent, {}, {})


def with_references(opened: Opened, config: ConfigDict) -> Opened:
  """The same, with the reference statistics of an evaluation.

  Raises:
    ValueError: a file that is not what it should be.
  """
  references, files = {}, {}
  for resolution in config.resolutions if config.reference else ():
    path = config.reference.replace("{resolution}", str(resolution))
    statistics = fid.load_statistics(path, inception.FEATURES)
    references[resolution] = {"rfid": (statistics.mean, statistics.covariance)}
    files[str(resolution)] = {"file": path, "sha256": statistics.sha256}
  return opened._replace(references=references, reference_files=files)


def networks(
  encode: Callable[[Any, Any], Any],
  decode: Callable[[Any, Any], Any],
  opened: Opened,
) -> reconstruction.Networks:
  """An autoencoder's functions and those of the metrics that were found."""
  perceptual = None
  if "lpips" in opened.found:
    perceptual = functools.partial(lpips.distance, network=_LPIPS_NETWORK)
  return reconstruction.Networks(
    encode,
    decode,
    perceptual,
    {
      name: METRICS[name].features
      for name in opened.found
      if METRICS[name].features is not None
    },
    {name: found.parameters for name, found in opened.found.items()},
  )
