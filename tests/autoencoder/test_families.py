"""The table of families: a third one, and how a run names its architecture."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from etils import epath

import dcae_jax
from dcae_jax.autoencoder import families, family, network
from dcae_jax.autoencoder.dcae import residual_autoencoding, variants
from dcae_jax.autoencoder.weights import module_name
from dcae_jax.nn import convolution
from dcae_jax.tasks import train_autoencoder

DEFAULTS = {
  "in_channels": 3, "latent_channels": 4, "width": 8, "scaling_factor": 1.0
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Toy:
  """Two convolutions each way."""

  latent_channels: int
  width: int
  spatial_compression = 2


class Projection(nn.Module):
  channels: int
  stride: int = 1

  @nn.compact
  def __call__(self, x):
    return convolution.Conv(self.channels, stride=self.stride, name="conv")(x)


class Encoder(nn.Module):
  architecture: Toy

  @nn.compact
  def __call__(self, images):
    x = Projection(self.architecture.width, 2, name="project_in")(images)
    latent_channels = self.architecture.latent_channels
    return Projection(latent_channels, name="project_out")(jax.nn.silu(x))


class Decoder(nn.Module):
  architecture: Toy
  image_channels: int

  @nn.compact
  def __call__(self, z):
    x = Projection(self.architecture.width, name="project_in")(z)
    x = residual_autoencoding.nearest(jax.nn.silu(x))
    return Projection(self.image_channels, name="project_out")(x)


def _from_config(config):
  c = DEFAULTS | config
  return Toy(c["latent_channels"], c["width"]), c["in_channels"]


TOY = family.Family(
  name="Toy",
  class_name="AutoencoderToy",
  title="Toy",
  tag="toy",
  source="this test",
  architecture=Toy,
  variants={"toy": Toy(4, 8), "toy-narrow": Toy(4, 6)},
  create=lambda architecture, channels, options: network.Network(
    architecture,
    Encoder(architecture),
    Decoder(architecture, channels),
    options,
  ),
  config_defaults=DEFAULTS,
  from_config=_from_config,
  to_config=lambda architecture, channels, scaling_factor, shift_factor: {
    "_class_name": "AutoencoderToy",
    "in_channels": channels,
    **dataclasses.asdict(architecture),
    "scaling_factor": scaling_factor,
  },
  modules=lambda architecture: (
    module_name.Module(
      f"{part}/{place}/conv", "", f"{part}.{place.removeprefix('project_')}"
    )
    for part in ("encoder", "decoder")
    for place in ("project_in", "project_out")
  ),
)


@pytest.fixture(scope="module")
def toy_family():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(families, "FAMILIES", (*families.FAMILIES, TOY))
    yield TOY


@pytest.fixture(scope="module")
def phases(toy_family, tiny_config, tmp_path_factory):
  """The work directories of a toy's three phases."""
  folder = tmp_path_factory.mktemp("toy")
  before = ""
  for number in (1, 2, 3):
    changes = {"model.variant": "toy-narrow" if number == 1 else "", "steps": 2}
    config = tiny_config(number, init_from=before, **changes)
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


def test_a_run_is_loaded_where_its_variant_is_not_known(phases, monkeypatch):
  monkeypatch.delitem(TOY.variants, "toy-narrow")
  ae = dcae_jax.load(phases / "phase3")
  assert (ae.variant, ae.architecture) == ("custom", Toy(4, 6))


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
    ("tiny-f8", {"widths": [8]}, r"does not fit 'tiny-f8', an AutoencoderDC"),
    ("tiny-f8", {"_class_name": "AutoencoderKL"}, "does not fit 'tiny-f8'"),
    ("tiny-f8", {"latent_channels": 0}, "latent_channels=0"),
  ],
)
def test_models_that_cannot_be_are_refused(variant, config, message):
  with pytest.raises(ValueError, match=message):
    families.of_model(variant, config)


@pytest.mark.parametrize("name", families.variants())
def test_a_described_architecture_needs_no_name(name):
  described = families.described(name, {}, 3)
  found = families.of_model("a name of elsewhere", described)
  assert found == families.check_variant(name)
  assert families.described(name, described, 3) == described
