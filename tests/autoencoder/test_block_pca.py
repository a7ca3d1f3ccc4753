"""Block PCA against numpy's singular values, and what it is fitted on."""

import itertools

import numpy as np
import pytest
from conftest import smooth_image

from dcae_jax.autoencoder import block_pca
from dcae_jax.data import batches, images, sources
from dcae_jax.setup import floor


def _pictures(number=3, side=32):
  rng = np.random.default_rng(0)
  x = np.stack([smooth_image(i, side, side) for i in range(number)])
  x = x + rng.normal(scale=20, size=x.shape)
  return np.float32(np.clip(x, 0, 255) / 127.5 - 1)


def _blocks(x, f):
  b, h, w, c = x.shape
  x = x.reshape(b, h // f, f, w // f, f, c).swapaxes(2, 3)
  return x.reshape(-1, f, f, c)


def _from_blocks(blocks, b, h, w, f):
  x = blocks.reshape(b, h // f, w // f, f, f, -1).swapaxes(2, 3)
  return x.reshape(b, h, w, -1)


def _reconstruct(pca, x):
  return np.asarray(pca.decode(pca.encode(x)))


@pytest.mark.parametrize(("f", "c"), [(4, 3), (8, 16)])
def test_it_is_the_projection_on_the_first_singular_vectors(f, c):
  x = _pictures()
  rows = _blocks(x, f).reshape(-1, f * f * 3).astype(np.float64)
  mean = rows.mean(axis=0)
  _, _, vectors = np.linalg.svd(rows - mean, full_matrices=False)
  projection = vectors[:c].T @ vectors[:c]
  pca = block_pca.fit([_blocks(x, f)], c)
  components = pca.variables["params"]["components"]
  np.testing.assert_allclose(components @ components.T, projection, atol=1e-4)
  assert pca.encode(x).shape == (3, 32 // f, 32 // f, c)
  expected = _from_blocks((rows - mean) @ projection + mean, *x.shape[:3], f)
  np.testing.assert_allclose(_reconstruct(pca, x), expected, atol=1e-4)
  assert (pca.spatial_compression, pca.latent_channels) == (f, c)


def test_batches_of_any_size_fit_what_all_blocks_at_once_fit():
  """Their means differ: each picture is a batch, and one is split."""
  blocks = _blocks(_pictures() + np.arange(3.0)[:, None, None, None], 4)
  parts = np.split(blocks, [1, 64, 128])
  once, often = block_pca.fit([blocks], 5), block_pca.fit(parts, 5)
  for name, expected in once.variables["params"].items():
    found = often.variables["params"][name]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_more_components_are_never_worse_and_all_are_the_identity():
  x = _pictures()
  errors = []
  for c in (1, 2, 4, 8, 24, 48):
    y = _reconstruct(block_pca.fit([_blocks(x, 4)], c), x)
    errors.append(np.square(y - x).mean())
  assert all(b < a for a, b in itertools.pairwise(errors))
  np.testing.assert_allclose(y, x, atol=1e-5)


def test_deeper_models_are_compared_at_the_same_size_of_latents():
  assert block_pca.shape(8, 16, 3) == (8, 16)
  assert block_pca.shape(64, 128, 3) == (32, 32)
  assert block_pca.shape(128, 512, 3) == (32, 32)


@pytest.mark.parametrize(
  ("size", "message"),
  [
    ((64, 126, 3), "f64c126 cannot be"),
    ((128, 8, 3), "f128c8: .* f64c2 cannot be"),
    ((2, 13, 3), "2 x 2 x 3 = 12 values"),
    ((8, 0, 3), "f8c0"),
  ],
)
def test_sizes_that_cannot_be_are_refused(size, message):
  with pytest.raises(ValueError, match=message):
    block_pca.shape(*size)


def _material(path, **decoding):
  return floor.Material(
    [(sources.folder(str(path)), 1.0)],
    images.Decoding(**decoding),
    images.Cropping("random_resized_crop", 32),
  )


def test_the_same_images_fit_the_same_floor(photographs):
  first, second = (
    floor.fit(_material(photographs), 8, 4, (32,), threads=n) for n in (1, 3)
  )
  for name, expected in first.variables["params"].items():
    found = second.variables["params"][name]
    np.testing.assert_array_equal(found, expected)


def test_images_of_a_large_source_are_spread_over_it():
  few, many = (
    sources.listed([""] * n, [0] * n, [""] * n, [""]) for n in (3, 10_000)
  )
  chosen = floor._chosen([(many, 3.0), (few, 1.0)])
  of_many = [index for source, index in chosen if source is many]
  assert len(of_many) == 1_500
  assert set(np.diff(of_many)) <= {6, 7} and of_many[-1] > 9_990
  assert [index for source, index in chosen if source is few] == [0, 1, 2]


def test_a_floor_without_a_usable_image_is_refused(photographs):
  with pytest.raises(ValueError, match="none of 12 images"):
    floor.fit(_material(photographs, min_size=500), 8, 4, (32,), threads=1)


def test_the_floor_of_the_embedded_photographs():
  """24.8 and 26.6 dB, whatever blocks are drawn; the sixteenth of nearly equal
  components may change them by 0.2."""
  material = floor.Material(
    [(sources.embedded("train"), 1.0)], images.Decoding(shorter_side=384)
  )
  pca = floor.fit(material, 8, 16, (64, 128), threads=2)
  for side, expected in ((64, 24.8), (128, 26.6)):
    (batch,) = images.evaluation_batches(
      sources.embedded("validation"),
      images.Decoding(),
      side,
      batches.Reading(8, threads=1),
      skipped=images.Skipped(),
    )
    x = batch["images"].astype(np.float64)
    y = np.round(_reconstruct(pca, np.float32(x / 127.5 - 1)) * 127.5 + 127.5)
    errors = np.square(np.clip(y, 0, 255) - x).mean(axis=(1, 2, 3))
    psnr = np.mean(20 * np.log10(255) - 10 * np.log10(errors))
    assert psnr == pytest.approx(expected, abs=0.3)
