import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from dcae_jax.autoencoder import families, network
from dcae_jax.autoencoder.dcae import residual_autoencoding
from dcae_jax.autoencoder.dcae import variants as dcae_variants
from dcae_jax.autoencoder.sd_vae import network as sd_vae
from dcae_jax.autoencoder.sd_vae import variants as sd_vae_variants
from dcae_jax.training import freezing

TINY = "tiny-sd-vae-f8"
SMALL = sd_vae_variants.Architecture(4, (16, 32), depth=1, groups=4)


def _perturbed(model, seed=0):
  """Random variables, also where initial values are constant."""
  rng = np.random.default_rng(seed)

  def random(path, x):
    if path[-1].key in ("scale", "var"):
      return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), "float32")
    gain = np.prod((1, *x.shape[:-1])) ** -0.5
    return jnp.asarray(rng.normal(size=x.shape) * gain, "float32")

  return jax.tree.map_with_path(random, network.abstract_variables(model, 3))


def _jitted(model, method="__call__"):
  return jax.jit(functools.partial(model.apply, method=method))


@pytest.fixture(scope="module")
def small():
  model = families.create(SMALL)
  images = np.random.default_rng(1).uniform(-1, 1, (2, 4, 6, 3))
  return model, _perturbed(model), jnp.asarray(images, "float32")


def test_f8c4_has_as_many_parameters_as_stable_diffusions():
  found = network.abstract_variables(families.create("sd-vae-f8c4"), 3)
  assert freezing.count(found) == 83_653_863
  assert found["batch_stats"] == {}


@pytest.mark.parametrize("name", sd_vae_variants.VARIANTS)
def test_names_tell_the_shapes(name):
  model = families.create(name)
  f, variant = model.spatial_compression, sd_vae_variants.VARIANTS[name]
  assert f == variant.spatial_compression
  last = f"f{f}" if name == TINY else f"f{f}c{variant.latent_channels}"
  assert name.endswith(f"sd-vae-{last}")
  variables = network.abstract_variables(model, 3)
  images = jax.ShapeDtypeStruct((2, 2 * f, 3 * f, 3), "float32")

  def both(variables, images):
    z = model.apply(variables, images, method="encode")
    return z, model.apply(variables, z, method="decode")

  z, again = jax.eval_shape(both, variables, images)
  assert z.shape == (2, 2, 3, variant.latent_channels)
  assert again.shape == images.shape
  assert z.dtype == again.dtype == jnp.float32


def test_default_patterns_of_the_phases_match():
  params = network.abstract_variables(families.create(TINY), 3)["params"]
  for phase in (base.phase1, base.phase2, base.phase3):
    mask = freezing.trainable_mask(params, phase(TINY).trainable)
    assert any(jax.tree.leaves(mask))
  assert params["decoder"]["project_out"]["conv"]["kernel"]


def test_latents_are_the_mean_of_the_posterior(small):
  model, variables, images = small
  posterior = _jitted(model, "posterior")
  mean, log_variance = posterior(variables, images)
  z = _jitted(model, "encode")(variables, images)
  np.testing.assert_array_equal(z, mean)
  assert mean.shape == log_variance.shape == (2, 2, 3, 4)
  # The first half of the channels, which the other half does not enter.
  changed = jax.tree.map(lambda x: x, variables)
  mix = changed["params"]["encoder"]["project_out"]["mix"]
  mix["bias"] = mix["bias"] + np.repeat([0.0, 100.0], 4).astype("float32")
  same, large = posterior(changed, images)
  np.testing.assert_array_equal(same, mean)
  np.testing.assert_array_equal(large, np.full_like(large, 20.0))


def test_samples_scatter_around_the_mean_by_the_standard_deviation(small):
  model, variables, images = small
  sample = jax.jit(
    lambda key: model.apply(variables, images, key, method="reconstruct_sample")
  )
  y, divergences = sample(jax.random.key(0))
  again, _ = sample(jax.random.key(0))
  other, same = sample(jax.random.key(1))
  np.testing.assert_array_equal(y, again)
  assert jnp.any(y != other)
  np.testing.assert_array_equal(divergences, same)
  mean, log_variance = _jitted(model, "posterior")(variables, images)
  noise = jax.random.normal(jax.random.key(0), mean.shape)
  z = mean + jnp.sqrt(jnp.exp(log_variance)) * noise
  expected = _jitted(model, "decode")(variables, z)
  np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4)


def test_kl_divergence_is_the_closed_form():
  rng = np.random.default_rng(0)
  mean, log_variance = rng.normal(size=(2, 3, 2, 2, 5)).astype("float32")
  found = sd_vae.kl_divergence(jnp.asarray(mean), jnp.asarray(log_variance))
  deviation = np.exp(log_variance.astype("float64") / 2)
  expected = -np.log(deviation) + (deviation**2 + mean**2) / 2 - 0.5
  np.testing.assert_allclose(found, expected.sum((1, 2, 3)), rtol=1e-5)
  zero = jnp.zeros((1, 2, 2, 5))
  np.testing.assert_array_equal(sd_vae.kl_divergence(zero, zero), [0.0])


