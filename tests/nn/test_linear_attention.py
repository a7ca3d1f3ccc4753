import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax.nn import linear_attention


def _qkv(height, width, heads=2, seed=0):
  rng = np.random.default_rng(seed)
  shape = (2, height, width, heads, 32)
  return [jnp.asarray(rng.normal(size=shape), "float32") for _ in range(3)]


def _naive(q, k, v):
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  b, h, w, n, d = q.shape
  q, k, v = (a.reshape(b, h * w, n, d) for a in (q, k, v))
  scores = np.einsum("bind,bjnd->bnij", np.maximum(q, 0), np.maximum(k, 0))
  scores = scores / (scores.sum(-1, keepdims=True) + 1e-15)
  return np.einsum("bnij,bjnd->bind", scores, v).reshape(b, h, w, n, d)


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (4, 8), (3, 11), (8, 9)])
def test_attention_equals_the_quadratic_definition(grid):
  q, k, v = _qkv(*grid)
  y = linear_attention.relu_linear_attention(q, k, v)
  np.testing.assert_allclose(y, _naive(q, k, v), rtol=1e-4, atol=1e-5)


def test_the_linear_path_never_forms_all_pairs():
  shapes = [jax.ShapeDtypeStruct((1, 64, 64, 1, 32), "float32")] * 3
  program = str(jax.make_jaxpr(linear_attention.relu_linear_attention)(*shapes))
  assert "64,64,64,64" not in program


@pytest.mark.parametrize("grid", [(4, 4), (8, 8)])
def test_dead_queries_and_keys_give_zero_and_finite_gradients(grid):
  q, k, v = _qkv(*grid)
  q = q.at[:, 0, 0].set(-1.0)  # one position
  k = k.at[:, :, :, 1].set(-1.0)  # one head, everywhere

  def total(q, k, v):
    return jnp.sum(jnp.square(linear_attention.relu_linear_attention(q, k, v)))

  y = linear_attention.relu_linear_attention(q, k, v)
  assert not jnp.any(y[:, 0, 0]) and not jnp.any(y[..., 1, :])
  for gradient in jax.grad(total, argnums=(0, 1, 2))(q, k, v):
    assert jnp.all(jnp.isfinite(gradient))


def test_attention_is_float32_under_bfloat16():
  q, k, v = (x.astype(jnp.bfloat16) for x in _qkv(16, 16))
  y = linear_attention.relu_linear_attention(q, k, v)
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, _naive(q, k, v), rtol=1e-4, atol=1e-5)


def test_second_half_of_the_glu_is_the_gate():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 3, 32)), "f4")
  module = linear_attention.GLUMBConv(128)
  variables = module.init(jax.random.key(0), x)
  params = jax.tree.map(jnp.zeros_like, variables["params"])
  centre = params["depthwise"]["kernel"].at[1, 1].set(1.0)
  params["depthwise"]["kernel"] = centre
  params["inverted"] = variables["params"]["inverted"]
  params["point"] = variables["params"]["point"]
  params["norm"]["scale"] = jnp.ones(32)
  hidden = np.asarray(x) @ np.asarray(params["inverted"]["kernel"])[0, 0]
  hidden = hidden + np.asarray(params["inverted"]["bias"])
  hidden = np.asarray(jax.nn.silu(hidden))
  y = hidden[..., :128] * np.asarray(jax.nn.silu(hidden[..., 128:]))
  y = y @ np.asarray(params["point"]["kernel"])[0, 0]
  y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
  found = module.apply({"params": params}, x)
  np.testing.assert_allclose(found, y, rtol=1e-3, atol=1e-4)


def test_without_its_norm_the_glu_gives_what_it_would_normalise():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 3, 32)), "f4")
  module = linear_attention.GLUMBConv(40)
  y, variables = module.init_with_output(jax.random.key(0), x)
  params = dict(variables["params"])
  del params["norm"]
  plain = linear_attention.GLUMBConv(40, norm=False)
  found = plain.apply({"params": params}, x)
  found = found / jnp.sqrt(jnp.mean(found**2, -1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-6)
