import jax
import jax.numpy as jnp
import numpy as np
import numpy_denoisers
import pytest

from dcae_jax.diffusion import conditioning
from dcae_jax.diffusion.denoisers import dit, pixart
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.training import freezing

FIELDS = {"depth": 2, "hidden": 48, "heads": 3}


def _create(fields=None, **changes):
  settings = {
    "latent_size": (4, 6),
    "latent_channels": 5,
    "conditioning": conditioning.Captions(6, 20),
    "learn_sigma": True,
  }
  variant = denoisers.Variant("PixArt", FIELDS | (fields or {}))
  return denoisers.create(variant, **settings | changes)


@pytest.fixture(scope="module")
def small():
  """With random values everywhere, and inputs."""
  model = _create({"size_conditions": True})
  variables = numpy_denoisers.random_variables(model)
  inputs = numpy_denoisers.random_inputs(model)
  return model, jax.jit(model.apply), variables, inputs


@pytest.mark.parametrize(
  ("latents", "size_conditions", "parameters"),
  [
    ((64, 4, 2), False, 610_856_096),
    ((16, 32, 1), False, 610_911_424),
    ((128, 4, 2), True, 611_349_152),
    ((32, 32, 1), True, 611_404_480),
  ],
)
def test_parameter_counts_are_the_published_ones(
  latents, size_conditions, parameters
):
  """Besides the null caption, which the authors do not count."""
  size, channels, patch_size = latents
  fields = pixart.SIZES["XL"] | {"size_conditions": size_conditions}
  model = denoisers.create(
    denoisers.Variant("PixArt", fields),
    latent_size=size,
    latent_channels=channels,
    patch_size=patch_size,
    conditioning=conditioning.Captions(120, 4096),
    learn_sigma=True,
  )
  params = denoisers.abstract_variables(model)["params"]
  assert params.pop("null_caption").shape == (120, 4096)
  assert freezing.count(params) == parameters


def test_tokens_that_the_mask_leaves_out_do_not_matter(small):
  _, apply, variables, (z, t, condition) = small
  y = apply(variables, z, t, condition)
  mask = condition["mask"][..., None]
  for value, where in ((1000.0, ~mask), (0.5, mask)):
    states = jnp.where(where, value, condition["states"])
    other = apply(variables, z, t, condition | {"states": states})
    seen = jnp.max(jnp.abs(other - y)[:2])  # the last one is the null caption
    assert seen == 0 if value == 1000 else seen > 1e-3


def test_the_null_caption_replaces_states_under_the_same_mask(small):
  _, apply, variables, (z, t, condition) = small
  null = variables["params"]["null_caption"]
  states = condition["states"].at[2].set(null)
  given = condition | {"states": states, "is_null": jnp.zeros(3, bool)}
  y = apply(variables, z, t, condition)
  np.testing.assert_array_equal(apply(variables, z, t, given), y)
  mask = condition["mask"].at[2].set(True)
  longer = apply(variables, z, t, condition | {"mask": mask})
  assert jnp.max(jnp.abs(longer - y)[2]) > 1e-3


def test_shorter_captions_are_taken_and_longer_ones_refused(small):
  _, apply, variables, (z, t, condition) = small
  y = apply(variables, z, t, condition)
  short = {key: condition[key][:, :4] for key in ("states", "mask")}
  np.testing.assert_allclose(
    apply(variables, z, t, condition | short), y, rtol=0, atol=1e-4
  )
  states = jnp.zeros((3, 7, 20))
  with pytest.raises(ValueError, match="7 tokens of 20 channels; this model"):
    apply(variables, z, t, condition | {"states": states})
  with pytest.raises(ValueError, match="6 tokens of 19 channels; this model"):
    states = condition["states"][..., 1:]
    apply(variables, z, t, condition | {"states": states})


def test_an_empty_mask_leaves_values_and_gradients_finite(small):
  model, _, variables, (z, t, condition) = small
  condition = condition | {"mask": condition["mask"].at[0].set(False)}

  def loss(variables, states):
    y = model.apply(variables, z, t, condition | {"states": states})
    return jnp.sum(jnp.square(y))

  found, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(
    variables, condition["states"]
  )
  assert jnp.isfinite(found)
  for gradient in jax.tree.leaves(gradients):
    assert jnp.all(jnp.isfinite(gradient))
  assert not jnp.any(gradients[1][0]) and jnp.any(gradients[1][1])


