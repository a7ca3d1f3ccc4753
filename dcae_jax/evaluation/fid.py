"""Frechet distance between sets of images (FID, arXiv 1706.08500).

The distance between the Gaussians that have the moments of network features;
with features of the FID Inception it is FID (rFID for reconstructions).
"""

import hashlib
import io
from typing import NamedTuple

import numpy as np
import scipy.linalg
from etils import epath

from dcae_jax import errors
from dcae_jax.runs import metrics_writer, regular_files

# Of Inception's 2048 features; a covariance of fewer images is of low rank, and
# the distance far too large.
FEWEST_IMAGES = 2048


def frechet_distance(
  mean: np.ndarray,
  covariance: np.ndarray,
  other_mean: np.ndarray,
  other_covariance: np.ndarray,
) -> float:
  """Squared Frechet distance between two Gaussians.

  The trace of the square root of a product of covariances is the sum of the
  singular values of the product of their factors: no imaginary part can arise,
  and covariances of few images, of low rank, are quickly done.

  Means are [d], covariances [d, d].

  Raises:
    UserError: shapes that do not fit, values that are not finite, or matrices
      that are not covariances.
  """
  arrays = [
    np.asarray(x, np.float64)
    for x in (mean, covariance, other_mean, other_covariance)
  ]
  mean, covariance, other_mean, other_covariance = arrays
  d = mean.size
  if [x.shape for x in arrays] != [(d,), (d, d)] * 2:
    raise errors.UserError(
      "means and covariances have the shapes "
      f"{', '.join(str(x.shape) for x in arrays)}, not (d,), (d, d) twice"
    )
  product = _factor(covariance).T @ _factor(other_covariance)
  shared = np.linalg.svd(product, compute_uv=False).sum()
  apart = np.sum(np.square(mean - other_mean))
  distance = (
    apart + np.trace(covariance) + np.trace(other_covariance) - 2 * shared
  )
  return float(max(distance, 0.0))  # equal sets may end below by rounding


def _factor(covariance: np.ndarray) -> np.ndarray:
  """`f` [d, rank] with `f @ f.T` the covariance, by Cholesky with pivots."""
  if not np.isfinite(covariance).all():
    raise errors.UserError("a covariance has values that are not finite")
  size = np.abs(covariance).max(initial=0.0)
  if np.abs(covariance - covariance.T).max(initial=0.0) > 1e-6 * size:
    raise errors.UserError("a covariance is not symmetric")
  lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(covariance, lower=1)
  factor = np.empty((len(covariance), rank))
  factor[pivots - 1] = np.tril(lower)[:, :rank]
  if np.abs(covariance - factor @ factor.T).max(initial=0.0) > 1e-3 * size:
    raise errors.UserError("a covariance has a negative eigenvalue")
  return factor


def save_statistics(
  path: epath.PathLike,
  mean: np.ndarray,
  covariance: np.ndarray,
  features: np.ndarray | None = None,
) -> None:
  """Writes an `.npz` with `mu` [d] and `sigma` [d, d], as pytorch-fid does.

  `features` [n, d] of some of the images are for precision and recall.
  """
  buffer = io.BytesIO()
  arrays = {} if features is None else {"features": features}
  np.savez(buffer, mu=mean, sigma=covariance, **arrays)
  metrics_writer.write_whole(epath.Path(path), buffer.getvalue())


class Statistics(NamedTuple):
  """Of features of reference images, from a file."""

  mean: np.ndarray  # float64 [d]
  covariance: np.ndarray  # float64 [d, d]
  features: np.ndarray | None  # [n, d] of some of the images, as in the file
  sha256: str  # of the file


def load_statistics(path: epath.PathLike, dimensions: int) -> Statistics:
  """Reads `mu` [d] and `sigma` [d, d] of an `.npz`, ours or others'.

  Raises:
    UserError: no such file, or not statistics of so many dimensions.
  """
  file, what = epath.Path(path).expanduser(), "reference statistics:"
  if not file.is_file():
    raise errors.UserError(f"{what} there is no file {path}")
  try:
    data = regular_files.checked(file).read_bytes()
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
      mean, covariance = (
        np.asarray(archive[name], np.float64) for name in ("mu", "sigma")
      )
      features = archive.get("features")
  except Exception as error:  # whatever a damaged file makes of numpy
    raise errors.UserError(
      f"{what} {path} is not an .npz with mu and sigma ({error})"
    ) from error
  if mean.shape != (dimensions,) or covariance.shape != (dimensions,) * 2:
    raise errors.UserError(
      f"{what} {path} has mu {list(mean.shape)} and sigma "
      f"{list(covariance.shape)}, not [{dimensions}] and [{dimensions}, "
      f"{dimensions}]"
    )
  if not np.isfinite(mean).all():
    raise errors.UserError(f"{what} mu in {path} is not finite")
  try:
    _factor(covariance)
  except ValueError as error:
    raise errors.UserError(f"{what} {path}: {error}") from error
  digest = hashlib.sha256(data).hexdigest()
  return Statistics(mean, covariance, features, digest)
