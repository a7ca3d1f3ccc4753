import jax
import jax.numpy as jnp
import numpy as np

from dcae_jax.autoencoder.dcae import efficientvit


def _naive(q, k, v):
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  b, h, w, n, d = q.shape
  q, k, v = (a.reshape(b, h * w, n, d) for a in (q, k, v))
  scores = np.einsum("bind,bjnd->bnij", np.maximum(q, 0), np.maximum(k, 0))
  scores = scores / (scores.sum(-1, keepdims=True) + 1e-15)
  return np.einsum("bnij,bjnd->bind", scores, v).reshape(b, h, w, n, d)


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
