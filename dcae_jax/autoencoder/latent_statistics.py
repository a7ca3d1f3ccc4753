"""Mean, standard deviation and RMS of latents, over all and per channel.

The reciprocal of the RMS is the scaling factor (DC-AE, appendix B).
"""

import math
from typing import Any

import numpy as np


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
