"""Mean and covariance of rows that do not fit into memory, in float64."""

import numpy as np

from dcae_jax import errors


class Moments:
  """Mean and covariance of rows that come in batches of any size.

  Chan's update in float64: nothing is lost to cancellation, however large the
  mean is, and memory does not grow with the number of rows.
  """

  def __init__(self, dimensions: int):
    self.count = 0  # rows so far
    self.mean = np.zeros(dimensions)
    self._scatter = np.zeros((dimensions, dimensions))

  def update(self, rows: np.ndarray) -> None:
    """Adds rows [n, d]; raises FloatingPointError unless they are finite."""
    rows = np.asarray(rows, np.float64)
    if not len(rows):
      return
    if not np.isfinite(rows).all():
      raise FloatingPointError("features are not finite")
    mean = rows.mean(axis=0)
    centred = rows - mean
    total = self.count + len(rows)
    shift = mean - self.mean
    self._scatter += centred.T @ centred
    self._scatter += np.outer(shift, shift) * (self.count * len(rows) / total)
    self.mean = self.mean + shift * (len(rows) / total)
    self.count = total

  @property
  def covariance(self) -> np.ndarray:
    """Float64 [d, d], unbiased; raises UserError for fewer than two rows."""
    if self.count < 2:
      raise errors.UserError(
        f"a Frechet distance needs at least 2 images, not {self.count}"
      )
    return self._scatter / (self.count - 1)
