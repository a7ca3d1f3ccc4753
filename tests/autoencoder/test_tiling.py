import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax.autoencoder import tiling


def _apply(tile, stride, shape, f=jnp.asarray):
  x = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype("float32")
  tiles = tiling.Tiles.create(tile, stride, 8)
  y = tiles.apply(f, x, source_unit=8, result_unit=8)
  return x, np.asarray(y)


@pytest.mark.parametrize(
  ("tile", "stride"), [(32, None), (32, 8), (32, 24), (32, 32), (16, 16)]
)
@pytest.mark.parametrize("shape", [(32, 32), (40, 96), (104, 24), (72, 72)])
def test_tiles_of_the_identity_are_the_image(tile, stride, shape):
  x, y = _apply(tile, stride, shape)
  np.testing.assert_allclose(y, x, rtol=0, atol=1e-6)


def test_tiles_change_the_unit():
  x = np.random.default_rng(0).normal(size=(1, 64, 96, 3)).astype("float32")
  every = lambda part: part[:, ::8, ::8]
  y = tiling.Tiles.create(32, 16, 8).apply(every, x, 8, 1)
  np.testing.assert_allclose(np.asarray(y), every(x), rtol=0, atol=1e-6)
  back = lambda part: part.repeat(8, 1).repeat(8, 2)
  z = np.asarray(every(x))
  y = tiling.Tiles.create(32, 16, 8).apply(back, z, 1, 8)
  np.testing.assert_allclose(np.asarray(y), back(z), rtol=0, atol=1e-6)


def test_all_tiles_have_one_shape_and_cover_the_overlap():
  shapes = set()

  def number(x):
    shapes.add(x.shape)
    return np.full_like(x, len(shapes))

  _apply(32, 24, (72, 200), number)
  assert shapes == {(2, 32, 32, 3)}


def test_seams_are_blended_linearly():
  values = iter([0.0, 1.0])
  constant = lambda x: np.full_like(x, next(values))
  _, y = _apply(32, 16, (32, 48), constant)
  ramp = y[0, 0, :, 0]
  np.testing.assert_array_equal(ramp[:16], 0)
  np.testing.assert_array_equal(ramp[32:], 1)
  np.testing.assert_allclose(np.diff(ramp[16:32]), 1 / 16, atol=1e-6)


@pytest.mark.parametrize(
  ("tile", "stride", "message"),
  [
    (20, None, "tile=20 is not a multiple of 8"),
    (0, None, "tile=0"),
    (32, 12, "stride=12 is not a multiple of 8"),
    (32, 40, "gaps"),
    (None, 8, "needs tile="),
  ],
)
def test_bad_tiles_are_refused(tile, stride, message):
  with pytest.raises(ValueError, match=message):
    tiling.Tiles.create(tile, stride, 8)
