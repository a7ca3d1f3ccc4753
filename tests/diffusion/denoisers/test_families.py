import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_denoisers
import pytest

from dcae_jax.diffusion import conditioning
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.training import freezing

SETTINGS = {"latent_size": 16, "latent_channels": 32}
CONDITIONINGS = {
  "DiT": conditioning.ClassLabels(1000),
  "UViT": conditioning.ClassLabels(1000),
  "PixArt": conditioning.Captions(120, 4096),
  "SANA": conditioning.Captions(300, 2304),
}
TINY = [f"{family}-tiny" for family in CONDITIONINGS]
# DC-AE's table 3: millions of parameters.
PARAMETERS = {
  "UViT-S": 44.79,
  "UViT-H": 500.87,
  "UViT-2B": 1580.40,
  "DiT-XL": 674.89,
}
# Milliards of multiply-accumulates, by latents of f32c32 or f64c128.
MACS = {
  ("UViT-S", 16, 32): 12.27,
  ("UViT-H", 16, 32): 133.25,
  ("UViT-H", 8, 128): 33.25,
  ("UViT-2B", 16, 32): 414.91,
  ("UViT-2B", 8, 128): 104.65,
  ("DiT-XL", 16, 32): 118.68,
}
# Of each family, a small one.
FIELDS = {
  "DiT": {"depth": 2},
  "UViT": {"depth": 4},
  "PixArt": {"depth": 2, "size_conditions": True},
  "SANA": {
    "depth": 2, "linear_head_dim": 24, "qk_norm": True,
    "guidance_embedding": True, "interpolation_scale": 1.0,
  },
}  # fmt: skip


def _variant(family, depth, hidden, heads):
  fields = {"depth": depth, "hidden": hidden, "heads": heads}
  return denoisers.Variant(family, fields)


def _create(name, **changes):
  if name == "DiT-XL":
    changes = {"learn_sigma": True} | changes
  changes = {"conditioning": CONDITIONINGS[name.split("-")[0]]} | changes
  return denoisers.create(name, **SETTINGS | changes)


def _inputs(model, images):
  shape = (images, *model.latent_size, model.latent_channels)
  return (
    jax.ShapeDtypeStruct(shape, "float32"),
    jax.ShapeDtypeStruct((images,), "float32"),
    model.conditioning.abstract(images),
  )


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
  variables = denoisers.abstract_variables(_create(name))
  assert set(variables) == {"params"}
  assert round(freezing.count(variables) / 1e6, 2) == PARAMETERS[name]


@pytest.mark.parametrize("key", MACS, ids=lambda key: f"{key[0]}-{key[1]}")
def test_multiply_accumulates_are_the_published_ones(key):
  name, size, channels = key
  model = _create(name, latent_size=size, latent_channels=channels)
  assert model.forward_macs / 1e9 == pytest.approx(MACS[key], rel=2e-3)


