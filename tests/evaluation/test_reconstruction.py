import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax.autoencoder import quantisation, streaming_moments
from dcae_jax.evaluation import fid, image_metrics, metrics, reconstruction
from dcae_jax.evaluation.networks import pretrained
from dcae_jax.training import sharding


def _images(n, channels=3):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (n, 16, 16, channels)).astype(np.uint8)


def _batches(images, size, holes=()):
  """Whole batches on the devices; the images at `holes` are masked."""
  n, rest = len(images), -len(images) % size
  mask = ~np.isin(np.arange(n + rest), [*holes, *range(n, n + rest)])
  noise = np.full((rest, *images.shape[1:]), 200, np.uint8)
  images = np.concatenate([images, noise])
  images[list(holes)] = 77
  for i in range(0, n + rest, size):
    part = slice(i, i + size)
    yield reconstruction.Batch(
      jnp.asarray(images[part]),
      jnp.asarray(mask[part]),
      jnp.arange(i, i + size, dtype="int32"),
    )


def _by_batch(batches, mesh):
  spec = jax.sharding.PartitionSpec(("data", "fsdp"))
  placed = jax.sharding.NamedSharding(mesh, spec)
  return (jax.device_put(batch, placed) for batch in batches)


def _network(key, feature):
  return metrics.Network(
    key,
    lambda path: pretrained.Pretrained({}, path, "", True),
    lambda parameters, x: {"features": feature(parameters, x), "unused": x},
    features=3,
  )


def _distance(name, feature):
  return metrics.Metric(
    name,
    {name: metrics.Column(name, 2, "lower")},
    _network(name, feature),
    of_sets=metrics.METRICS["rfid"].of_sets,
  )


NETWORKS = reconstruction.Networks(
  encode=lambda variables, x: x[:, ::2, ::2] * variables,
  decode=lambda variables, z: jnp.repeat(jnp.repeat(z, 2, 1), 2, 2),
  metrics={
    "psnr": metrics.METRICS["psnr"],
    "ssim": metrics.METRICS["ssim"],
    "lpips": metrics.Metric(
      "distance",
      {"lpips": metrics.Column("distance", 2, "lower")},
      _network("pairs", lambda p, x: x),
      of_pairs=metrics.OfPairs(
        lambda p, a, b: p * jnp.mean(jnp.abs(a - b) / 127.5, axis=(1, 2, 3))
      ),
    ),
    "rfid": _distance("rfid", lambda p, x: p * jnp.mean(x, axis=(1, 2)) / 255),
    "other": _distance(
      "other", lambda p, x: jnp.mean(x / 255, axis=(1, 2)) ** p
    ),
  },
  parameters={"pairs": 2.0, "rfid": 3.0, "other": 2.0},
)


def _measure(batches, mesh=None, networks=NETWORKS, extremes=0, **kwargs):
  mesh = mesh or sharding.create_mesh(8, 1, 1)
  measurement = reconstruction.Measurement(
    networks, sharding.replicated(mesh), samples=3, extremes=extremes
  )
  return measurement.measure(jnp.float32(0.9), batches, **kwargs)


def _expected(images):
  """Without batches: numpy over the whole set."""
  pixels = jnp.asarray(images, "float32")
  z = 0.9 * (pixels[:, ::2, ::2] / 127.5 - 1)
  found = quantisation.quantise(z.repeat(2, 1).repeat(2, 2))
  features = lambda x: 3 * np.asarray(x, float).mean((1, 2)) / 255
  moments = [streaming_moments.Moments(images.shape[-1]) for _ in range(2)]
  for m, x in zip(moments, (found, pixels), strict=True):
    m.update(features(x))
  a, b = moments
  metrics = {
    name: getattr(image_metrics, name)(found, pixels)
    for name in ("psnr", "ssim")
  }
  metrics["lpips"] = 2 * jnp.abs(found / 127.5 - pixels / 127.5).mean((1, 2, 3))
  means = {name: float(jnp.mean(x)) for name, x in metrics.items()}
  means["rfid"] = fid.frechet_distance(
    a.mean, a.covariance, b.mean, b.covariance
  )
  means["latent_rms"] = float(jnp.sqrt(jnp.mean(jnp.square(z))))
  return np.asarray(z), found, means


