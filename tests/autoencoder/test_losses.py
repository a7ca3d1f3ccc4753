import jax
import jax.numpy as jnp
import numpy as np

from dcae_jax.autoencoder import losses


def _arrays(n, shape=(2, 4, 4, 1)):
  rng = np.random.default_rng(0)
  return [rng.normal(size=shape).astype("float32") for _ in range(n)]


def test_l1_is_the_mean_absolute_difference():
  a, b = _arrays(2)
  found = losses.l1(jnp.asarray(a, jnp.bfloat16), jnp.asarray(b))
  assert found.dtype == jnp.float32
  a = np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)
  np.testing.assert_allclose(found, np.abs(a - b).mean(), rtol=1e-6)


def test_kl_is_the_mean_divergence_over_the_values_of_an_image():
  images = jnp.zeros((2, 4, 5, 3))
  found = losses.kl(jnp.array([30.0, 90.0]), images)
  np.testing.assert_allclose(found, 60 / (4 * 5 * 3), rtol=1e-6)


def test_hinge_losses_equal_numpy():
  real, fake = _arrays(2)
  expected = (np.maximum(1 - real, 0) + np.maximum(1 + fake, 0)).mean() / 2
  found = losses.hinge_discriminator(jnp.asarray(real), jnp.asarray(fake))
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  found = losses.hinge_generator(jnp.asarray(fake))
  np.testing.assert_allclose(found, -fake.mean(), rtol=1e-5)


def test_adaptive_weight_is_the_clipped_ratio_without_gradient():
  a, b = _arrays(2)
  expected = np.linalg.norm(a) / (np.linalg.norm(b) + 1e-4)
  found = losses.adaptive_weight(jnp.asarray(a), jnp.asarray(b))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  zero = jnp.zeros(3)
  assert losses.adaptive_weight(jnp.ones(3) * 1e9, zero) == 1e4
  assert losses.adaptive_weight(zero, zero) == 0
  gradient = jax.grad(lambda x: losses.adaptive_weight(x, x + 1))(zero)
  assert not jnp.any(gradient)
