"""Gradients, and batch statistics in training, against diffusers and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import dcae_jax
from benchmarks import parity


def _to_torch(x: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def _from_torch(x: torch.Tensor) -> np.ndarray:
  return x.detach().numpy().transpose(0, 2, 3, 1)


# Deepest grids of 1x3 and 6x6: attention takes its quadratic form up to 32
# positions, its linear form beyond.
@pytest.mark.parametrize(
  ("variant", "shape"),
  [
    ("f32c32", (2, 32, 96)),
    ("f32c32", (2, 192, 192)),
    ("f32c32-sana", (2, 32, 96)),
    ("f32c32-lite", (2, 32, 96)),
  ],
)
def test_gradients_equal_those_of_diffusers(variant, shape, tmp_path):
  theirs = parity.reference(parity.reduced(parity.CONFIGS[variant]))
  theirs.save_pretrained(tmp_path)
  ours = dcae_jax.load(tmp_path)
  images = parity.random_images(shape)
  # What an L1 loss would send back, had its residuals these signs. The signs of
  # a computed residual would be arbitrary where it is 0 up to rounding.
  signs = np.random.default_rng(1).choice([-1.0, 1.0], images.shape)
  signs = signs.astype("float32")
  their_images = _to_torch(images).requires_grad_()
  (theirs(their_images).sample * _to_torch(signs)).mean().backward()

  @jax.jit
  @jax.grad
  def gradient(images, variables, signs):
    return jnp.mean(ours.model.apply(variables, images) * signs)

  found = np.asarray(gradient(images, ours.variables, signs))
  # Rounding may put a ReLU's argument on the other side of 0, which changes the
  # gradient of that image by about 1e-3; without it, the error is about 1e-6.
  errors = [
    parity.relative_error(a, b)
    for a, b in zip(found, _from_torch(their_images.grad), strict=True)
  ]
  assert min(errors) < 1e-3
  assert max(errors) < 1e-2


def test_training_moves_the_batch_statistics_as_torch_does(tmp_path):
  theirs = parity.reference(parity.reduced(parity.CONFIGS["f32c32"]))
  theirs.save_pretrained(tmp_path / "before")
  ours = dcae_jax.load(tmp_path / "before")
  z = np.random.default_rng(0).normal(0, 0.5, (2, 1, 2, 8)).astype("float32")
  with torch.no_grad():
    their_y = theirs.train().decode(_to_torch(z)).sample
  theirs.save_pretrained(tmp_path / "after")
  expected = dcae_jax.load(tmp_path / "after").variables["batch_stats"]

  @jax.jit
  def decode(variables, z):
    return ours.model.apply(
      variables, z, method="decode", mutable=["batch_stats"]
    )

  y, moved = decode(ours.variables, z)
  assert parity.relative_error(y, _from_torch(their_y)) < 1e-4
  errors = jax.tree.map(
    lambda a, b: parity.relative_error(a, np.asarray(b)),
    moved["batch_stats"],
    expected,
  )
  assert len(jax.tree.leaves(errors)) == 2 * 4  # blocks with a batch norm
  assert max(jax.tree.leaves(errors)) < 1e-4, errors
