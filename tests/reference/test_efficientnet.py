"""EfficientNet-Lite0 against the package `efficientnet-lite-pytorch`."""

import jax
import pytest

from benchmarks import metric_networks
from dcae_jax.evaluation.networks import efficientnet


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """Their network and ours, with the same random tensors."""
  folder = tmp_path_factory.mktemp("weights")
  path = metric_networks.random_file("efficientnet", folder)
  parameters = efficientnet.load(path).parameters
  features = jax.jit(efficientnet.features)
  return (
    metric_networks.reference("efficientnet"),
    lambda images: features(parameters, images),
  )


@pytest.mark.parametrize("shape", metric_networks.SHAPES)
def test_features_equal_the_package(shape, pair):
  theirs, ours = pair
  images = metric_networks.random_images(shape)
  (expected,) = theirs(images)
  assert metric_networks.error(ours(images), expected) < 1e-5
