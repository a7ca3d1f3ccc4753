"""The table of metrics: training, evaluations and reports all read it.

A metric is computed of pairs of images and averaged (PSNR), or of whole sets
(FID). To add one, write its function in a file and its line in `METRICS`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Array

from dcae_jax.autoencoder import quantisation
from dcae_jax.evaluation import fid, image_metrics, sample_metrics
from dcae_jax.evaluation.networks import (
  clip,
  efficientnet,
  inception,
  lpips,
  pretrained,
)

Subject = Literal["reconstructions", "samples"]
_ARROWS = {"higher": " ↑", "lower": " ↓", "neither": ""}


@dataclasses.dataclass(frozen=True)
class Column:
  """A number of a metric, as tables show it."""

  heading: str
  digits: int
  better: Literal["higher", "lower", "neither"]

  @property
  def arrow(self) -> str:
    """Says which way is better."""
    return _ARROWS[self.better]

  @property
  def title(self) -> str:
    return self.heading + self.arrow

  def text(self, value: float | None) -> str:
    """A number that could not be computed is None, and reads "absent"."""
    return "absent" if value is None else f"{value:.{self.digits}f}"


@dataclasses.dataclass(frozen=True)
class Network:
  """A network that metrics see images through.

  Attributes:
    key: its name in files and records.
    load: its weights, given their path, or "" for the usual place; raises
      `pretrained.AbsentWeightsError` if there are none.
    describe: `(parameters, images) -> arrays [b, ...] by name`, of images with
      values from 0 to 255; None for networks that compare pairs themselves.
    features: dimensions of the array "features" that `describe` returns.
    describe_prompts: `(weights, prompts) -> features [n, features]` of texts,
      to be compared with those of images; None for networks that cannot read.
  """

  key: str
  load: Callable[[str], pretrained.Pretrained]
  describe: Callable[[Any, Array], dict[str, Array]] | None = None
  features: int = 0
  describe_prompts: (
    Callable[[pretrained.Pretrained, Sequence[str]], np.ndarray] | None
  ) = None


@dataclasses.dataclass(frozen=True)
class OfPairs:
  """A metric of an image and its reconstruction, averaged over images.

  Attributes:
    compute: `(parameters, reconstructions, originals) -> [b]`, of float32
      images with values from 0 to 255.
    histogram: the last edge and the number of bins, which start at 0; larger
      values count in the last bin.
    smallest_side: of the images, in pixels.
  """

  compute: Callable[[Any, Array, Array], Array]
  histogram: tuple[float, int] = (1.0, 100)
  smallest_side: int = 1

  @property
  def edges(self) -> np.ndarray:
    last, bins = self.histogram
    return np.linspace(0, last, bins + 1)


@dataclasses.dataclass(frozen=True)
class OfSets:
  """A metric of a whole set of images.

  Attributes:
    compute: `(images, reference) -> numbers of the columns`. Both have as
      attributes what the next two fields ask for: `mean`, `covariance` and the
      arrays [n, ...] of all images.
    moments: it needs the moments of the network's "features".
    rows: outputs of the network that it needs of each image.
    prompts: it needs the features of the text that each image was drawn for,
      the attribute `prompts` [n, features] of the images.
    is_compared: False: it needs no reference.
    least: images that it can be computed of.
    fewest: images that make it reliable; of fewer it orders runs at best.
  """

  compute: Callable[[Any, Any], Sequence[float]]
  moments: bool = False
  rows: tuple[str, ...] = ()
  prompts: bool = False
  is_compared: bool = True
  least: int = 1
  fewest: int = 0


@dataclasses.dataclass(frozen=True)
class Metric:
  """A value of the table; it has exactly one of `of_pairs` and `of_sets`.

  Attributes:
    label: for people.
    columns: its numbers, by their keys in results.
    network: whose outputs it is computed from; None: from the pixels alone.
    subjects: what it can be computed of. Pairs are of reconstructions only.
    always: it is computed even if nobody asks for it.
  """

  label: str
  columns: Mapping[str, Column]
  network: Network | None = None
  subjects: tuple[Subject, ...] = ("reconstructions", "samples")
  always: bool = False
  of_pairs: OfPairs | None = None
  of_sets: OfSets | None = None


def _inception(parameters, images):
  features, logits = inception.features(parameters, images)
  return {"features": features, "logits": logits}


def _efficientnet(parameters, images):
  return {"features": efficientnet.features(parameters, images)}


def _clip(parameters, images):
  return {"features": clip.image_features(parameters, images)}


def _lpips(parameters, reconstructions, originals):
  pair = map(quantisation.to_float, (reconstructions, originals))
  return lpips.distance(parameters, *pair, "alexnet")


def _frechet(images, reference):
  moments = (images.mean, images.covariance)
  reference_moments = (reference.mean, reference.covariance)
  return (fid.frechet_distance(*moments, *reference_moments),)


INCEPTION = Network("inception", inception.load, _inception, inception.FEATURES)
EFFICIENTNET = Network(
  "efficientnet_lite0", efficientnet.load, _efficientnet, efficientnet.FEATURES
)
CLIP = Network(
  "clip", clip.load, _clip, clip.LARGE.features, clip.text_features
)
# Of the paper's tables; training uses VGG16.
LPIPS = Network("lpips_alexnet", functools.partial(lpips.load, "alexnet"))

_LITE = "Fréchet EfficientNet-Lite0"
_FRECHET = OfSets(_frechet, moments=True, least=2, fewest=fid.FEWEST_IMAGES)
_PRECISION_RECALL = OfSets(
  lambda images, reference: sample_metrics.precision_recall(
    reference.features, images.features
  ),
  rows=("features",),
  least=sample_metrics.NEIGHBOURS + 1,
)
METRICS: dict[str, Metric] = {
  "rfid": Metric(
    "rFID",
    {"rfid": Column("rFID", 3, "lower")},
    INCEPTION,
    subjects=("reconstructions",),
    of_sets=_FRECHET,
  ),
  "psnr": Metric(
    "PSNR",
    {"psnr": Column("PSNR, dB", 2, "higher")},
    always=True,
    of_pairs=OfPairs(lambda _, x, y: image_metrics.psnr(x, y), (60.0, 120)),
  ),
  "ssim": Metric(
    "SSIM",
    {"ssim": Column("SSIM", 4, "higher")},
    always=True,
    of_pairs=OfPairs(
      lambda _, x, y: image_metrics.ssim(x, y),
      smallest_side=image_metrics.SMALLEST_SIDE,
    ),
  ),
  "lpips": Metric(
    "LPIPS",
    {"lpips": Column("LPIPS", 4, "lower")},
    LPIPS,
    of_pairs=OfPairs(_lpips, smallest_side=lpips.SMALLEST_SIDE["alexnet"]),
  ),
  "frechet_efficientnet_lite0": Metric(
    _LITE,
    {"frechet_efficientnet_lite0": Column(_LITE, 2, "lower")},
    EFFICIENTNET,
    of_sets=_FRECHET,
  ),
  "gfid": Metric(
    "gFID",
    {"gfid": Column("gFID", 2, "lower")},
    INCEPTION,
    subjects=("samples",),
    of_sets=_FRECHET,
  ),
  "inception_score": Metric(
    "Inception Score",
    {
      "inception_score": Column("Inception Score", 2, "higher"),
      "inception_score_deviation": Column("± over splits", 2, "neither"),
    },
    INCEPTION,
    of_sets=OfSets(
      lambda images, _: sample_metrics.inception_score(images.logits),
      rows=("logits",),
      is_compared=False,
      least=sample_metrics.SPLITS,
    ),
  ),
  "precision_recall": Metric(
    "precision and recall",
    {
      "precision": Column("precision", 4, "higher"),
      "recall": Column("recall", 4, "higher"),
    },
    INCEPTION,
    of_sets=_PRECISION_RECALL,
  ),
  "precision_recall_efficientnet_lite0": Metric(
    "precision and recall, EfficientNet-Lite0",
    {
      f"{name}_efficientnet_lite0": Column(
        f"{name}, EfficientNet-Lite0", 4, "higher"
      )
      for name in ("precision", "recall")
    },
    EFFICIENTNET,
    of_sets=_PRECISION_RECALL,
  ),
  "clip_score": Metric(
    "CLIP score",
    {"clip_score": Column("CLIP score", 2, "higher")},
    CLIP,
    subjects=("samples",),
    of_sets=OfSets(
      lambda images, _: (
        sample_metrics.clip_score(images.features, images.prompts),
      ),
      rows=("features",),
      prompts=True,
      is_compared=False,
    ),
  ),
}


def known(subject: Subject) -> dict[str, Metric]:
  """The metrics that can be computed of reconstructions, or of samples."""
  return {
    key: metric
    for key, metric in METRICS.items()
    if subject in metric.subjects
    # Samples have no originals to make pairs with.
    and (metric.of_sets or subject == "reconstructions")
  }


def chosen(asked: Iterable[str], subject: Subject) -> dict[str, Metric]:
  """Those that were asked for, and those that are always computed."""
  asked = set(asked)
  return {k: m for k, m in known(subject).items() if m.always or k in asked}


def describing_networks() -> dict[str, Network]:
  """Those that metrics of sets see images through, by key."""
  return {m.network.key: m.network for m in METRICS.values() if m.of_sets}


def columns() -> dict[str, Column]:
  """Of all metrics, by their keys in results, in the order of tables."""
  return {
    key: column
    for metric in METRICS.values()
    for key, column in metric.columns.items()
  }


def columns_of(results: Iterable[Mapping[str, Any]]) -> dict[str, Column]:
  """Those that any of several results has a number for."""
  keys = set().union(*results)
  return {key: column for key, column in columns().items() if key in keys}


def with_too_few(values: Mapping[str, float | None], images: int) -> list[str]:
  """Labels of the metrics among `values`, by column, that want more images."""
  return [
    metric.label
    for metric in METRICS.values()
    if metric.of_sets
    and images < metric.of_sets.fewest
    and any(values.get(key) is not None for key in metric.columns)
  ]
