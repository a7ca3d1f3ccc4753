"""Mean, standard deviation and RMS of latents, over all and per channel.

The reciprocal of the RMS is the scaling factor (DC-AE, appendix B). Diffusion
learns from latents that are multiplied by it, or each channel by its own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcae_jax import errors
from dcae_jax.runs import json_types

NORMALISATION_TYPES = {key: [json_types.NUMBER] for key in ("shift", "scale")}


class Normalisation(NamedTuple):
  """What diffusion makes of latents [..., c], in float32, and takes back.

  Numbers for all channels, or lists with one for each.
  """

  shift: float | Sequence[float]
  scale: float | Sequence[float]

  def apply(self, z: Any) -> Any:
    shift, scale = self._of_axes(z.ndim)
    return (z - shift) * scale

  def undo(self, z: Any) -> Any:
    shift, scale = self._of_axes(z.ndim)
    return z / scale + shift

  def _of_axes(self, axes: int) -> list[np.ndarray]:
    return [np.array(numbers, np.float32, ndmin=axes) for numbers in self]


def by_factor(manifest: dict[str, Any]) -> Normalisation:
  """By the factors of a store's autoencoder."""
  return Normalisation(manifest["shift_factor"], manifest["scaling_factor"])


def by_channels(manifest: dict[str, Any]) -> Normalisation:
  """Each channel of a store to mean 0 and deviation 1; UserError if unknown."""
  channels = manifest.get("statistics", {}).get("channels", {})
  mean, std = channels.get("mean", ()), channels.get("std", ())
  if not len(mean) == len(std) == manifest["shape"][-1]:
    raise errors.UserError(
      "it has no mean and standard deviation of each channel"
    )
  if (least := min(std)) <= 0:
    raise errors.UserError(
      f"its channel {std.index(least)} has a standard deviation of {least}"
    )
  return Normalisation(mean, [1 / x for x in std])


NORMALISATIONS: dict[str, Callable[[dict[str, Any]], Normalisation]] = {
  "factor": by_factor,
  "channels": by_channels,
}


def check_normalisation(kind: str) -> None:
  """Raises UserError for one that there is not."""
  if kind not in NORMALISATIONS:
    raise errors.UserError(
      f"unknown normalisation={kind!r}; known are {', '.join(NORMALISATIONS)}"
    )


class LatentStatistics:
  """Accumulates images in batches of any size, in float64."""

  def __init__(self, channels: int):
    self.count = 0  # positions of all images together
    self._mean = np.zeros(channels)
    self._scatter = np.zeros(channels)

  def update(
    self, means: np.ndarray, variances: np.ndarray, positions: int
  ) -> None:
    """Adds images by the moments of each over its positions, [n, c]."""
    means, variances = (np.asarray(x, np.float64) for x in (means, variances))
    if not len(means):
      return
    added = len(means) * positions
    mean = means.mean(axis=0)
    scatter = (variances + np.square(means - mean)).sum(axis=0) * positions
    total = self.count + added
    shift = mean - self._mean
    self._scatter += scatter + np.square(shift) * (self.count * added / total)
    self._mean = self._mean + shift * (added / total)
    self.count = total

  def add(self, latents: np.ndarray) -> None:
    """Adds images by their latents, [n, h, w, c]."""
    flat = np.asarray(latents, np.float64)
    flat = flat.reshape(len(flat), -1, flat.shape[-1])
    self.update(flat.mean(axis=1), flat.var(axis=1), flat.shape[1])

  def merge(self, moments: dict[str, Any]) -> None:
    """Adds what another one's `moments` returned."""
    mean, variance = (np.array([moments[x]]) for x in ("mean", "variance"))
    self.update(mean, variance, moments["positions"])

  def moments(self) -> dict[str, Any]:
    """Of each channel, as JSON has it; for `merge`."""
    return {
      "mean": self._mean.tolist(),
      "variance": (self._scatter / self.count).tolist(),
      "positions": self.count,
    }

  def compute(self) -> dict[str, Any]:
    """Numbers over all channels, and under "channels" a list for each."""
    variance = self._scatter / self.count
    square = variance + np.square(self._mean)
    mean, rms = self._mean.mean(), np.sqrt(square.mean())
    return {
      "mean": float(mean),
      "std": float(np.sqrt(max(square.mean() - mean**2, 0.0))),
      "rms": float(rms),
      "channels": {
        "mean": self._mean.tolist(),
        "std": np.sqrt(variance).tolist(),
        "rms": np.sqrt(square).tolist(),
      },
    }


def scaling_factor(
  statistics: dict[str, Any], shift_factor: float
) -> float | None:
  """1 / RMS of latents minus a shift, from what `compute` returned.

  None if they are all equal to the shift.
  """
  rms = math.hypot(statistics["std"], statistics["mean"] - shift_factor)
  return 1 / rms if rms else None
