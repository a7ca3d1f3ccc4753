import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax.nn import transformer


def _random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_patches_go_back_to_where_they_were(patch_size):
  z = _random(2, 6, 12, 5)
  tokens = transformer.to_patches(z, patch_size)
  assert tokens.shape == (2, 72 // patch_size**2, 5 * patch_size**2)
  again = transformer.from_patches(tokens, 6, 12, patch_size)
  np.testing.assert_array_equal(again, z)


def test_a_patch_holds_its_square_of_positions():
  z = _random(1, 4, 6, 5)
  token = transformer.to_patches(z, 2)[0, 4]  # second row, second column
  np.testing.assert_array_equal(token, z[0, 2:4, 2:4].reshape(-1))


def test_time_features_turn_at_geometric_frequencies():
  features = transformer.time_features(jnp.array([0.0, 1.0, 500.5]), 8)
  cosines, sines = jnp.split(features, 2, axis=-1)
  np.testing.assert_array_equal(cosines[0], np.ones(4))
  np.testing.assert_array_equal(sines[0], np.zeros(4))
  angles = np.array([1.0, 0.1, 0.01, 0.001])
  np.testing.assert_allclose(cosines[1], np.cos(angles), atol=1e-6)
  np.testing.assert_allclose(sines[2], np.sin(500.5 * angles), atol=1e-4)


def test_attention_is_float32_whatever_comes_in():
  """Scores of a thousand, of which bfloat16 would round units away."""
  q, k, v = (_random(2, 3, 9, 16, seed=i).astype("bfloat16") for i in range(3))
  q = 40 * q
  exact = [np.asarray(x, "float64") for x in (q, k, v)]
  scores = exact[0] @ exact[1].swapaxes(2, 3) / 4
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  expected = weights @ exact[2]
  found = transformer.attention(q, k, v)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_attentions_products_are_not_left_to_the_hardwares_default():
  x = _random(1, 2, 3, 4)
  program = jax.make_jaxpr(transformer.attention)(x, x, x)
  products = _products(program.jaxpr)
  assert len(products) == 2
  for product in products:
    precisions = {p.name for p in product.params["precision"]}
    assert precisions == {"HIGH"}


def _products(jaxpr):
  """The matrix products of a program, those in its parts too."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      found.append(equation)
    if "jaxpr" in equation.params:
      found += _products(equation.params["jaxpr"].jaxpr)
  return found


def test_normalised_tokens_keep_small_differences_beside_a_large_mean():
  x = _random(2, 3, 64)
  found = transformer.normalized(x + 1000, 1e-6)
  np.testing.assert_allclose(
    found, transformer.normalized(x, 1e-6), rtol=0, atol=1e-3
  )
  np.testing.assert_allclose(jnp.mean(found, -1), np.zeros((2, 3)), atol=1e-3)
  np.testing.assert_allclose(jnp.var(found, -1), np.ones((2, 3)), rtol=1e-4)


def test_bias_gradients_of_bfloat16_count_every_token():
  layer = transformer.Linear(2, dtype="bfloat16")
  x = jnp.ones((3, 1001, 4))
  variables = layer.init(jax.random.key(0), x)
  loss = lambda v: jnp.sum(layer.apply(v, x).astype("float32"))
  gradient = jax.grad(loss)(variables)["params"]
  np.testing.assert_array_equal(gradient["bias"], [3003.0, 3003.0])
  assert gradient["bias"].dtype == jnp.float32


def test_layers_multiply_in_their_dtype():
  layer = transformer.Linear(8, dtype="bfloat16")
  x = _random(2, 3, 16)
  y, variables = layer.init_with_output(jax.random.key(0), x)
  assert y.dtype == jnp.bfloat16
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
  program = jax.make_jaxpr(layer.apply)(variables, x)
  (product,) = _products(program.jaxpr)
  assert {v.aval.dtype.name for v in product.invars} == {"bfloat16"}


def test_masked_attention_is_that_to_the_tokens_left():
  q = _random(2, 3, 5, 8)
  k, v = _random(2, 3, 7, 8, seed=1), _random(2, 3, 7, 8, seed=2)
  mask = jnp.array([[1, 0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]], bool)
  found = transformer.attention(q, k, v, mask)
  left = transformer.attention(q, k[:, :, [0, 2, 3]], v[:, :, [0, 2, 3]])
  np.testing.assert_allclose(found[0], left[0], rtol=1e-5, atol=1e-6)
  whole = transformer.attention(q, k, v)
  np.testing.assert_allclose(found[1], whole[1], rtol=1e-5, atol=1e-6)


def test_attention_to_nothing_is_zero_with_finite_gradients():
  q, k, v = (_random(2, 3, 4, 8, seed=i) for i in range(3))
  mask = jnp.array([[False] * 4, [True] * 4])
  total = lambda *x: jnp.sum(jnp.square(transformer.attention(*x, mask)))
  assert not jnp.any(transformer.attention(q, k, v, mask)[0])
  for gradient in jax.grad(total, (0, 1, 2))(q, k, v):
    assert not jnp.any(gradient[0])
    assert jnp.all(jnp.isfinite(gradient)) and jnp.any(gradient[1])


def test_rms_norm_scales_the_root_mean_square_to_one():
  x = _random(2, 3, 64)
  norm = transformer.RMSNorm(1e-6)
  variables = {"params": {"scale": jnp.full(64, 2.0)}}
  y = norm.apply(variables, 5 * x.astype("bfloat16"))
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(jnp.mean(y**2, -1), np.full((2, 3), 4), rtol=1e-3)