def _product_macs(jaxpr):
  """Of all matrix products in a program, those in its parts too."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      sides = equation.invars[0].aval.shape
      inner = math.prod(sides[axis] for axis in contracted)
      total += inner * math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "conv_general_dilated":
      kernel = math.prod(equation.invars[1].aval.shape[:3])
      total += kernel * math.prod(equation.outvars[0].aval.shape)
    for key in ("jaxpr", "call_jaxpr"):
      if key in equation.params:
        total += _product_macs(equation.params[key])
    # The branches of convolutions: that of the CPU, then that of the others.
    if "branches" in equation.params:
      total += _product_macs(equation.params["branches"][-1])
  return total


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("patch_size", [1, 2])
def test_multiply_accumulates_are_those_of_the_program(name, patch_size):
  model = _create(name, latent_size=(16, 12), patch_size=patch_size)
  variables = denoisers.abstract_variables(model)
  program = jax.make_jaxpr(model.apply)(variables, *_inputs(model, 1))
  assert _product_macs(program.jaxpr) == model.forward_macs


def _output(model):
  variables = denoisers.abstract_variables(model)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
  return jax.eval_shape(model.apply, variables, *_inputs(model, 2))


@pytest.mark.parametrize("name", denoisers.variants())
def test_every_variant_returns_float32_of_the_shape_it_is_given(name):
  y = _output(_create(name, latent_size=(4, 6), dtype="bfloat16"))
  assert y.shape == (2, 4, 6, 64 if name == "DiT-XL" else 32)
  assert y.dtype == jnp.float32


@pytest.mark.parametrize("name", TINY)
def test_patches_leave_the_output_as_large_as_the_latents(name):
  for patch_size in denoisers.PATCH_SIZES:
    y = _output(_create(name, latent_size=(16, 24), patch_size=patch_size))
    assert y.shape == (2, 16, 24, 32)


def test_labels_have_one_row_more_than_there_are_classes():
  for name in ("DiT-tiny", "UViT-tiny"):
    params = denoisers.abstract_variables(_create(name))["params"]
    assert params["label_embedding"]["embedding"].shape == (1001, 128)


def test_unknown_names_are_refused_with_the_known_ones():
  with pytest.raises(ValueError, match=r"'DiT-XXL'; known are DiT-S, .*UViT-H"):
    _create("DiT-XXL")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      ("SiT", 4, 64, 4),
      "'SiT' of denoisers; known are DiT, UViT, PixArt, SANA",
    ),
    (("DiT", 4, 64, 5), "hidden=64 is not divisible by heads=5"),
    (("DiT", 4, 64, 0), "hidden=64 is not divisible by heads=0"),
    (("DiT", 4, 66, 2), "hidden=66 is not divisible by 4.*use 64 or 68"),
    (("UViT", 4, 63, 3), "hidden=63 is not divisible by 2.*use 62 or 64"),
    (("DiT", 0, 64, 4), "depth=0 is below 1"),
    (("UViT", 5, 64, 4), "depth=5 of a UViT is odd"),
  ],
)
def test_architectures_that_cannot_be_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    settings = SETTINGS | {"conditioning": CONDITIONINGS["DiT"]}
    denoisers.create(_variant(*fields), **settings)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"patch_size": 3}, "patch_size=3 is not one of 1, 2, 4, 8"),
    ({"latent_size": (16, 6), "patch_size": 4}, "side 6 is not divisible by"),
    ({"latent_size": 0}, "side 0 is not divisible by"),
    ({"latent_channels": 0}, "latent_channels=0 is below 1"),
    ({"dtype": "float16"}, "unknown dtype 'float16'"),
    ({"learn_sigma": True}, "learn_sigma is for DiT, PixArt: a UViT"),
  ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    _create("UViT-tiny", **changes)


def _small(family, **changes):
  """A small one of a family, or of the family of another one."""
  if not isinstance(family, str):
    family = denoisers.family_of(family)
  is_text = CONDITIONINGS[family].is_text
  settings = {
    "latent_size": (4, 6), "latent_channels": 5, "patch_size": 2,
    "conditioning": conditioning.Captions(4, 10)
    if is_text
    else conditioning.ClassLabels(7),
    "learn_sigma": denoisers.DENOISERS[family].predicts_variance,
  }  # fmt: skip
  fields = {"hidden": 48, "heads": 3} | FIELDS[family]
  return denoisers.create(
    denoisers.Variant(family, fields), **settings | changes
  )


@pytest.fixture(scope="module", params=list(CONDITIONINGS))
def small(request):
  """A model with random values everywhere, and inputs."""
  model = _small(request.param)
  variables = numpy_denoisers.random_variables(model)
  return model, variables, numpy_denoisers.random_inputs(model)


def _changed(x):
  """Another condition for the second image."""
  if x.dtype == bool and x.ndim == 1:
    return x.at[1].set(~x[1])
  return x.at[1].add(1) if x.dtype != bool else x


def test_each_image_has_its_own_time_and_condition(small):
  model, variables, (z, t, condition) = small
  apply = jax.jit(model.apply)
  y = apply(variables, z, t, condition)
  for changed in (
    (z, t.at[1].add(0.5), condition),
    (z, t, jax.tree.map(_changed, condition)),
    (z.at[1].add(0.1), t, condition),
  ):
    other = apply(variables, *changed)
    assert jnp.max(jnp.abs(other[1] - y[1])) > 1e-3
    np.testing.assert_allclose(other[::2], y[::2], rtol=0, atol=1e-5)


def test_remat_changes_nothing_but_the_backward_pass(small):
  model, variables, inputs = small
  other = _small(model, remat=True)
  assert denoisers.abstract_variables(other) == denoisers.abstract_variables(
    model
  )

  def gradient(model):
    loss = lambda v: jnp.mean(jnp.square(model.apply(v, *inputs)))
    return jax.value_and_grad(loss)

  found, expected = (jax.jit(gradient(m))(variables) for m in (other, model))
  assert "remat" not in str(jax.make_jaxpr(gradient(model))(variables))
  jaxpr = str(jax.make_jaxpr(gradient(other))(variables))
  blocks = [name for name in variables["params"] if "block" in name]
  assert jaxpr.count("remat") >= len(blocks) >= model.depth
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    found,
    expected,
  )


def test_gradients_in_bfloat16_are_those_of_float32_up_to_rounding(small):
  model, variables, inputs = small
  y = jax.eval_shape(model.apply, variables, *inputs)
  signs = np.random.default_rng(2).choice([-1.0, 1.0], y.shape)

  def gradient(model):
    loss = lambda v: jnp.sum(signs * model.apply(v, *inputs))
    return jax.jit(jax.grad(loss))(variables)

  found, expected = gradient(_small(model, dtype="bfloat16")), gradient(model)
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert a.dtype == jnp.float32
    assert jnp.linalg.norm(a - b) < 0.05 * jnp.linalg.norm(b)
