"""The table of families: a third one, and how a run names its architecture."""

import sys

import numpy as np
import pytest
from etils import epath

import dcae_jax
from dcae_jax.autoencoder import families
from dcae_jax.autoencoder.dcae import variants
from dcae_jax.setup import models
from dcae_jax.tasks import train_autoencoder


@pytest.fixture(scope="module")
def toy_family(plugin):
  """That of docs/extend.md."""
  return plugin("my_family")


@pytest.fixture(scope="module")
def phases(toy_family, tiny_config, tmp_path_factory):
  """The work directories of a toy's three phases."""
  folder = tmp_path_factory.mktemp("toy")
  before = ""
  for number in (1, 2, 3):
    changes = {"model.variant": "toy-narrow" if number == 1 else "", "steps": 2}
    config = tiny_config(
      number, init_from=before, plugins=("my_family",), **changes
    )
    before = str(folder / f"phase{number}")
    assert train_autoencoder.run(config, epath.Path(before))
  return folder


@pytest.fixture
def images():
  rng = np.random.default_rng(0)
  return rng.uniform(-1, 1, (2, 8, 12, 3)).astype("float32")


def _changed(before, after):
  """The modules in which two autoencoders differ."""
  kernels = [
    {
      f"{part}/{place}": np.asarray(module["conv"]["kernel"])
      for part, modules in ae.variables["params"].items()
      for place, module in modules.items()
    }
    for ae in (before, after)
  ]
  return {k for k, x in kernels[0].items() if np.any(x != kernels[1][k])}


def test_a_third_family_is_trained_through_its_phases(phases):
  runs = [dcae_jax.load(phases / f"phase{i}") for i in (1, 2, 3)]
  assert all(ae.variant == "toy-narrow" for ae in runs)
  assert _changed(*runs[:2]) == {"encoder/project_out", "decoder/project_in"}
  assert _changed(*runs[1:]) == {"decoder/project_out"}


def test_a_third_family_encodes_and_decodes(phases, images):
  ae = dcae_jax.load(phases / "phase3")
  z = ae.encode(images)
  assert z.shape == (2, 4, 6, 4)
  assert ae.decode(z).shape == images.shape


@pytest.mark.parametrize("has_config", [True, False])
def test_a_third_family_is_saved_and_loaded(
  phases, images, has_config, tmp_path
):
  ae = dcae_jax.load(phases / "phase3", scaling_factor=2.0)
  ae.save(tmp_path / "saved")
  if not has_config:
    (tmp_path / "saved" / "config.json").unlink()
  loaded = dcae_jax.load(tmp_path / "saved")
  assert loaded.variant == "toy-narrow"
  np.testing.assert_array_equal(loaded.encode(images), ae.encode(images))
  with pytest.raises(ValueError, match="whose code has no Toy"):
    ae.save(tmp_path / "original", layout="original")


def test_a_run_is_loaded_where_its_variant_is_not_known(
  phases, toy_family, monkeypatch
):
  monkeypatch.delitem(families.FAMILIES["Toy"].variants, "toy-narrow")
  ae = dcae_jax.load(phases / "phase3")
  assert (ae.variant, ae.architecture) == ("custom", toy_family.Toy(4, 6))


def test_a_run_of_a_module_is_loaded_after_its_import_alone(
  phases, toy_family, monkeypatch
):
  """What a folder names is never imported because it says so."""
  monkeypatch.delitem(families.FAMILIES, "Toy")
  monkeypatch.delitem(sys.modules, "my_family")
  message = "first import my_family, in commands by --config.plugins=my_family$"
  for load in (dcae_jax.load, lambda run: models.identity_of(str(run))):
    with pytest.raises(ValueError, match=message) as refused:
      load(phases / "phase3")
    assert "\n" not in str(refused.value)
  assert "my_family" not in sys.modules


def test_an_architecture_differs_from_its_variant_in_some_keys():
  wider = {"decoder_block_out_channels": [16, 32, 64, 256]}
  found = families.of_model("tiny-f8", {"latent_channels": 4} | wider)
  tiny = variants.VARIANTS["tiny-f8"]
  assert found.encoder == tiny.encoder
  assert found.decoder[1:3] == tiny.decoder[1:3]
  assert (found.latent_channels, found.decoder[3].width) == (4, 256)


@pytest.mark.parametrize(
  ("variant", "config", "message"),
  [
    ("tiny-f9", {}, "unknown variant 'tiny-f9'; known are f32c32, "),
    ("tiny-f9", {"latent_channels": 4}, "unknown variant 'tiny-f9'"),
    ("tiny-f8", {"widths": [8]}, "'tiny-f8': 'widths' is no key of Autoencoder"
     "DC; there are in_channels, "),
    ("tiny-f8", {"latent_chanels": 8}, r"; did you mean 'latent_channels'\?$"),
    ("custom", {"latent_chanels": 8}, r"; did you mean 'latent_channels'\?$"),
    ("tiny-f8", {"_class_name": "AutoencoderKL"}, "is not 'AutoencoderDC', as"),
    ("tiny-f8", {"latent_channels": 0}, "latent_channels=0"),
    ("custom", {"encoder_block_out_channels": [8, 16]},
     r"^config.model.architecture of 'custom': encoder_.* of the 2 stages"),
    ("custom", {"_class_name": "AutoencoderKL", "block_out_channels": [-32]},
     r"block_out_channels\[0\]=-32 is not a whole number from 1"),
    ("custom", {"_class_name": "AutoencoderKL", "block_out_channels": [40]},
     "stage width 40 is not divisible by 32"),
    ("custom", {"_class_name": "Mine"}, "'Mine' is not among .* importing its "
     "module first$"),
  ],
)  # fmt: skip
def test_models_that_cannot_be_are_refused(variant, config, message):
  with pytest.raises(ValueError, match=message):
    families.of_model(variant, config)


@pytest.mark.parametrize("name", families.variants())
def test_a_described_architecture_needs_no_name(name):
  described = families.described(name, {}, 3)
  found = families.of_model("a name of elsewhere", described)
  assert found == families.check_variant(name)
  assert families.described(name, described, 3) == described
