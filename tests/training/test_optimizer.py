"""Schedules against formulas, Muon against its definition in numpy."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from dcae_jax.training import freezing, optimizer, sharding

ADAMW = dataclasses.replace(
  optimizer.Settings(**base.autoencoder().optimizer),
  learning_rate=1e-2,
  adam_learning_rate=1e-3,
  warmup_steps=0,
  clip_norm=0.0,
)
MUON = dataclasses.replace(ADAMW, kind="muon")
SHAPES = {
  "convolution": {"kernel": (3, 3, 4, 8), "bias": (8,)},
  "wide": {"kernel": (1, 1, 4, 24)},
  "depthwise": {"kernel": (3, 3, 1, 8)},
  "dense": {"kernel": (12, 5)},
  "norm": {"scale": (8,)},
  "label": {"embedding": (3, 8)},
}
MATRICES = ("convolution/kernel", "wide/kernel", "dense/kernel")


def _random(seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: rng.normal(size=shape).astype(np.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def _leaves(tree):
  paths = freezing.parameter_paths(tree)
  return dict(zip(paths, jax.tree.leaves(tree), strict=True))


def _cosine(fraction):
  return 0.1 + 0.9 * (1 + np.cos(np.pi * min(fraction, 1))) / 2


@pytest.mark.parametrize(
  ("schedule", "decay_steps", "after"),
  [
    ("constant", 0, lambda i: 1.0),
    ("cosine", 0, lambda i: _cosine(i / 90)),
    ("cosine", 40, lambda i: _cosine(i / 40)),
    ("linear", 0, lambda i: 1 - 0.9 * min(i / 90, 1)),
    ("linear", 40, lambda i: 1 - 0.9 * min(i / 40, 1)),
    ("wsd", 20, lambda i: 1 - 0.9 * min(max(i - 70, 0) / 20, 1)),
    ("wsd", 200, lambda i: 1 - 0.9 * min(i / 90, 1)),  # all after the warm-up
  ],
)
def test_rates_follow_their_formulas(schedule, decay_steps, after):
  """Of 100 steps, 10 of them a warm-up from a tenth of the rate."""
  settings = dataclasses.replace(
    ADAMW,
    schedule=schedule,
    warmup_steps=10,
    decay_steps=decay_steps,
    final_rate=0.1,
  )
  _, rate = optimizer.create(settings, steps=100)
  for step in (0, 5, 9, 10, 30, 79, 80, 81, 95, 99, 100, 1000):
    expected = after(step - 10) if step >= 10 else 0.1 + 0.9 * step / 10
    np.testing.assert_allclose(rate(step), 1e-2 * expected, rtol=1e-5)


def test_a_longer_run_with_wsd_is_the_same_until_the_decay():
  settings = dataclasses.replace(
    ADAMW, schedule="wsd", warmup_steps=10, decay_steps=20
  )
  short, long = (optimizer.create(settings, steps)[1] for steps in (100, 200))
  assert [short(i) for i in range(81)] == [long(i) for i in range(81)]
  assert short(90) < long(90)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"kind": "sgd"}, r"config\.optimizer\.kind='sgd'; known are adamw, muon"),
    ({"schedule": "step"}, r"schedule='step'; known are constant, cosine, lin"),
    ({"schedule": "wsd"}, "decay_steps=0 leaves nothing to decay"),
  ],
)
def test_what_cannot_be_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    optimizer.create(dataclasses.replace(ADAMW, **changes), steps=100)


def _orthogonal(matrix):
  """Five Newton-Schulz iterations, as Muon's author has them."""
  a, b, c = 3.4445, -4.7750, 2.0315
  x = matrix.astype(np.float64)
  x = x / np.linalg.norm(x)
  for _ in range(5):
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x


