"""Reconstruction quality over a set of images: PSNR and SSIM; RMS of latents.

Sees a predict function and batches only. Metrics are computed per image on
8-bit values, as in the paper's tables, and then averaged over images.
"""

import collections
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcae_jax.evaluation import image_metrics


class Result(NamedTuple):
  """Means over the images, and the first few of them, uint8 [n, h, w, c]."""

  metrics: dict[str, float]
  originals: np.ndarray
  reconstructions: np.ndarray


def create(
  encode: Callable[[Any, jax.Array], jax.Array],
  decode: Callable[[Any, jax.Array], jax.Array],
  sharding: jax.sharding.Sharding,
  samples: int,
) -> Callable[[Any, jax.Array, jax.Array], Any]:
  """The jitted measurement of one batch, for `measure`.

  Args:
    encode: `(variables, images in [-1, 1]) -> latents`.
    decode: `(variables, latents) -> reconstructions`.
    sharding: of the results: whole on every device.
    samples: rows of each batch to return as pictures.
  """

  def measure_batch(variables, images, mask):
    images = images.astype(jnp.float32)
    z = encode(variables, images / 127.5 - 1.0)
    found = image_metrics.quantise(decode(variables, z))
    values = {
      "latent_mean_square": jnp.mean(jnp.square(z), axis=(1, 2, 3)),
      "psnr": image_metrics.psnr(found, images),
      "ssim": image_metrics.ssim(found, images),
      "count": jnp.ones(images.shape[0]),
    }
    sums = {k: jnp.sum(jnp.where(mask, v, 0.0)) for k, v in values.items()}
    pictures = [x[:samples].astype(jnp.uint8) for x in (images, found)]
    return sums, (*pictures, mask[:samples])

  return jax.jit(measure_batch, out_shardings=sharding)


def measure(
  measure_batch: Callable[[Any, jax.Array, jax.Array], Any],
  variables: Any,
  batches: Iterable[tuple[jax.Array, jax.Array]],
) -> Result:
  """Averages over batches of (images, mask).

  Raises:
    ValueError: no image could be used.
  """
  totals, pictures = collections.Counter(), None
  for images, mask in batches:
    sums, found = jax.device_get(measure_batch(variables, images, mask))
    totals.update({name: float(value) for name, value in sums.items()})
    if pictures is None:
      *pictures, good = found
      pictures = [x[good] for x in pictures]
  count = totals.pop("count")
  if not count:
    raise ValueError("no image of the evaluation source could be used")
  metrics = {name: total / count for name, total in totals.items()}
  metrics["latent_rms"] = metrics.pop("latent_mean_square") ** 0.5
  return Result(metrics, *pictures)
