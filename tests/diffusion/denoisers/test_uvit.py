import jax
import jax.numpy as jnp
import numpy as np
import numpy_denoisers
import pytest

from dcae_jax.diffusion import conditioning
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.diffusion.denoisers import uvit

VARIANT = denoisers.Variant("UViT", {"depth": 4, "hidden": 48, "heads": 3})
FORMS = {  # patch size, rows, columns
  "one position a token": (1, 4, 4),
  "patches of 2x2, wide": (2, 4, 6),
  "patches of 4x4, high": (4, 12, 4),
}


def _create(form="patches of 2x2, wide", **changes):
  patch_size, height, width = FORMS[form]
  settings = {
    "latent_size": (height, width),
    "latent_channels": 5,
    "conditioning": conditioning.ClassLabels(7),
    "patch_size": patch_size,
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
  expected = numpy_denoisers.uvit(
    variables["params"],
    *map(np.asarray, inputs),
    heads=model.heads,
    patch_size=model.patch_size,
  )
  assert found.dtype == jnp.float32
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


def test_blocks_treat_tokens_of_small_variance_as_the_authors(wide):
  """Where the epsilon of the norms counts."""
  model, variables, _ = wide
  parameters = variables["params"]["middle_block"]
  x = 1e-3 * np.random.default_rng(0).normal(size=(2, 5, 48))
  block = uvit.UViTBlock(model.heads, "float32")
  found = block.apply({"params": parameters}, jnp.asarray(x, "float32"))
  expected = numpy_denoisers.uvit_block(parameters, x, model.heads)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_skips_join_the_first_block_to_the_last():
  params = denoisers.abstract_variables(_create())["params"]
  blocks = {name for name in params if "block" in name}
  names = {f"{side}_block_{i}" for side in ("in", "out") for i in range(2)}
  assert blocks == names | {"middle_block"}
  for name in blocks:
    assert ("merge" in params[name]) == name.startswith("out")
  assert params["out_block_1"]["merge"]["kernel"].shape == (96, 48)


def test_each_patch_comes_out_where_it_went_in(wide):
  """With nothing but the skip from the first block, it sees itself alone."""
  model, variables, (z, t, labels) = wide
  changed = jax.tree.map(lambda x: x, variables)
  for name, block in changed["params"].items():
    if "block" in name:
      for layer in (block["attention"]["project"], block["mlp"]["contract"]):
        for key in layer:
          layer[key] = jnp.zeros_like(layer[key])
  merge = changed["params"]["out_block_1"]["merge"]
  merge["kernel"] = jnp.concatenate([jnp.zeros((48, 48)), jnp.eye(48)])
  apply = jax.jit(model.apply)
  y = apply(changed, z, t, labels)
  other = apply(changed, z.at[:, :2, 2:4].add(1.0), t + 1, labels - 1)
  differs = np.any(np.asarray(y != other), axis=(0, 3))
  expected = np.zeros((4, 6), bool)
  expected[:2, 2:4] = True
  np.testing.assert_array_equal(differs, expected)


def test_initial_values_are_the_authors():
  model = denoisers.create(
    "UViT-tiny",
    latent_size=8,
    latent_channels=32,
    conditioning=conditioning.ClassLabels(200),
  )
  inputs = numpy_denoisers.random_inputs(model)
  variables = jax.jit(model.init)(jax.random.key(0), *inputs)
  for path, x in jax.tree.leaves_with_path(variables["params"]):
    path = [key.key for key in path]
    if path[0] == "project_in":
      bound = 32**-0.5
      assert 0.9 * bound < jnp.max(jnp.abs(x)) <= bound, path
    elif path[-1] == "embedding":
      assert jnp.std(x) == pytest.approx(1.0, rel=0.02), path
    elif path[-1] in ("kernel", "positions"):
      assert jnp.std(x) == pytest.approx(0.02, rel=0.05), path
      assert jnp.max(jnp.abs(x)) > 0.06, path
    else:
      value = float(path[-1] == "scale")
      np.testing.assert_array_equal(x, np.full_like(x, value))


def test_latents_that_do_not_fit_are_refused(wide):
  model, variables, (z, t, labels) = wide
  with pytest.raises(ValueError, match="latents have 4 channels"):
    model.apply(variables, z[..., :4], t, labels)
  with pytest.raises(ValueError, match="side 5 is not divisible by 2"):
    model.apply(variables, z[:, :, :5], t, labels)
  # As many tokens, in other places.
  with pytest.raises(ValueError, match=r"size \(6, 4\).* for \(4, 6\)"):
    model.apply(variables, z.swapaxes(1, 2), t, labels)