@pytest.mark.parametrize("n", [2, 7, 11, 31])
@pytest.mark.parametrize("size", [8, 16, 32])
def test_n_images_in_are_n_images_counted(n, size):
  """Neither the remainder, nor holes, nor the batch size change a number."""
  images = _images(n + 2)
  holes = (1, n // 2 + 1)
  good = np.delete(images, holes, axis=0)
  _, _, expected = _expected(good)
  mesh = sharding.create_mesh(8, 1, 1)
  seen = []
  found = _measure(
    _by_batch(_batches(images, size, holes), mesh), on_batch=seen.extend
  )
  kept = np.delete(np.arange(n + 2), sorted(set(holes)))
  assert found.count == len(good) == len(kept)
  assert [row["index"] for row in seen] == kept.tolist()
  for name, value in expected.items():
    assert found.metrics[name] == pytest.approx(value, rel=1e-4), name
  assert all(sum(bins) == len(good) for bins in found.histograms.values())
  for name in ("psnr", "ssim", "lpips"):
    mean = np.mean([row[name] for row in seen])
    assert found.metrics[name] == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 1, 4)])
def test_numbers_do_not_depend_on_the_devices(shape):
  mesh = sharding.create_mesh(*shape)
  images = _images(13)
  found = _measure(_by_batch(_batches(images, 8), mesh), mesh)
  _, _, expected = _expected(images)
  assert found.count == 13
  for name, value in expected.items():
    assert found.metrics[name] == pytest.approx(value, rel=1e-4), name


def test_latents_are_measured_per_channel():
  images = _images(5)
  z, _, _ = _expected(images)
  found = _measure(_batches(images, 2)).latents
  assert found["rms"] == pytest.approx(np.sqrt(np.mean(z**2)), rel=1e-5)
  np.testing.assert_allclose(
    found["channels"]["mean"], z.mean((0, 1, 2)), rtol=1e-4, atol=1e-6
  )


def test_first_worst_and_best_images_are_shown():
  images = _images(9) // 4 * (1 + np.arange(9) % 4)[:, None, None, None]
  images = images.astype(np.uint8)
  seen = []
  found = _measure(
    _batches(images, 4, holes=[1]), extremes=2, on_batch=seen.extend
  )
  by_psnr = sorted(seen, key=lambda row: row["psnr"])
  indices = lambda pictures: [picture.index for picture in pictures]
  assert indices(found.samples) == [0, 2, 3]
  assert [p.values["psnr"] for p in found.worst] == [
    row["psnr"] for row in by_psnr[:2]
  ]
  assert [p.values["psnr"] for p in found.best] == [
    row["psnr"] for row in by_psnr[::-1][:2]
  ]
  _, reconstructions, _ = _expected(images)
  for picture in found.samples + found.worst + found.best:
    np.testing.assert_array_equal(picture.original, images[picture.index])
    np.testing.assert_array_equal(
      picture.reconstruction, reconstructions[picture.index]
    )
    assert picture.latents.shape == (8, 8, 3)


def test_reference_statistics_take_the_place_of_the_originals():
  images = _images(9)
  reference = fid.Statistics(np.zeros(3), np.eye(3), None, "")
  found = _measure(_batches(images, 4), references={"rfid": reference})
  _, reconstructions, expected = _expected(images)
  moments = streaming_moments.Moments(3)
  moments.update(3 * np.asarray(reconstructions).mean((1, 2)) / 255)
  distance = fid.frechet_distance(
    moments.mean, moments.covariance, *reference[:2]
  )
  assert found.metrics["rfid"] == pytest.approx(distance, rel=1e-4)
  assert found.metrics["psnr"] == pytest.approx(expected["psnr"], rel=1e-4)


def test_one_image_has_no_distance_but_says_so():
  found = _measure(_batches(_images(1), 2))
  assert found.count == 1
  assert "rfid" not in found.metrics and "psnr" in found.metrics
  assert "at least 2 images, not 1" in found.absent["rfid"]


def test_no_usable_image_is_an_error():
  with pytest.raises(ValueError, match="no image"):
    _measure(_batches(_images(2), 2, holes=[0, 1]))


def test_a_reconstruction_that_is_not_finite_is_named():
  networks = NETWORKS._replace(
    decode=lambda variables, z: jnp.where(
      jnp.arange(z.shape[0])[:, None, None, None] == 1, jnp.nan,
      jnp.repeat(jnp.repeat(z, 2, 1), 2, 2),
    )
  )  # fmt: skip
  with pytest.raises(FloatingPointError, match="image 1 are not finite"):
    _measure(_batches(_images(4), 4), networks=networks)
