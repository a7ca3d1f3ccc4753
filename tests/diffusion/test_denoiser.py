"""The public face of a denoiser: of a run, and of weights that were saved."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import dcae_jax
from dcae_jax.diffusion import conditioning, objectives
from dcae_jax.diffusion.denoisers import families, released
from dcae_jax.tasks import train_diffusion


@pytest.fixture(scope="module")
def run(tiny_diffusion, tmp_path_factory) -> str:
  workdir = tmp_path_factory.mktemp("denoiser") / "run"
  train_diffusion.run(tiny_diffusion(steps=2), epath.Path(workdir))
  return str(workdir)


@pytest.fixture(scope="module")
def denoiser(run):
  return dcae_jax.load_denoiser(run)


def test_samples_are_images_of_their_labels(denoiser):
  images = np.asarray(denoiser.sample(labels=[0, 2, 1], guidance=2.0, seed=1))
  assert images.shape == (3, 16, 16, 3) and images.dtype == np.float32
  assert -1 <= images.min() < images.max() <= 1
  again = denoiser.sample(labels=np.array([0, 2, 1]), guidance=2.0, seed=1)
  np.testing.assert_array_equal(again, images)
  other = denoiser.sample(labels=[0, 2, 1], guidance=2.0, seed=2)
  assert (np.asarray(other) != images).any()
  assert denoiser.sample(labels=[0] * 17, steps=2).shape == (17, 16, 16, 3)


def test_samples_have_any_size_that_the_positions_allow(
  denoiser, tiny_autoencoder, tmp_path
):
  """A DiT's do; those of a U-ViT are learned."""
  mite = families.Variant("DiT", {"depth": 2, "hidden": 64, "heads": 2})
  model = families.create(
    mite,
    conditioning=conditioning.ClassLabels(3),
    latent_size=2,
    latent_channels=16,
  )
  variables = families.init(model, jax.random.key(0))
  objective = objectives.FlowMatching(convention="sit")
  released.save(tmp_path, variables, model, "original", objective=objective)
  dit = dcae_jax.load_denoiser(tmp_path, autoencoder=tiny_autoencoder)
  draw = lambda **size: dit.sample(labels=[1, 2], steps=3, seed=3, **size)
  assert draw(size=(8, 24)).shape == (2, 8, 24, 3)
  assert draw(size=(24, 16)).shape == (2, 24, 16, 3)
  np.testing.assert_array_equal(draw(size=(16, 16)), draw())
  with pytest.raises(ValueError, match="image side 20 is not divisible by 8"):
    draw(size=(16, 20))
  with pytest.raises(ValueError, match="learned positions"):
    denoiser.sample(labels=[0], size=(8, 24))


def test_a_prediction_is_the_networks(denoiser):
  rng = np.random.default_rng(0)
  z = rng.normal(size=(2, 2, 2, 16)).astype(np.float32)
  labels, t = np.array([0, 3], np.int32), np.array([3.5, 900], np.float32)
  found = denoiser.predict(z, t, labels=labels)
  module = denoiser.diffusion.denoiser
  expected = jax.jit(module.apply)(denoiser.variables, z, t, labels)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert found.shape == z.shape


def test_a_dtype_may_be_that_of_arrays(run):
  model = dcae_jax.load_denoiser(run, dtype=jnp.bfloat16).diffusion.denoiser
  assert jnp.dtype(model.dtype) == jnp.bfloat16


def test_what_is_saved_loads_with_the_same_predictions(
  denoiser, tiny_autoencoder, tmp_path
):
  denoiser.save(tmp_path, layout="original")
  again = dcae_jax.load_denoiser(tmp_path, autoencoder=tiny_autoencoder)
  assert again.diffusion.objective == denoiser.diffusion.objective
  z = np.random.default_rng(0).normal(size=(1, 2, 2, 16))
  for t in ([0.0], [700.0]):
    np.testing.assert_allclose(
      again.predict(z, t, labels=[1]),
      denoiser.predict(z, t, labels=[1]),
      atol=1e-6,
    )
  images = again.sample(labels=[1], steps=4)
  np.testing.assert_allclose(
    images, denoiser.sample(labels=[1], steps=4), atol=1e-4
  )


