import json

import numpy as np
import pytest

from dcae_jax.autoencoder import latent_statistics


def _compute(z, size):
  found = latent_statistics.LatentStatistics(z.shape[-1])
  for start in range(0, len(z), size):
    part = z[start : start + size]
    if start % 2:  # by the images' own moments, or by another's
      found.update(part.mean((1, 2)), part.var((1, 2)), 6)
    else:
      other = latent_statistics.LatentStatistics(z.shape[-1])
      other.add(part)
      found.merge(json.loads(json.dumps(other.moments())))
  return found.compute()


@pytest.mark.parametrize("size", [1, 4, 11])
def test_statistics_are_those_of_all_latents_for_any_batch_size(size):
  rng = np.random.default_rng(0)
  z = rng.normal([0, 5, -300.0], [1, 0.1, 2], (11, 2, 3, 3))
  found = _compute(z, size)
  assert found["mean"] == pytest.approx(z.mean())
  assert found["std"] == pytest.approx(z.std())
  assert found["rms"] == pytest.approx(np.sqrt(np.mean(z**2)))
  for shift in (0.0, 40.0):
    factor = latent_statistics.scaling_factor(found, shift)
    assert factor == pytest.approx(1 / np.sqrt(np.mean((z - shift) ** 2)))
  channels = z.reshape(-1, 3)
  for name, expected in (
    ("mean", channels.mean(0)),
    ("std", channels.std(0)),
    ("rms", np.sqrt(np.mean(channels**2, 0))),
  ):
    np.testing.assert_allclose(found["channels"][name], expected, rtol=1e-9)
  json.dumps(found)


def test_latents_that_are_all_zero_have_no_scaling_factor():
  found = _compute(np.zeros((2, 2, 3, 3)), 2)
  assert latent_statistics.scaling_factor(found, 0.0) is None
  assert latent_statistics.scaling_factor(found, 2.0) == 0.5


def test_channels_are_normalised_each_by_its_own_and_back():
  rng = np.random.default_rng(0)
  scales, means = np.array([0.1, 5.0, 1.0]), np.array([3.0, -20.0, 0.0])
  z = (rng.normal(size=(8, 4, 4, 3)) * scales + means).astype(np.float32)
  statistics = latent_statistics.LatentStatistics(3)
  statistics.add(z)
  manifest = {"statistics": statistics.compute(), "shape": [4, 4, 3]}
  found = latent_statistics.by_channels(manifest)
  normalised = found.apply(z)
  assert normalised.dtype == np.float32
  np.testing.assert_allclose(normalised.mean((0, 1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(normalised.std((0, 1, 2)), 1, atol=1e-5)
  np.testing.assert_allclose(found.undo(normalised), z, rtol=1e-5, atol=1e-6)
