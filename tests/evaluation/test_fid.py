import hashlib

import numpy as np
import pytest
import scipy.linalg

from dcae_jax.autoencoder import streaming_moments
from dcae_jax.evaluation import fid


def _features(n, d=12, seed=0, shift=0.0):
  rng = np.random.default_rng(seed)
  mixing = np.random.default_rng(9).normal(size=(d, d))
  return rng.normal(size=(n, d)) @ mixing + shift


def _moments(rows, size=None):
  moments = streaming_moments.Moments(rows.shape[1])
  for start in range(0, len(rows), size or 1000):
    moments.update(rows[start : start + (size or 1000)])
  return moments


def _expected(a, b):
  """The textbook formula."""
  covariances = [np.cov(x, rowvar=False) for x in (a, b)]
  root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
  apart = np.sum(np.square(a.mean(0) - b.mean(0)))
  return apart + np.trace(covariances[0] + covariances[1] - 2 * root)


def _distance(a, b):
  a, b = _moments(a), _moments(b)
  return fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


@pytest.mark.parametrize("size", [1, 2, 7, 97, 101])
def test_moments_are_the_same_for_any_batch_size(size):
  rows = _features(101, shift=1e4)
  found = _moments(rows, size)
  assert found.count == 101
  np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
  expected = np.cov(rows, rowvar=False)
  np.testing.assert_allclose(found.covariance, expected, rtol=1e-9, atol=1e-9)


def test_large_means_do_not_swallow_the_covariance():
  rows = _features(50) * 1e-3 + 1e6
  expected = np.cov(rows, rowvar=False)
  np.testing.assert_allclose(_moments(rows, 7).covariance, expected, rtol=1e-5)


def test_distance_is_the_textbooks():
  a, b = _features(300), _features(200, seed=1, shift=0.5) * 1.3
  np.testing.assert_allclose(_distance(a, b), _expected(a, b), rtol=1e-9)


def test_distance_of_gaussians_is_the_closed_form():
  variances, others = np.array([1.0, 4.0, 0.0]), np.array([9.0, 4.0, 2.0])
  found = fid.frechet_distance(
    np.zeros(3), np.diag(variances), np.array([1.0, 0, 2]), np.diag(others)
  )
  roots = np.sqrt(variances) - np.sqrt(others)
  assert found == pytest.approx(5 + np.sum(roots**2), rel=1e-12)


def test_fewer_images_than_features_give_a_finite_distance():
  """Where the square root of the product of covariances breaks down."""
  a, b = _features(5, 40), _features(4, 40, seed=1)
  found = _distance(a, b)
  # In the space that the images span, everything has full rank.
  basis = scipy.linalg.orth(np.concatenate([a, b]).T)
  assert found == pytest.approx(_distance(a @ basis, b @ basis), rel=1e-6)


def test_equal_sets_have_distance_zero():
  rows = _features(30, 40)
  assert _distance(rows, rows[::-1]) == pytest.approx(0, abs=1e-9)


def test_distance_is_symmetric_and_grows_with_noise():
  a = _features(200)
  noise = np.random.default_rng(5).normal(size=a.shape)
  found = [_distance(a, a + scale * noise) for scale in (0.0, 0.5, 1.0, 2.0)]
  assert found == sorted(found)
  assert _distance(a, a + noise) == pytest.approx(_distance(a + noise, a))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(count):
  with pytest.raises(ValueError, match=f"at least 2 images, not {count}"):
    _ = _moments(_features(count)).covariance


def test_features_that_are_not_finite_stop_it():
  rows = _features(3)
  rows[1, 2] = np.nan
  with pytest.raises(FloatingPointError, match="not finite"):
    streaming_moments.Moments(12).update(rows)


@pytest.mark.parametrize(
  ("matrix", "message"),
  [
    ([[1.0, 0.5], [0.0, 1.0]], "not symmetric"),
    ([[1.0, 2.0], [2.0, 1.0]], "negative eigenvalue"),
    ([[np.nan, 0.0], [0.0, 1.0]], "not finite"),
    ([[1.0]], "shapes"),
  ],
)
def test_matrices_that_are_no_covariances_are_refused(matrix, message):
  with pytest.raises(ValueError, match=message):
    fid.frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.array(matrix))


def test_statistics_are_saved_and_read(tmp_path):
  moments = _moments(_features(40))
  file = tmp_path / "new" / "reference.npz"
  fid.save_statistics(file, moments.mean, moments.covariance)
  with np.load(file) as archive:
    assert sorted(archive.files) == ["mu", "sigma"]
  mean, covariance, _, digest = fid.load_statistics(file, 12)
  assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
  np.testing.assert_array_equal(mean, moments.mean)
  np.testing.assert_array_equal(covariance, moments.covariance)


def test_statistics_of_others_may_be_float32_and_hold_more(tmp_path):
  file = tmp_path / "others.npz"
  values = {"mu": np.zeros(3, "f4"), "sigma": np.eye(3, dtype="f4")}
  np.savez_compressed(file, **values, arr_0=np.zeros((2, 8, 8, 3)))
  mean, *_ = fid.load_statistics(str(file), 3)
  assert mean.dtype == np.float64


@pytest.mark.parametrize(
  ("write", "message"),
  [
    (lambda f: None, "no file"),
    (lambda f: f.write_bytes(b"PK nothing"), "not an .npz"),
    (lambda f: np.savez(f, mu=np.zeros(3)), "not an .npz with mu and sigma"),
    (lambda f: np.savez(f, mu=np.zeros(2), sigma=np.eye(2)), r"mu \[2\]"),
    (
      lambda f: np.savez(f, mu=np.full(3, np.nan), sigma=np.eye(3)),
      "not finite",
    ),
    (
      lambda f: np.savez(f, mu=np.zeros(3), sigma=np.tri(3)),
      "not symmetric",
    ),
    (
      lambda f: np.savez(f, mu=np.array([{}] * 3), sigma=np.eye(3)),
      "not an .npz",
    ),
  ],
)
def test_bad_statistics_are_refused(write, message, tmp_path):
  file = tmp_path / "bad.npz"
  write(file)
  with pytest.raises(ValueError, match=message):
    fid.load_statistics(file, 3)
