"""The Frechet distance against pytorch-fid, from features and from files."""

import numpy as np
import pytest
from pytorch_fid import fid_score

from dcae_jax.autoencoder import streaming_moments
from dcae_jax.evaluation import fid


def _features(n, d, seed):
  """Correlated, not negative, as features after a ReLU are."""
  rng = np.random.default_rng(seed)
  mixing = np.random.default_rng(7).normal(size=(d, d)) / d**0.5
  return np.maximum(rng.normal(0.3, 1, (n, d)) @ mixing + 0.02 * seed, 0)


def _ours(rows):
  moments = streaming_moments.Moments(rows.shape[1])
  for part in np.array_split(rows, 13):
    moments.update(part)
  return moments.mean, moments.covariance


def _theirs(rows):
  return rows.mean(axis=0), np.cov(rows, rowvar=False)


@pytest.mark.parametrize(("n", "d"), [(2000, 64), (3000, 256), (60, 96)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_distance_equals_pytorch_fid(n, d):
  a, b = _features(n, d, 0), _features(n + 7, d, 3)
  expected = fid_score.calculate_frechet_distance(*_theirs(a), *_theirs(b))
  found = fid.frechet_distance(*_ours(a), *_ours(b))
  print(found / expected - 1)
  assert found == pytest.approx(expected, rel=1e-4)


def test_statistics_are_read_both_ways(tmp_path):
  mean, covariance = _ours(_features(50, 8, 0))
  file = tmp_path / "ours.npz"
  fid.save_statistics(file, mean, covariance)
  # A path that ends in .npz needs neither a network nor images there.
  mu, sigma = fid_score.compute_statistics_of_path(str(file), None, 1, 8, "cpu")
  np.testing.assert_array_equal(mu, mean)
  np.testing.assert_array_equal(sigma, covariance)
