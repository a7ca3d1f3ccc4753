"""SD-VAE against diffusers' AutoencoderKL: outputs, gradients, files."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import dcae_jax
from benchmarks import parity


def _pair(config, tmp_path_factory):
  """Their model, and ours with the same weights."""
  theirs = parity.reference(config)
  folder = tmp_path_factory.mktemp("theirs")
  theirs.save_pretrained(folder)
  return theirs, dcae_jax.load(folder)


@pytest.fixture(scope="module", params=parity.SD_VAES)
def pair(request, tmp_path_factory):
  config = parity.reduced(parity.SD_VAES[request.param])
  factors = {"scaling_factor": 0.25, "shift_factor": 0.5}
  return _pair(config | factors, tmp_path_factory)


def test_encode_and_decode_equal_diffusers(pair):
  theirs, ours = pair
  for shape in parity.sizes(ours.spatial_compression).values():
    images = parity.random_images(shape)
    expected = parity.reference_outputs(theirs, images)
    assert max(parity.errors(ours, images, *expected)) < 1e-4


def test_f8c4_equals_diffusers_at_full_width(tmp_path_factory):
  theirs, ours = _pair(parity.SD_VAES["sd-vae-f8c4"], tmp_path_factory)
  assert ours.variant == "sd-vae-f8c4"
  images = parity.random_images((1, 64, 96))
  expected = parity.reference_outputs(theirs, images)
  assert max(parity.errors(ours, images, *expected)) < 1e-4


def test_saved_folders_load_in_diffusers_with_every_bit(pair, tmp_path):
  theirs, ours = pair
  ours.save(tmp_path, layout="diffusers")
  model, report = diffusers.AutoencoderKL.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(report.values()), report
  assert model.config.scaling_factor == 0.25
  assert model.config.shift_factor == 0.5
  expected, found = theirs.state_dict(), model.state_dict()
  assert found.keys() == expected.keys()
  assert all(torch.equal(found[name], expected[name]) for name in expected)
  images = parity.random_images((1, 64, 64))
  outputs = (
    parity.reference_outputs(m.eval(), images) for m in (model, theirs)
  )
  for a, b in zip(*outputs, strict=True):
    np.testing.assert_array_equal(a, b)


def test_posterior_and_kl_divergence_equal_those_of_diffusers(pair):
  theirs, ours = pair
  images = parity.random_images((2, 32, 64))

  @jax.jit
  def posterior(variables, images):
    mean, log_variance = ours.model.apply(variables, images, method="posterior")
    _, divergences = ours.model.apply(
      variables, images, jax.random.key(0), method="reconstruct_sample"
    )
    return mean, log_variance, divergences

  found = posterior(ours.variables, images)
  with torch.no_grad():
    expected = theirs.encode(
      torch.from_numpy(images.transpose(0, 3, 1, 2))
    ).latent_dist
  for a, b in zip(found, (expected.mean, expected.logvar), strict=False):
    wanted = b.numpy().transpose(0, 2, 3, 1)
    assert parity.relative_error(a, wanted) < 1e-4
  assert parity.relative_error(found[2], expected.kl().numpy()) < 1e-4


def test_gradients_equal_those_of_diffusers(pair):
  theirs, ours = pair
  images = parity.random_images((2, 32, 64))
  signs = np.random.default_rng(1).choice([-1.0, 1.0], images.shape)
  signs = signs.astype("float32")
  to_torch = lambda x: torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
  their_images = to_torch(images).requires_grad_()
  (theirs(their_images).sample * to_torch(signs)).mean().backward()

  @jax.jit
  @jax.grad
  def gradient(images, variables):
    return jnp.mean(ours.model.apply(variables, images) * signs)

  expected = their_images.grad.numpy().transpose(0, 2, 3, 1)
  found = gradient(images, ours.variables)
  assert parity.relative_error(found, expected) < 1e-4
