import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcae_jax.autoencoder import families, network
from dcae_jax.autoencoder.dcae import efficientvit, variants
from dcae_jax.autoencoder.dcae import network as dcae
from dcae_jax.training import freezing

# Trainable parameters of encoder and decoder, running batch statistics.
PARAMETERS = {
  "f32c32": (123_172_384, 200_184_076, 12_800),
  "f64c128": (264_550_528, 412_345_612, 12_800),
  "f128c512": (415_661_056, 705_021_196, 12_800),
  "f32c32-sana": (153_027_104, 159_223_171, 0),
  "f32c32-lite": (153_027_104, 268_154_124, 0),
  "f32c128-1.5": (228_609_408, 295_000_332, 0),
  "f64c128-1.5": (306_478_720, 408_262_924, 0),
}


def _shapes(model, height, width, channels=3):
  """Of the variables, of latents and of reconstructions."""
  images = jax.ShapeDtypeStruct((2, height, width, channels), "float32")

  def both(variables, images):
    z = model.apply(variables, images, method="encode")
    return z, model.apply(variables, z, method="decode")

  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  return variables, *jax.eval_shape(both, variables, images)


@functools.cache
def _shapes_of(variant):
  """Of images of 2 x 3 latents."""
  model = families.create(variant)
  f = model.spatial_compression
  return _shapes(model, 2 * f, 3 * f)


@pytest.fixture(scope="module")
def tiny():
  model = families.create("tiny-f8")
  images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3))
  images = jnp.asarray(images, "float32")
  return model, jax.jit(model.init)(jax.random.key(0), images), images


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameter_counts_are_the_published_ones(variant):
  variables, _, _ = _shapes_of(variant)
  found = (
    freezing.count(variables["params"]["encoder"]),
    freezing.count(variables["params"]["decoder"]),
    freezing.count(variables.get("batch_stats", {})),
  )
  assert found == PARAMETERS[variant]


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_any_multiple_of_the_compression_is_encoded_and_decoded(variant):
  f = variants.VARIANTS[variant].spatial_compression
  _, z, images = _shapes_of(variant)
  assert z.shape == (2, 2, 3, variants.VARIANTS[variant].latent_channels)
  assert images.shape == (2, 2 * f, 3 * f, 3)
  assert z.dtype == images.dtype == jnp.float32


def test_variant_names_tell_compression_and_latent_channels():
  for name, variant in variants.VARIANTS.items():
    f = variant.spatial_compression
    name = name.removeprefix("small-")
    assert name.removeprefix("tiny-").startswith(f"f{f}")
    if not name.startswith("tiny-"):
      rest = name.removeprefix(f"f{f}").split("-")[0]
      assert rest == f"c{variant.latent_channels}"


@pytest.mark.parametrize("channels", [1, 5])
def test_image_channels_are_a_field(channels):
  model = families.create("tiny-f8", image_channels=channels)
  _, _, images = _shapes(model, 16, 16, channels)
  assert images.shape == (2, 16, 16, channels)


def test_ablation_removes_shortcuts_and_nothing_else(tiny):
  model, variables, images = tiny
  ablation = families.create("tiny-f8", residual_autoencoding=False)
  shapes, _, _ = _shapes(ablation, 16, 24)
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
  encode = jax.jit(functools.partial(model.apply, method="encode"))
  decode, without = (
    jax.jit(functools.partial(m.apply, method="decode"))
    for m in (model, ablation)
  )
  # With every learned path at zero only the shortcuts are left.
  silent = jax.tree.map(jnp.zeros_like, variables)
  z = encode(silent, images)
  assert not jnp.any(z)  # the image enters through a learned projection only
  z = jnp.ones_like(z)
  head = variables["params"]["decoder"]["project_out"]
  silent["params"]["decoder"]["project_out"] = head
  constant = decode(silent, jnp.zeros_like(z))
  assert jnp.any(decode(silent, z) != constant)
  np.testing.assert_array_equal(without(silent, z), constant)


