import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax.autoencoder.dcae import efficientvit


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
  y = efficientvit.relu_linear_attention(q, k, v)
  np.testing.assert_allclose(y, _naive(q, k, v), rtol=1e-4, atol=1e-5)


def test_the_linear_path_never_forms_all_pairs():
  shapes = [jax.ShapeDtypeStruct((1, 64, 64, 1, 32), "float32")] * 3
  program = str(jax.make_jaxpr(efficientvit.relu_linear_attention)(*shapes))
  assert "64,64,64,64" not in program


@pytest.mark.parametrize("grid", [(4, 4), (8, 8)])
def test_dead_queries_and_keys_give_zero_and_finite_gradients(grid):
  q, k, v = _qkv(*grid)
  q = q.at[:, 0, 0].set(-1.0)  # one position
  k = k.at[:, :, :, 1].set(-1.0)  # one head, everywhere

  def total(q, k, v):
    return jnp.sum(jnp.square(efficientvit.relu_linear_attention(q, k, v)))

  y = efficientvit.relu_linear_attention(q, k, v)
  assert not jnp.any(y[:, 0, 0]) and not jnp.any(y[..., 1, :])
  for gradient in jax.grad(total, argnums=(0, 1, 2))(q, k, v):
    assert jnp.all(jnp.isfinite(gradient))


def test_attention_is_float32_under_bfloat16():
  q, k, v = (x.astype(jnp.bfloat16) for x in _qkv(16, 16))
  y = efficientvit.relu_linear_attention(q, k, v)
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, _naive(q, k, v), rtol=1e-4, atol=1e-5)


def test_each_head_owns_consecutive_query_key_value_channels():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(1, 4, 4, 64)), "float32")
  module = efficientvit.LinearAttention()
  variables = module.init(jax.random.key(0), x)
  kernel = np.asarray(variables["params"]["qkv"]["kernel"])[0, 0]
  qkv = (np.asarray(x) @ kernel).reshape(1, 4, 4, 2, 3, 32)
  y = _naive(*np.moveaxis(qkv, -2, 0)).reshape(1, 4, 4, 64)
  y = y @ np.asarray(variables["params"]["project"]["kernel"])[0, 0]
  y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(
    module.apply(variables, x), y, rtol=1e-3, atol=1e-4
  )


def test_scales_add_heads_after_the_base_ones():
  x = jnp.ones((1, 4, 4, 64))
  variables = efficientvit.LinearAttention((5,)).init(jax.random.key(0), x)
  shapes = jax.tree.map(jnp.shape, variables["params"])
  assert shapes["aggregate_0"]["kernel"] == (5, 5, 1, 192)
  assert shapes["aggregate_0_mix"]["kernel"] == (1, 1, 32, 192)
  assert shapes["project"]["kernel"] == (1, 1, 128, 64)


def test_second_half_of_the_glu_is_the_gate():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 3, 32)), "f4")
  module = efficientvit.GLUMBConv()
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