def test_attention_is_softmax_attention():
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(3, 2, 3, 4, 5)).astype("float32") * 2
  found = sd_vae.attention(*map(jnp.asarray, (q, k, v)))
  flat = lambda x: x.reshape(2, 12, 5).astype("float64")
  scores = np.exp(flat(q) @ flat(k).swapaxes(1, 2) / np.sqrt(5))
  expected = scores / scores.sum(-1, keepdims=True) @ flat(v)
  np.testing.assert_allclose(
    found, expected.reshape(v.shape), rtol=1e-4, atol=1e-5
  )


def test_remat_changes_neither_values_nor_gradients(small):
  model, variables, images = small

  def gradient(model):
    loss = lambda params: jnp.mean(
      jnp.abs(model.apply({**variables, "params": params}, images) - images)
    )
    return jax.jit(jax.value_and_grad(loss))(variables["params"])

  other = gradient(families.create(SMALL, remat=True))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
    gradient(model),
    other,
  )


def test_bfloat16_stays_close_and_parameters_stay_float32(small):
  model, variables, images = small
  half = families.create(SMALL, dtype="bfloat16")
  shapes = network.abstract_variables(half, 3)
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  expected = _jitted(model)(variables, images)
  found = _jitted(half)(variables, images)
  assert found.dtype == jnp.float32
  difference = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
  assert 0 < difference < 0.05


def test_sides_that_do_not_divide_are_refused(small):
  model, variables, _ = small
  for method in ("encode", "posterior"):
    apply = functools.partial(model.apply, method=method)
    with pytest.raises(ValueError, match=r"5 is not divisible by 2"):
      jax.eval_shape(apply, variables, jnp.zeros((1, 4, 5, 3)))


DC_AE = dcae_variants.Architecture(
  2, *[(dcae_variants.Stage(16, 0), dcae_variants.Stage(32, 1))] * 2
)


@pytest.mark.parametrize("architecture", [DC_AE, SMALL], ids=["dcae", "sd-vae"])
def test_space_to_channel_only_rearranges_latents(architecture):
  plain = families.create(architecture)
  model = families.create(architecture, space_to_channel=8)
  assert model.spatial_compression == 16
  variables = _perturbed(plain)
  assert jax.tree.map(jnp.shape, network.abstract_variables(model, 3)) == (
    jax.tree.map(jnp.shape, variables)
  )
  images = np.random.default_rng(1).uniform(-1, 1, (1, 16, 32, 3))
  images = jnp.asarray(images, "float32")
  encode, decode = (
    lambda model, x, method=method: _jitted(model, method)(variables, x)
    for method in ("encode", "decode")
  )
  z, moved = encode(plain, images), encode(model, images)
  assert moved.shape == (1, 1, 2, 64 * z.shape[-1])
  expected = residual_autoencoding.space_to_channel(z, 8)
  np.testing.assert_array_equal(moved, expected)
  np.testing.assert_array_equal(  # channel-major: its channel 0 comes first
    moved[0, 0, 1, :64], np.ravel(z[0, :, 8:, 0])
  )
  y = decode(plain, z)
  np.testing.assert_array_equal(decode(model, moved), y)
  both = _jitted(model)(variables, images)
  np.testing.assert_allclose(both, y, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match=r"8 is not divisible by 16"):
    model.apply(variables, images[:, :8], method="encode")


def test_f8c4_and_squares_of_8_are_an_f64c256():
  model = families.create("sd-vae-f8c4", space_to_channel=8)
  assert model.spatial_compression == 64
  variables = network.abstract_variables(model, 3)
  images = jax.ShapeDtypeStruct((1, 256, 256, 3), "float32")
  encode = lambda v, x: model.apply(v, x, method="encode")
  assert jax.eval_shape(encode, variables, images).shape == (1, 4, 4, 256)


@pytest.mark.parametrize("factor", [0, -2, True, 1000])
def test_squares_that_cannot_be_are_refused(factor):
  for name in ("tiny-f8", TINY):
    with pytest.raises(ValueError, match=r"whole number from 1 to 64"):
      families.create(name, space_to_channel=factor)


def test_what_sd_vae_has_not_is_refused():
  with pytest.raises(ValueError, match="SD-VAE has no shortcuts"):
    families.create(TINY, residual_autoencoding=False)
  with pytest.raises(ValueError, match="width 30 is not divisible by 4"):
    families.create(sd_vae_variants.Architecture(4, (16, 30), groups=4))
  with pytest.raises(ValueError, match=r"'f8'.*f64c128.*sd-vae-f8c4"):
    families.create("f8")