@pytest.fixture(scope="module")
def deep():
  """Several blocks a stage, with both kinds of block and of norm."""
  deepest = variants.Stage(32, 2, "efficientvit")
  return variants.Architecture(
    8,
    encoder=(variants.Stage(16, 0), variants.Stage(16, 3), deepest),
    decoder=(
      variants.Stage(16, 0),
      variants.Stage(16, 3, norm="batch_norm", activation="relu"),
      deepest,
    ),
  )


def test_scanned_and_remat_blocks_compute_the_same(deep):
  """With the same variables: values, gradients, and moved statistics."""
  images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3))
  images = jnp.asarray(images, "float32")
  models = [
    families.create(deep, scan=scan, remat=remat)
    for scan, remat in ((False, False), (False, True), (True, True))
  ]
  initial = [jax.jit(m.init)(jax.random.key(0), images) for m in models[::2]]
  jax.tree.map(np.testing.assert_array_equal, *initial)
  blocks = initial[1]["params"]["decoder"]["stage_1"]
  assert {"block_0", "block_1", "block_2"} < set(blocks)

  def results(model):
    def loss(params):
      variables = initial[0] | {"params": params}
      y, moved = model.apply(variables, images, mutable=["batch_stats"])
      return jnp.mean(jnp.abs(y - images)), (y, moved)

    return jax.jit(jax.grad(loss, has_aux=True))(initial[0]["params"])

  expected, *others = map(results, models)
  for found in others:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6),
      found,
      expected,
    )
  programs = [str(jax.make_jaxpr(m.apply)(initial[0], images)) for m in models]
  # Four stages have more than one block.
  assert [text.count("scan[") for text in programs] == [0, 0, 4]
  assert ["remat" in text for text in programs] == [False, True, True]


def test_bfloat16_stays_close_and_parameters_stay_float32(tiny):
  model, variables, images = tiny
  half = families.create("tiny-f8", dtype="bfloat16")
  shapes, _, _ = _shapes(half, 16, 24)
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  expected = jax.jit(model.apply)(variables, images)
  found = jax.jit(half.apply)(variables, images)
  difference = jnp.linalg.norm(found - expected)
  assert 0 < difference / jnp.linalg.norm(expected) < 0.05


@pytest.mark.parametrize("shape", [(2, 20, 16, 3), (2, 16, 4, 3)])
def test_sides_that_do_not_divide_are_refused(tiny, shape):
  model, variables, _ = tiny
  with pytest.raises(ValueError, match=r"not divisible by 8.*use 8 or|use 16"):
    model.apply(variables, jnp.zeros(shape), method="encode")


def test_unknown_variants_are_refused_with_the_known_ones():
  with pytest.raises(ValueError, match=r"'f16c4'.*f64c128"):
    families.create("f16c4")


@pytest.mark.parametrize(
  "block", [dcae.ResBlock("batch_norm"), efficientvit.EfficientViTBlock()]
)
def test_a_block_whose_branches_start_at_zero_is_the_identity(block):
  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 32))
  variables = jax.jit(block.init)(jax.random.key(1), x)
  apply = jax.jit(block.apply)
  assert not np.allclose(apply(variables, x), x, atol=0.1)
  stage = {"stage_1": {"block_0": variables["params"]}}
  start = dcae.with_branch_scale(stage, 0.0)["stage_1"]["block_0"]
  np.testing.assert_array_equal(apply(variables | {"params": start}, x), x)


def test_only_the_branches_of_blocks_start_smaller():
  for name in ("tiny-f8", "tiny-sd-vae-f8"):
    model = families.create(name)
    shapes = network.abstract_variables(model, 3)["params"]
    before = jax.tree.map(lambda x: np.full((), 7.0), shapes)
    after = dcae.with_branch_scale(before, 0.25)
    paths = freezing.parameter_paths(before)
    changed = [
      path
      for path, x in zip(paths, jax.tree.leaves(after), strict=True)
      if x != 7
    ]
    blocks = 4 + 2 * 2  # two branches in each EfficientViT block
    assert len(changed) == (blocks if name == "tiny-f8" else 0)
    assert all(path.endswith("norm/scale") for path in changed)
