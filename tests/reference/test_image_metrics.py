"""PSNR and SSIM against torchmetrics before 1.4.2: windows inside images."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchmetrics.image

from dcae_jax.evaluation import image_metrics


def _pairs(shape, noise):
  """Whole numbers from 0 to 255: noise, and an image that is nearly flat."""
  rng = np.random.default_rng(0)
  images = rng.uniform(0, 255, shape)
  images[1] = 200 + rng.normal(0, 2, shape[1:])
  others = images + rng.normal(0, noise, shape)
  return [
    np.clip(x.round(), 0, 255).astype("float32") for x in (images, others)
  ]


def _theirs(metric, pair):
  """One image at a time, since theirs average over more."""
  pair = [
    torch.from_numpy(x.transpose(0, 3, 1, 2).astype("float64")) for x in pair
  ]
  return [metric(a[None], b[None]).item() for a, b in zip(*pair, strict=True)]


@pytest.mark.parametrize(
  "shape", [(3, 64, 48, 3), (2, 11, 11, 3), (2, 40, 40, 1)]
)
@pytest.mark.parametrize("noise", [1, 30])
def test_psnr_and_ssim_equal_torchmetrics(shape, noise):
  pair = _pairs(shape, noise)
  metrics = {
    "psnr": torchmetrics.image.PeakSignalNoiseRatio(data_range=255.0),
    "ssim": torchmetrics.image.StructuralSimilarityIndexMeasure(
      data_range=(0.0, 255.0)
    ),
  }
  for name, metric in metrics.items():
    found = getattr(image_metrics, name)(*map(jnp.asarray, pair))
    np.testing.assert_allclose(found, _theirs(metric, pair), rtol=1e-5)
