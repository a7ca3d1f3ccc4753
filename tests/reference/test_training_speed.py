"""Both sides of `benchmarks.training_speed` take the same steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import dcae_jax
from benchmarks import parity, training_speed


def _discriminator(modules: torch.nn.Module) -> dict:
  """Our parameters with the values of theirs."""
  parameters = {}
  for name, x in modules.named_parameters():
    module, leaf = name.split(".")
    x = x.detach().numpy().copy()
    if leaf == "weight":
      leaf = "kernel" if x.ndim > 1 else "scale"
      x = x.transpose(2, 3, 1, 0) if x.ndim > 1 else x
    parameters.setdefault(module, {})[leaf] = jnp.array(x)
  return parameters


def _load(model, folder):
  model.save_pretrained(folder)
  return jax.tree.map(jnp.array, dcae_jax.load(folder).variables)


def _assert_moved_alike(found, expected, start):
  """Parameters and batch statistics, by how far they are from the start."""
  moves = [
    jnp.concatenate([x.ravel() for x in jax.tree.leaves(move)])
    for move in (
      jax.tree.map(jnp.subtract, found, start),
      jax.tree.map(jnp.subtract, expected, start),
    )
  ]
  assert float(jnp.linalg.norm(moves[1])) > 0
  assert parity.relative_error(moves[0], np.asarray(moves[1])) < 0.05


@pytest.mark.parametrize("phase", training_speed.PHASES)
def test_both_sides_take_the_same_steps(phase, tmp_path):
  """In phase 1 in both layouts of theirs."""
  case = training_speed.Case("tiny-f8", phase, 8, 64)
  initial, train = training_speed.jax_training(case)
  for layout in training_speed.LAYOUTS if phase == 1 else ("contiguous",):
    # A copy, as the step's arguments are donated.
    state = jax.tree.map(jnp.copy, initial)
    _check_steps(case, layout, state, train, tmp_path / layout)


def _check_steps(case, layout, state, train, folder):
  architecture = training_speed.architecture(case.variant)
  theirs = training_speed.TorchTraining(case, architecture, layout)
  start = _load(theirs.model, folder / "start")
  copy = lambda: jax.tree.map(jnp.copy, start)
  state = state.replace(**copy(), ema=copy())
  if case.phase == 3:
    state = state.replace(discriminator=_discriminator(theirs.discriminator))
  for step in range(4):
    state, metrics = train(state, jnp.array(case.images))
    for name, expected in theirs.step(torch.from_numpy(case.images)).items():
      error = f"{name} of step {step}"
      np.testing.assert_allclose(
        metrics[f"loss/{name}"], expected, rtol=2e-4, atol=1e-5, err_msg=error
      )
  after = _load(theirs.model, folder / "after")
  for part in ("params", "batch_stats"):
    if part == "params" or case.phase == 1:
      _assert_moved_alike(state.variables[part], after[part], start[part])
  with torch.no_grad():
    for value, average in zip(theirs.averaged, theirs.averages, strict=True):
      value.copy_(average)
  averages = _load(theirs.model, folder / "averages")
  for part in ("params", "batch_stats"):
    if part == "params" or case.phase == 1:
      _assert_moved_alike(state.ema[part], averages[part], start[part])
