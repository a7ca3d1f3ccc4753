import jax.numpy as jnp
import numpy as np
import pytest
from skimage import metrics

from dcae_jax.evaluation import image_metrics


def _pair(shape=(3, 40, 33, 3)):
  rng = np.random.default_rng(0)
  a = rng.integers(0, 256, shape)
  b = np.clip(a + rng.normal(0, 20, shape), 0, 255).round()
  return a.astype("float32"), b.astype("float32")


def test_psnr_equals_skimage():
  a, b = _pair()
  expected = [
    metrics.peak_signal_noise_ratio(x, y, data_range=255)
    for x, y in zip(a, b, strict=True)
  ]
  found = image_metrics.psnr(jnp.asarray(a), jnp.asarray(b))
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_equals_skimage(channels):
  a, b = _pair((3, 40, 33, channels))
  expected = [
    metrics.structural_similarity(
      x,
      y,
      data_range=255,
      channel_axis=-1,
      gaussian_weights=True,
      sigma=1.5,
      use_sample_covariance=False,
    )
    for x, y in zip(a, b, strict=True)
  ]
  found = image_metrics.ssim(jnp.asarray(a), jnp.asarray(b))
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_equal_images_have_ssim_1_and_100_db():
  a = jnp.asarray(_pair()[0])
  np.testing.assert_allclose(image_metrics.ssim(a, a), 1.0, rtol=1e-6)
  np.testing.assert_allclose(image_metrics.psnr(a, a), 100.0, rtol=1e-5)
