"""PSNR and SSIM of 8-bit images, per image, as in the paper's tables."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_SIGMA = 1.5
_RADIUS = 5  # of an 11 pixel window
SMALLEST_SIDE = 2 * _RADIUS + 1


def psnr(
  images: Float[Array, "b h w c"], others: Float[Array, "b h w c"]
) -> Float[Array, " b"]:
  """Peak signal-to-noise ratio in dB; values from 0 to 255.

  At most 100 dB, which equal images give, so that means stay finite.
  """
  squared = jnp.mean(jnp.square(images - others), axis=(1, 2, 3))
  squared = jnp.maximum(squared, 255.0**2 * 1e-10)
  return 20 * jnp.log10(255.0) - 10 * jnp.log10(squared)


def _blur(x: Array) -> Array:
  """Gaussian window over positions whose whole window is inside the image."""
  offsets = np.arange(-_RADIUS, _RADIUS + 1)
  weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
  weights = weights / weights.sum()
  for axis in (1, 2):
    size = x.shape[axis] - 2 * _RADIUS
    x = sum(
      weight * jnp.take(x, jnp.arange(i, i + size), axis=axis)
      for i, weight in enumerate(weights)
    )
  return x


def ssim(
  images: Float[Array, "b h w c"], others: Float[Array, "b h w c"]
) -> Float[Array, " b"]:
  """Structural similarity (Wang et al. 2004); values from 0 to 255.

  Gaussian window of 11 pixels, sigma 1.5; mean over channels and over the
  positions whose window lies inside the image, as in scikit-image and in
  torchmetrics before 1.4.2, which now counts windows over the border, too (the
  version that the paper used is not known). Sides are at least 11 pixels.
  """
  c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
  # Variances do not depend on the centre, and lose less precision around it.
  centre = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
  a, b = images - centre, others - centre
  mean_a, mean_b = _blur(a), _blur(b)
  variance_a = _blur(a * a) - mean_a**2
  variance_b = _blur(b * b) - mean_b**2
  covariance = _blur(a * b) - mean_a * mean_b
  mean_a, mean_b = mean_a + centre, mean_b + centre
  luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
  structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
  return jnp.mean(luminance * structure, axis=(1, 2, 3))
