import jax
import jax.numpy as jnp
import numpy as np
import numpy_denoisers
import pytest

from dcae_jax.diffusion import conditioning
from dcae_jax.diffusion.denoisers import dit
from dcae_jax.diffusion.denoisers import families as denoisers

VARIANT = denoisers.Variant("DiT", {"depth": 2, "hidden": 48, "heads": 3})
FORMS = {  # patch size, rows, columns, learned sigma
  "one position a token": (1, 4, 4, False),
  "patches of 2x2, wide": (2, 4, 6, True),
  "patches of 4x4, high": (4, 12, 4, False),
}


def _create(form="patches of 2x2, wide", **changes):
  patch_size, height, width, learn_sigma = FORMS[form]
  settings = {
    "latent_size": (height, width),
    "latent_channels": 5,
    "conditioning": conditioning.ClassLabels(7),
    "patch_size": patch_size,
    "learn_sigma": learn_sigma,
  }
  return denoisers.create(VARIANT, **settings | changes)


@pytest.fixture(scope="module")
def wide():
  model = _create()
  variables = numpy_denoisers.random_variables(model)
  return model, variables, numpy_denoisers.random_inputs(model)


@pytest.mark.parametrize("form", FORMS)
def test_forward_equals_the_papers_equations(form):
  model = _create(form)
  variables = numpy_denoisers.random_variables(model)
  inputs = numpy_denoisers.random_inputs(model)
  found = jax.jit(model.apply)(variables, *inputs)
  expected = numpy_denoisers.dit(
    variables["params"],
    *map(np.asarray, inputs),
    heads=model.heads,
    patch_size=model.patch_size,
  )
  assert found.dtype == jnp.float32
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


def test_head_treats_tokens_of_small_variance_as_the_authors():
  """Where the epsilon of the norms counts."""
  head = dit.Head(4)
  rng = np.random.default_rng(0)
  x = 1e-3 * rng.normal(size=(2, 5, 48))
  inputs = jnp.asarray(x, "float32"), jnp.zeros((2, 48))
  variables = head.init(jax.random.key(0), *inputs)
  kernel = rng.normal(size=(48, 4))
  variables["params"]["linear"]["kernel"] = jnp.asarray(kernel, "float32")
  x = x - x.mean(-1, keepdims=True)
  expected = x / np.sqrt(x.var(-1, keepdims=True) + 1e-6) @ kernel
  found = head.apply(variables, *inputs)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_learned_sigma_doubles_the_channels_and_nothing_else():
  plain, double = (_create(learn_sigma=x) for x in (False, True))
  inputs = numpy_denoisers.random_inputs(plain)
  shapes = [denoisers.abstract_variables(m)["params"] for m in (plain, double)]
  for model, p, channels in zip((plain, double), shapes, (5, 10), strict=True):
    y = jax.eval_shape(model.apply, {"params": p}, *inputs)
    assert y.shape == (*inputs[0].shape[:3], channels)
    kernel = p["project_out"]["linear"]["kernel"]
    assert kernel.shape == (48, 4 * channels)
    del p["project_out"]["linear"]
  assert shapes[0] == shapes[1]


def test_latents_of_other_sizes_keep_their_positions_features(wide):
  """No size is learned, and a grid's features are those of a larger one."""
  model, variables, _ = wide
  other = _create(latent_size=16)
  assert denoisers.abstract_variables(other) == denoisers.abstract_variables(
    model
  )
  inputs = numpy_denoisers.random_inputs(model, latent_size=(6, 2))
  y = jax.jit(model.apply)(variables, *inputs)
  np.testing.assert_array_equal(y, jax.jit(other.apply)(variables, *inputs))
  assert y.shape == (3, 6, 2, 10)
  large = dit.positions(5, 7, 16).reshape(5, 7, 16)
  small = dit.positions(3, 2, 16).reshape(3, 2, 16)
  np.testing.assert_array_equal(small, large[:3, :2])
  assert len(np.unique(large.reshape(35, 16), axis=0)) == 35


def test_nothing_comes_out_at_first_and_blocks_pass_tokens_on():
  model = _create()
  inputs = numpy_denoisers.random_inputs(model)
  y, variables = jax.jit(model.init_with_output)(jax.random.key(0), *inputs)
  np.testing.assert_array_equal(y, np.zeros((3, 4, 6, 10)))
  block = dit.DiTBlock(heads=3, dtype="float32")
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 48)), "float32")
  passed = block.apply({"params": variables["params"]["block_0"]}, x, x[:, 0])
  np.testing.assert_array_equal(passed, x)


def test_initial_values_are_the_papers():
  model = denoisers.create(
    "DiT-tiny",
    latent_size=4,
    latent_channels=6,
    conditioning=conditioning.ClassLabels(200),
  )
  inputs = numpy_denoisers.random_inputs(model)
  variables = jax.jit(model.init)(jax.random.key(0), *inputs)
  for path, x in jax.tree.leaves_with_path(variables["params"]):
    path = [key.key for key in path]
    if path[-1] == "bias" or "modulation" in path or "project_out" in path:
      assert not jnp.any(x), path
    elif path[0] in ("time_embedding", "label_embedding"):
      assert jnp.std(x) == pytest.approx(0.02, rel=0.02), path
      assert jnp.max(jnp.abs(x)) > 0.06, path  # not uniform
    else:
      bound = (6 / sum(x.shape)) ** 0.5
      assert jnp.max(jnp.abs(x)) == pytest.approx(bound, rel=0.02), path
      assert jnp.std(x) == pytest.approx(bound / 3**0.5, rel=0.05), path


def test_latents_that_do_not_fit_are_refused(wide):
  model, variables, (z, t, labels) = wide
  with pytest.raises(ValueError, match="latents have 4 channels"):
    model.apply(variables, z[..., :4], t, labels)
  with pytest.raises(ValueError, match="side 5 is not divisible by 2"):
    model.apply(variables, z[:, :, :5], t, labels)
