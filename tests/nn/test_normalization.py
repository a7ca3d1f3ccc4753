import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax.nn import normalization


def _randomised(module, x, seed=1):
  variables = module.init(jax.random.key(0), x)
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape), "float32"),
    variables,
  )


@pytest.fixture
def x():
  return jnp.asarray(np.random.default_rng(0).normal(2, 3, (3, 4, 5, 6)), "f4")


def test_rms_norm_equals_numpy(x):
  module = normalization.RMSNorm()
  variables = _randomised(module, x)
  p = jax.tree.map(np.asarray, variables["params"])
  a = np.asarray(x, np.float64)
  expected = a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-5)
  expected = expected * p["scale"] + p["bias"]
  np.testing.assert_allclose(
    module.apply(variables, x), expected, rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_equals_numpy(x, groups):
  module = normalization.GroupNorm(groups)
  variables = _randomised(module, x)
  p = jax.tree.map(np.asarray, variables["params"])
  small = x * 1e-3  # so that the epsilon tells
  a = np.asarray(small, np.float64).reshape(3, 20, groups, 6 // groups)
  a = a - a.mean((1, 3), keepdims=True)
  a = a / np.sqrt((a**2).mean((1, 3), keepdims=True) + 1e-6)
  expected = a.reshape(x.shape) * p["scale"] + p["bias"]
  np.testing.assert_allclose(
    module.apply(variables, small), expected, rtol=1e-4, atol=1e-4
  )


def test_batch_norm_uses_stored_statistics_where_they_are_fixed(x):
  module = normalization.BatchNorm()
  variables = _randomised(module, x)
  p = jax.tree.map(np.asarray, variables)
  mean, var = p["batch_stats"]["mean"], p["batch_stats"]["var"]
  expected = (np.asarray(x) - mean) / np.sqrt(var + 1e-5)
  expected = expected * p["params"]["scale"] + p["params"]["bias"]
  np.testing.assert_allclose(
    module.apply(variables, x), expected, rtol=1e-5, atol=1e-5
  )


def test_batch_norm_moves_towards_mean_and_unbiased_variance(x):
  module = normalization.BatchNorm()
  variables = _randomised(module, x)
  y, moved = module.apply(variables, x, mutable=["batch_stats"])
  a = np.asarray(x, np.float64).reshape(-1, 6)
  p = jax.tree.map(np.asarray, variables)
  expected = (np.asarray(x) - a.mean(0)) / np.sqrt(a.var(0) + 1e-5)
  expected = expected * p["params"]["scale"] + p["params"]["bias"]
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  old = p["batch_stats"]
  np.testing.assert_allclose(
    moved["batch_stats"]["mean"], 0.9 * old["mean"] + 0.1 * a.mean(0), rtol=1e-5
  )
  np.testing.assert_allclose(
    moved["batch_stats"]["var"],
    0.9 * old["var"] + 0.1 * a.var(0, ddof=1),
    rtol=1e-5,
  )


@pytest.mark.parametrize("name", list(normalization.NORMS))
def test_norms_compute_in_float32_and_keep_the_dtype(name):
  # 1 + 2**-7 steps: bfloat16 sums of 512 of them would be far off.
  x = jnp.ones((2, 4, 4, 512), jnp.bfloat16) * 1.0078125
  module = normalization.NORMS[name]()
  y = module.apply(module.init(jax.random.key(0), x), x)
  assert y.dtype == jnp.bfloat16
  exact = module.apply(module.init(jax.random.key(0), x), x.astype("float32"))
  np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
