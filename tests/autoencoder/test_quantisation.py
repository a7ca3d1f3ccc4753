import jax.numpy as jnp
import numpy as np

from dcae_jax.autoencoder import quantisation


def test_quantise_rounds_and_clips():
  x = jnp.array([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]).reshape(1, 1, 6, 1)
  expected = [0, 0, 128, 191, 255, 255]
  np.testing.assert_array_equal(quantisation.quantise(x)[0, 0, :, 0], expected)
