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