def test_normalised_channels_are_taken_back_wherever_a_model_goes(
  run, tiny_diffusion, tiny_autoencoder, tmp_path
):
  """By a run's numbers, without its store; they go with what is saved."""
  rng = np.random.default_rng(0)
  shift, scale = rng.normal(size=16), rng.uniform(0.2, 5, 16)
  shutil.copytree(run, tmp_path / "run")
  file = tmp_path / "run/latents.json"
  numbers = {"shift": shift.tolist(), "scale": scale.tolist()}
  described = json.loads(file.read_text()) | {"normalisation": numbers}
  file.write_text(json.dumps(described))
  denoiser = dcae_jax.load_denoiser(tmp_path / "run")
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  draw = jax.jit(denoiser.diffusion.sample_function(1.0, device))
  key = jax.random.fold_in(jax.random.key(0), 0)
  z = np.asarray(draw(denoiser.variables, key, np.array([1], np.int32), None))
  z = (z / scale + shift).astype(np.float32)
  expected = np.clip(dcae_jax.load(tiny_autoencoder).decode(z), -1, 1)
  images = denoiser.sample(labels=[1])
  np.testing.assert_allclose(images, expected, atol=1e-4)

  denoiser.save(tmp_path / "saved")
  again = dcae_jax.load_denoiser(
    tmp_path / "saved", autoencoder=tiny_autoencoder
  )
  again.diffusion = denoiser.diffusion  # with its sampler
  np.testing.assert_allclose(again.sample(labels=[1]), images, atol=1e-4)
  again.save(tmp_path / "again")
  files = [tmp_path / name / "config.json" for name in ("saved", "again")]
  assert files[0].read_text() == files[1].read_text()
  card = (tmp_path / "again/README.md").read_text()
  assert "each channel less its `shift`, times its `scale`" in card
  c = tiny_diffusion(init_from=str(tmp_path / "saved"), steps=1)
  with pytest.raises(ValueError, match="'channels' there, 'factor' now"):
    train_diffusion.run(c, epath.Path(tmp_path / "fine"))
  config = json.loads(files[0].read_text())
  config["_dcae_jax"]["normalisation"]["shift"] = 3
  files[0].write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r"normalisation\.shift is 3, where a l"):
    dcae_jax.load_denoiser(tmp_path / "saved")


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({}, "draws samples of labels: name some"),
    ({"prompts": ["a"]}, "draws samples of labels"),
    ({"labels": [3]}, "^class 3 is not from 0 to 2, the classes of"),
    ({"labels": [0], "guidance": -1.0}, "guidance scale -1.0 is negative"),
    ({"labels": [0], "steps": 0}, "0 steps are too few"),
    ({"labels": [0], "negative_prompt": "a"}, "takes no negative_prompt"),
  ],
)
def test_samples_that_cannot_be_are_refused(given, message, denoiser):
  with pytest.raises(ValueError, match=message):
    denoiser.sample(**given)


def test_predictions_of_other_conditions_are_refused(denoiser):
  z = np.zeros((1, 2, 2, 16))
  for other in ("states", "mask", "resolution"):
    with pytest.raises(ValueError, match="is told labels: give them"):
      denoiser.predict(z, [0.0], labels=[0], **{other: np.zeros((1, 2))})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"z": np.zeros((2, 2, 16))}, r"z has the shape \[2, 2, 16\], not \[b, h"),
    ({"t": 0.0}, r"t has the shape \[\], not \[b\], where b=1"),
    ({"t": [0.0, 0.0]}, r"t has the shape \[2\]"),
    ({"labels": [0, 0]}, r"labels has the shape \[2\]"),
  ],
)
def test_predictions_of_other_shapes_are_refused(changes, message, denoiser):
  given = {"z": np.zeros((1, 2, 2, 16)), "t": [0.0], "labels": [0]} | changes
  with pytest.raises(ValueError, match=message):
    denoiser.predict(**given)


def test_weights_that_name_no_autoencoder_draw_nothing(tmp_path):
  kind = conditioning.ClassLabels(3)
  model = families.create(
    "DiT-tiny", conditioning=kind, latent_size=4, latent_channels=5
  )
  variables = families.init(model, jax.random.key(0))
  objective = objectives.FlowMatching(convention="sit")
  released.save(tmp_path, variables, model, "original", objective=objective)
  denoiser = dcae_jax.load_denoiser(str(tmp_path))
  assert denoiser.predict(np.zeros((1, 4, 4, 5)), [0.5], labels=[0]).any() == 0
  with pytest.raises(ValueError, match="autoencoder its latents are of"):
    denoiser.sample(labels=[0])


def test_an_autoencoder_without_a_scaling_factor_decodes_no_samples(
  run, tiny_autoencoder
):
  denoiser = dcae_jax.load_denoiser(run)
  loaded = dcae_jax.load(tiny_autoencoder)
  denoiser.autoencoder = dcae_jax.Autoencoder(
    loaded.architecture, loaded.variables
  )
  with pytest.raises(
    ValueError, match="factor of the autoencoder is not known"
  ):
    denoiser.sample(labels=[0])
  denoiser.autoencoder.scaling_factor = loaded.scaling_factor
  assert denoiser.sample(labels=[0]).shape == (1, 16, 16, 3)


def test_nothing_is_no_denoiser(tmp_path):
  with pytest.raises(ValueError, match="safetensors"):
    dcae_jax.load_denoiser(tmp_path)


def test_training_starts_from_released_weights(
  denoiser, tiny_diffusion, tmp_path
):
  """With a rate of zero they stay what they are."""
  denoiser.save(tmp_path / "weights", layout="original")
  c = tiny_diffusion(
    **{"init_from": str(tmp_path / "weights"), "optimizer.learning_rate": 0.0},
    steps=1,
  )
  assert train_diffusion.run(c, epath.Path(tmp_path / "run"))
  again = dcae_jax.load_denoiser(tmp_path / "run")
  jax.tree.map(  # to the rounding of averages
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    again.variables,
    denoiser.variables,
  )
  c.objective.first_time = 1
  with pytest.raises(ValueError, match=r"objective.first_time: 0 there, 1 now"):
    train_diffusion.run(c, epath.Path(tmp_path / "other"))
  assert not (tmp_path / "other").exists()