@pytest.mark.parametrize("size", [(4, 6), (6, 4), (12, 2)])
def test_positions_of_all_grids_span_the_same_square(size):
  """A grid twice as fine has the coarse one's places in every second row."""
  found = pixart.positions(size, (4, 6), 16, 2.0).reshape(*size, 16)
  fine = (2 * size[0], 2 * size[1])
  finer = pixart.positions(fine, (4, 6), 16, 2.0).reshape(*fine, 16)
  np.testing.assert_allclose(finer[::2, ::2], found, rtol=0, atol=1e-6)
  dense = pixart.positions((4, 6), (4, 6), 16, 2.0).reshape(4, 6, 16)
  every_second = dense[::2, ::2].reshape(6, 16)
  np.testing.assert_array_equal(every_second, dit.positions(2, 3, 16))
  same = pixart.positions((4, 6), (4, 6), 16, 1.0)
  np.testing.assert_array_equal(same, dit.positions(4, 6, 16))


def test_latents_of_other_sizes_need_no_other_parameters(small):
  model, apply, variables, _ = small
  inputs = numpy_denoisers.random_inputs(model, latent_size=(6, 2))
  assert apply(variables, *inputs).shape == (3, 6, 2, 10)


def test_images_are_as_large_as_their_latents_unless_told():
  model = _create({"size_conditions": True}, spatial_compression=32)
  variables = numpy_denoisers.random_variables(model)
  z, t, condition = numpy_denoisers.random_inputs(model)
  apply = jax.jit(model.apply)
  y = apply(variables, z, t, condition)
  sizes = {
    "resolution": jnp.tile(jnp.array([[128.0, 192.0]]), (3, 1)),
    "aspect_ratio": jnp.full((3, 1), 2 / 3),
  }
  found = apply(variables, z, t, condition | sizes)
  np.testing.assert_allclose(found, y, rtol=0, atol=1e-4)
  for key, x in sizes.items():
    other = apply(variables, z, t, condition | {key: x.at[1, -1].add(5.0)})
    assert jnp.max(jnp.abs(other - y)[1]) > 1e-3, key
    np.testing.assert_allclose(other[::2], y[::2], rtol=0, atol=1e-4)


def test_nothing_comes_out_at_first_nor_of_the_captions():
  model = denoisers.create(
    "PixArt-tiny",
    latent_size=4,
    latent_channels=6,
    conditioning=conditioning.Captions(30, 100),
  )
  inputs = numpy_denoisers.random_inputs(model)
  y, variables = jax.jit(model.init_with_output)(jax.random.key(0), *inputs)
  np.testing.assert_array_equal(y, np.zeros((3, 4, 4, 6)))
  for path, x in jax.tree.leaves_with_path(variables["params"]):
    path = [key.key for key in path]
    head = path[0] == "project_out" and path[1] == "linear"
    if (
      path[-1] == "bias" or head or path[1:3] == ["cross_attention", "project"]
    ):
      assert not jnp.any(x), path
    elif path[-1] in ("vectors", "null_caption"):
      assert jnp.std(x) == pytest.approx(x.shape[-1] ** -0.5, rel=0.1), path
    elif path[0] in ("time_embedding", "caption_projection", "modulation"):
      assert jnp.std(x) == pytest.approx(0.02, rel=0.03), path
    else:
      bound = (6 / sum(x.shape)) ** 0.5
      assert jnp.max(jnp.abs(x)) == pytest.approx(bound, rel=0.02), path


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"hidden": 64, "heads": 4, "size_conditions": True}, "by 3, as size_c"),
    ({"interpolation_scale": 0.0}, "interpolation_scale=0.0 is not above 0"),
    ({"spatial_compression": 0}, "spatial_compression=0 is below 1"),
    ({"hidden": 50, "heads": 2}, "hidden=50 is not divisible by 4"),
  ],
)
def test_architectures_that_cannot_be_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    _create(fields)