def test_muon_steps_along_orthogonal_matrices_and_adam_does_the_rest():
  """Two steps of gradients that are clipped to a norm of one."""
  settings = dataclasses.replace(MUON, clip_norm=1.0, weight_decay=0.5)
  transformation, _ = optimizer.create(settings, steps=100)
  params = _random(0)
  state = jax.jit(transformation.init)(params)
  expected = _leaves(params)
  momentum = {name: np.zeros_like(x) for name, x in expected.items()}
  square = {name: np.zeros_like(x) for name, x in expected.items()}
  for step in (1, 2):
    gradient = _random(step)
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(gradient)))
    updates, state = jax.jit(transformation.update)(gradient, state, params)
    params = optax.apply_updates(params, updates)
    for name, g in _leaves(gradient).items():
      g = g / norm
      beta = 0.95 if name in MATRICES else 0.9
      momentum[name] = m = beta * momentum[name] + (1 - beta) * g
      old = expected[name]
      decay = 0.5 * old if name.endswith("kernel") else 0.0
      if name in MATRICES:  # with Nesterov's look ahead
        ahead = 0.95 * m / (1 - 0.95 ** (step + 1))
        ahead = ahead + 0.05 * g / (1 - 0.95**step)
        matrix = _orthogonal(ahead.reshape(-1, g.shape[-1]))
        scale = np.sqrt(max(1, matrix.shape[1] / matrix.shape[0]))
        direction = scale * matrix.reshape(g.shape)
        expected[name] = old - 1e-2 * (direction + decay)
      else:
        square[name] = v = 0.999 * square[name] + 0.001 * g**2
        m, v = m / (1 - 0.9**step), v / (1 - 0.999**step)
        direction = m / (np.sqrt(v) + 1e-8)
        expected[name] = old - 1e-3 * (direction + decay)
  for name, found in _leaves(params).items():
    np.testing.assert_allclose(
      found, expected[name], rtol=1e-4, atol=2e-6, err_msg=name
    )


@pytest.mark.parametrize("settings", [ADAMW, MUON], ids=lambda x: x.kind)
@pytest.mark.parametrize("decay_all", [False, True])
def test_kernels_decay_and_all_else_if_it_is_wanted(settings, decay_all):
  settings = dataclasses.replace(
    settings, weight_decay=0.5, decay_all=decay_all
  )
  transformation, _ = optimizer.create(settings, steps=100)
  params = _random(0)
  zeros = jax.tree.map(np.zeros_like, params)
  state = jax.jit(transformation.init)(params)
  updates, _ = jax.jit(transformation.update)(zeros, state, params)
  for name, update in _leaves(updates).items():
    rate = 1e-2 if settings.kind == "adamw" or name in MATRICES else 1e-3
    decays = decay_all or name.endswith("kernel")
    expected = -rate * 0.5 * decays * _leaves(params)[name]
    np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-9)


def test_the_discriminator_has_adamw_with_its_own_rate():
  """Without one, that of what Adam updates in the autoencoder."""
  for settings, rate, expected in (
    (ADAMW, 0.0, 1e-2),
    (ADAMW, 3e-4, 3e-4),
    (MUON, 0.0, 1e-3),
    (MUON, 3e-4, 3e-4),
  ):
    found = optimizer.of_discriminator(settings, rate)
    assert found == dataclasses.replace(ADAMW, learning_rate=expected)


def test_matrices_are_gathered_once_and_orthogonalised_whole():
  """The compiled program: XLA alone would exchange parts of each product."""
  mesh = sharding.create_mesh(2, 4, 1)
  transformation, _ = optimizer.create(
    MUON, 100, sharding.on_whole_arrays(mesh)
  )
  params = {"a": {"kernel": jax.ShapeDtypeStruct((3, 3, 16, 64), jnp.float32)}}
  state = jax.eval_shape(transformation.init, params)
  placed = sharding.shardings(params, mesh), sharding.shardings(state, mesh)
  assert placed[0]["a"]["kernel"].spec[-1] == "fsdp"
  split = [x for x in jax.tree.leaves(placed[1]) if "fsdp" in x.spec]
  assert len(split) == 1  # the momentum

  def step(params, state, gradient):
    updates, state = transformation.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  jitted = jax.jit(
    step, in_shardings=(*placed, placed[0]), out_shardings=placed
  )
  program = jitted.lower(params, state, params).compile().as_text()
  moves = re.findall(
    r" (all-gather|all-reduce|all-to-all|collective-permute)\(", program
  )
  assert moves == ["all-gather"] * 2  # the gradient and its momentum
