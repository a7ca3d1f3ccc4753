import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax.autoencoder.dcae import residual_autoencoding as ra


def _images(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


@pytest.mark.parametrize("factor", [2, 3])
def test_channel_to_space_inverts_space_to_channel(factor):
  x = _images(2, 6, 12, 5)
  y = ra.space_to_channel(x, factor)
  assert y.shape == (2, 6 // factor, 12 // factor, 5 * factor**2)
  np.testing.assert_array_equal(ra.channel_to_space(y, factor), x)


def test_space_goes_to_channels_channel_major():
  x = np.asarray(_images(1, 4, 6, 3))
  y = np.asarray(ra.space_to_channel(jnp.asarray(x)))
  for c in range(3):
    for i in range(2):
      for j in range(2):
        np.testing.assert_array_equal(
          y[..., c * 4 + i * 2 + j], x[:, i::2, j::2, c]
        )


def test_average_is_over_consecutive_channels_and_duplicate_repeats_them():
  x = jnp.arange(6.0).reshape(1, 1, 1, 6)
  np.testing.assert_allclose(
    ra.channel_average(x, 3)[0, 0, 0], [0.5, 2.5, 4.5], rtol=0, atol=0
  )
  np.testing.assert_array_equal(
    ra.channel_duplicate(x[..., :2], 6)[0, 0, 0], [0, 0, 0, 1, 1, 1]
  )


def test_average_after_duplicate_is_the_identity():
  x = _images(2, 3, 3, 4)
  y = ra.channel_average(ra.channel_duplicate(x, 16), 4)
  np.testing.assert_allclose(y, x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["space_to_channel", "strided"])
def test_downsample_with_zeroed_path_is_the_averaging_shortcut(kind):
  x = _images(2, 4, 6, 8)
  module = ra.Downsample(16, kind)
  variables = jax.tree.map(jnp.zeros_like, module.init(jax.random.key(0), x))
  y = np.asarray(module.apply(variables, x))
  # Doubling channels: pairs of neighbours in a row, one output per row.
  x = np.asarray(x)
  for c in range(8):
    for i in range(2):
      expected = (x[:, i::2, 0::2, c] + x[:, i::2, 1::2, c]) / 2
      np.testing.assert_allclose(y[..., 2 * c + i], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["channel_to_space", "nearest"])
def test_upsample_with_zeroed_path_is_the_duplicating_shortcut(kind):
  x = _images(2, 3, 2, 8)
  module = ra.Upsample(4, kind)
  variables = jax.tree.map(jnp.zeros_like, module.init(jax.random.key(0), x))
  y = np.asarray(module.apply(variables, x))
  x = np.asarray(x)
  for k in range(4):
    for i in range(2):
      for j in range(2):
        np.testing.assert_array_equal(y[:, i::2, j::2, k], x[..., 2 * k + i])


def test_shortcuts_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="from 6 to 4"):
    ra.channel_average(_images(1, 2, 2, 6), 4)
  with pytest.raises(ValueError, match="from 6 to 9"):
    ra.channel_duplicate(_images(1, 2, 2, 6), 9)


def test_strided_convolution_pads_both_sides():
  x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(1.0)
  module = ra.Downsample(1, "strided", residual_autoencoding=False)
  variables = module.init(jax.random.key(0), x)
  y = module.apply(variables, x) - module.apply(variables, jnp.zeros_like(x))
  centre = variables["params"]["conv"]["kernel"][1, 1, 0, 0]
  np.testing.assert_allclose(y[0, 0, 0, 0], centre, rtol=1e-6)
