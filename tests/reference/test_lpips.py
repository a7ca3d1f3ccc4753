"""LPIPS against the PyPI package `lpips`: the same distances and gradients.

The linear heads are each package's own. The package takes its feature networks
from torchvision, which a stand-in replaces: torchvision's layers with the
convolutions that `load_parameters` returns.
"""

import importlib
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dcae_jax.evaluation.networks import lpips

THEIR_NAMES = {"vgg16": "vgg", "alexnet": "alex"}

# torchvision's `features`: (channels, kernel size, stride, padding) of a
# convolution with a ReLU after it; (window, stride) of a max pooling.
LAYERS = {
  "vgg16": [
    *[(64, 3, 1, 1)] * 2,
    (2, 2),
    *[(128, 3, 1, 1)] * 2,
    (2, 2),
    *[(256, 3, 1, 1)] * 3,
    (2, 2),
    *[(512, 3, 1, 1)] * 3,
    (2, 2),
    *[(512, 3, 1, 1)] * 3,
    (2, 2),
  ],
  "alexnet": [
    (64, 11, 4, 2),
    (3, 2),
    (192, 5, 1, 2),
    (3, 2),
    (384, 3, 1, 1),
    (256, 3, 1, 1),
    (256, 3, 1, 1),
    (3, 2),
  ],
}


def _backbone(network: str) -> types.SimpleNamespace:
  """What `torchvision.models.<network>(pretrained=True)` would return."""
  parameters = lpips.load_parameters(network)
  layers, channels, i = [], 3, 0
  for layer in LAYERS[network]:
    if len(layer) == 2:
      layers.append(torch.nn.MaxPool2d(*layer))
      continue
    convolution = torch.nn.Conv2d(channels, *layer)
    kernel = parameters[f"conv_{i}/kernel"].transpose(3, 2, 0, 1)
    convolution.load_state_dict(
      {
        "weight": torch.from_numpy(kernel.copy()),
        "bias": torch.from_numpy(parameters[f"conv_{i}/bias"].copy()),
      }
    )
    layers += [convolution, torch.nn.ReLU(inplace=True)]
    channels, i = layer[0], i + 1
  return types.SimpleNamespace(features=torch.nn.Sequential(*layers))


@pytest.fixture
def package(monkeypatch):
  """The package `lpips`, imported where torchvision is the stand-in."""
  torchvision = types.ModuleType("torchvision")
  torchvision.models = types.ModuleType("torchvision.models")
  for network in lpips.NETWORKS:
    create = lambda pretrained, network=network: _backbone(network)
    setattr(torchvision.models, network, create)
  monkeypatch.setitem(sys.modules, "torchvision", torchvision)
  monkeypatch.setitem(sys.modules, "torchvision.models", torchvision.models)
  return importlib.import_module("lpips")


@pytest.mark.parametrize("network", lpips.NETWORKS)
def test_distance_and_gradient_equal_the_package_lpips(network, package):
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (2, 50, 67, 3)).astype("float32")
  others = rng.uniform(-1, 1, images.shape).astype("float32")
  others[1] = np.clip(images[1] + rng.normal(0, 0.1, images[1].shape), -1, 1)

  theirs = package.LPIPS(net=THEIR_NAMES[network], verbose=False)
  a, b = (
    torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (images, others)
  )
  expected = theirs(a.requires_grad_(), b)[:, 0, 0, 0]
  expected.sum().backward()
  expected_gradient = a.grad.numpy().transpose(0, 2, 3, 1)

  def total(images, others, parameters):
    distances = lpips.distance(parameters, images, others, network)
    return jnp.sum(distances), distances

  gradient, found = jax.jit(jax.grad(total, has_aux=True))(
    jnp.asarray(images), jnp.asarray(others), lpips.load_parameters(network)
  )
  np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4)
  for ours, theirs in zip(gradient, expected_gradient, strict=True):
    difference = np.linalg.norm(ours - theirs)
    assert difference < 1e-3 * np.linalg.norm(theirs)
