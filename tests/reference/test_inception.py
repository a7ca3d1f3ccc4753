"""Inception-v3 against the network of the package `pytorch-fid`."""

import jax
import pytest

from benchmarks import metric_networks
from dcae_jax.evaluation.networks import inception


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """Their network and ours, with the same random tensors."""
  folder = tmp_path_factory.mktemp("weights")
  path = metric_networks.random_file("inception", folder)
  parameters = inception.load(path).parameters
  features = jax.jit(inception.features)
  return (
    metric_networks.reference("inception"),
    lambda images: features(parameters, images),
  )


@pytest.mark.parametrize("shape", metric_networks.SHAPES)
def test_features_and_logits_equal_pytorch_fid(shape, pair):
  theirs, ours = pair
  images = metric_networks.random_images(shape)
  for found, expected in zip(ours(images), theirs(images), strict=True):
    assert metric_networks.error(found, expected) < 1e-5
