import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax.evaluation import figures, image_metrics, reconstruction
from dcae_jax.training import hardware, sharding


def _batches(n=10, size=4, good=7):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (n, 16, 16, 3)).astype(np.uint8)
  mask = np.arange(n) < good
  padded = -(-n // size) * size
  images = np.concatenate([images, images[: padded - n]])
  mask = np.concatenate([mask, np.zeros(padded - n, bool)])
  for i in range(0, padded, size):
    yield jnp.asarray(images[i : i + size]), jnp.asarray(mask[i : i + size])


def _measure(good, samples=3):
  encode = lambda variables, images: images * variables
  decode = lambda variables, z: z
  mesh = sharding.create_mesh(8, 1, 1)
  measure_batch = reconstruction.create(
    encode, decode, sharding.replicated(mesh), samples
  )
  return reconstruction.measure(
    measure_batch, jnp.float32(0.9), _batches(good=good)
  )


def test_metrics_are_means_over_the_usable_images():
  found = _measure(good=7)
  images = jnp.concatenate([images for images, _ in _batches()])[:7]
  images = images.astype("float32")
  darker = image_metrics.quantise(0.9 * (images / 127.5 - 1))
  for name in ("psnr", "ssim"):
    values = getattr(image_metrics, name)(darker, images)
    np.testing.assert_allclose(found.metrics[name], values.mean(), rtol=1e-4)
  rms = jnp.sqrt(jnp.mean(jnp.square(0.9 * (images / 127.5 - 1))))
  np.testing.assert_allclose(found.metrics["latent_rms"], rms, rtol=1e-5)
  np.testing.assert_array_equal(found.originals, images[:3])
  np.testing.assert_array_equal(found.reconstructions, darker[:3])


def test_masked_images_are_not_shown():
  assert _measure(good=2).originals.shape == (2, 16, 16, 3)


def test_no_usable_image_is_an_error():
  with pytest.raises(ValueError, match="no image"):
    _measure(good=0)


def test_grid_shows_every_image_in_its_place():
  rows = [np.full((3, 8, 6, 3), 10 * i, np.uint8) for i in range(2)]
  found = figures.grid(rows)
  assert found.shape == (2 * (8 + 4) + 4, 3 * (6 + 4) + 4, 3)
  for i in range(2):
    assert np.all(found[4 + i * 12 : 12 + i * 12, 4:10] == 10 * i)
  labelled = figures.grid(rows, ["a", "longer label"])
  assert labelled.shape[1] > found.shape[1]
  np.testing.assert_array_equal(
    labelled[:, -found.shape[1] + 4 :][:, :6], found[:, 4:10]
  )


def test_grey_images_make_a_grid():
  assert figures.grid([np.zeros((1, 8, 8, 1), np.uint8)]).shape == (16, 16, 3)


def test_loss_curves_are_a_png_and_skip_what_is_missing():
  lines = [{"step": 1, "train/a": 1.0}, {"step": 2, "eval/psnr": 20.0}]
  found = figures.loss_curves({"one": lines, "two": []}, ("train/a", "x"))
  assert found.startswith(b"\x89PNG")


def test_peak_rate_of_this_machine_is_measured():
  assert jax.devices()[0].platform == "cpu"
  assert 1e8 < hardware.peak_flops() < 1e14
