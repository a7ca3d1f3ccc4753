import jax
import jax.numpy as jnp
import numpy as np
import numpy_denoisers
import pytest

from dcae_jax.diffusion import conditioning
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.training import freezing

FIELDS = {"depth": 2, "hidden": 48, "heads": 3, "linear_head_dim": 24}
EXTRAS = {
  "qk_norm": True,
  "guidance_embedding": True,
  "interpolation_scale": 1.0,
}


def _create(fields, **changes):
  settings = {
    "latent_size": (4, 6),
    "latent_channels": 5,
    "conditioning": conditioning.Captions(6, 20),
  }
  variant = denoisers.Variant("SANA", FIELDS | fields)
  return denoisers.create(variant, **settings | changes)


@pytest.fixture(scope="module")
def small():
  """With random values everywhere, and inputs."""
  model = _create(EXTRAS)
  variables = numpy_denoisers.random_variables(model)
  inputs = numpy_denoisers.random_inputs(model)
  return model, jax.jit(model.apply), variables, inputs


@pytest.mark.parametrize(
  ("size", "parameters"),
  [
    ("600M", 591_747_872),
    ("1600M", 1_604_462_752),
    ("4800M", 4_721_825_952),
  ],
)
def test_parameter_counts_are_the_published_ones(size, parameters):
  """Besides the null caption, which the authors do not count."""
  model = denoisers.create(
    f"SANA-{size}",
    latent_size=16,
    latent_channels=32,
    conditioning=conditioning.Captions(300, 2304),
  )
  params = denoisers.abstract_variables(model)["params"]
  assert params.pop("null_caption").shape == (300, 2304)
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


def test_latents_of_other_sizes_need_no_other_parameters(small):
  model, apply, variables, _ = small
  inputs = numpy_denoisers.random_inputs(model, latent_size=(6, 2))
  assert apply(variables, *inputs).shape == (3, 6, 2, 5)


def test_a_column_of_latents_is_not_a_row():
  """The grid tells neighbours: without it, both would be the same tokens."""
  model = _create({})
  variables = numpy_denoisers.random_variables(model)
  z, t, condition = numpy_denoisers.random_inputs(model, latent_size=(1, 8))
  apply = jax.jit(model.apply)
  row = apply(variables, z, t, condition)
  column = apply(variables, z.swapaxes(1, 2), t, condition)
  assert jnp.max(jnp.abs(column.swapaxes(1, 2) - row)) > 1e-3


def test_only_models_with_positions_know_where_the_border_is_not():
  """Far from the border, a shifted image comes out shifted."""
  z = np.zeros((1, 16, 16, 5), "float32")
  z[0, 7] = 1.0
  t = jnp.array([500.0])
  for scale in (None, 1.0):
    model = _create({"interpolation_scale": scale, "depth": 1})
    variables = numpy_denoisers.random_variables(model)
    _, _, condition = numpy_denoisers.random_inputs(model, images=1)
    apply = jax.jit(model.apply)
    y, other = (
      apply(variables, jnp.asarray(np.roll(z, by, 1)), t, condition)
      for by in (0, 1)
    )
    difference = np.abs(np.roll(y, 1, 1) - other)[:, 4:12, 4:12].max()
    assert difference < 1e-4 if scale is None else difference > 1e-3


def test_guidance_is_nought_unless_told(small):
  _, apply, variables, (z, t, condition) = small
  y = apply(variables, z, t, condition)
  guidance = jnp.array([0.0, 0.45, 0.0])
  found = apply(variables, z, t, condition | {"guidance": guidance})
  np.testing.assert_allclose(found[::2], y[::2], rtol=0, atol=1e-5)
  assert jnp.max(jnp.abs(found - y)[1]) > 1e-3


def test_linear_attention_is_float32_under_bfloat16():
  """It sums over all positions: rounding them would not average out."""
  model = _create({}, dtype="bfloat16", latent_size=8)
  inputs = numpy_denoisers.random_inputs(model)
  variables = denoisers.abstract_variables(model)
  program = str(jax.make_jaxpr(model.apply)(variables, *inputs))
  assert "f32[3,2,24,24] = dot_general" in program
  assert "bf16[3,2,24,24] = dot_general" not in program
  assert "bf16[192,144] = dot_general" in program  # to q, k, v


def test_initial_values_are_the_authors():
  model = denoisers.create(
    denoisers.Variant(
      "SANA",
      {
        "depth": 1, "hidden": 128, "heads": 4, "qk_norm": True,
        "guidance_embedding": True,
      },
    ),
    latent_size=4,
    latent_channels=6,
    conditioning=conditioning.Captions(30, 100),
  )  # fmt: skip
  variables = jax.jit(lambda key: denoisers.init(model, key))(jax.random.key(0))
  normal = (
    "time_embedding", "caption_projection", "modulation", "guidance_embedding",
  )  # fmt: skip
  for path, x in jax.tree.leaves_with_path(variables["params"]):
    path = [key.key for key in path]
    if path[:2] == ["guidance_embedding", "linear2"]:
      assert not jnp.any(x), path
    elif path[1:2] == ["mlp"]:  # as convolutions, biases too
      fan_in = {"inverted": 128, "depthwise": 9, "point": 320}[path[2]]
      top = jnp.max(jnp.abs(x))
      assert top == pytest.approx(fan_in**-0.5, rel=0.05), path
    elif path[-1] == "bias":
      assert not jnp.any(x), path
    elif path[-1] == "scale":
      value = 0.01 if path[0] == "caption_norm" else 1
      np.testing.assert_allclose(x, value, rtol=1e-6)
    elif path[-1] in ("vectors", "null_caption"):
      assert jnp.std(x) == pytest.approx(x.shape[-1] ** -0.5, rel=0.1), path
    elif path[0] in normal:
      assert jnp.std(x) == pytest.approx(0.02, rel=0.03), path
    else:
      bound = (6 / sum(x.shape)) ** 0.5
      assert jnp.max(jnp.abs(x)) == pytest.approx(bound, rel=0.02), path


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"linear_head_dim": 32}, "hidden=48 is not divisible by linear_head_dim"),
    ({"interpolation_scale": -1.0}, "interpolation_scale=-1.0 is not above 0"),
    ({"hidden": 50, "heads": 2}, "hidden=50 is not divisible by 4"),
  ],
)
def test_architectures_that_cannot_be_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    _create(fields)
