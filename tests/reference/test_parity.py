"""Encode, decode and files against diffusers' AutoencoderDC."""

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders import single_file_utils

import dcae_jax
from benchmarks import parity
from dcae_jax.autoencoder.weights import conversion

ORIGINAL = conversion.LAYOUTS["original"]


@pytest.fixture(scope="module", params=parity.CONFIGS)
def pair(request, tmp_path_factory):
  """Their model at reduced width, and ours with the same weights."""
  config = parity.reduced(parity.CONFIGS[request.param])
  return _pair(config | {"scaling_factor": 0.25}, tmp_path_factory)


def _pair(config, tmp_path_factory):
  theirs = parity.reference(config)
  folder = tmp_path_factory.mktemp("theirs")
  theirs.save_pretrained(folder)
  return theirs, dcae_jax.load(folder)


def test_encode_and_decode_equal_diffusers(pair):
  theirs, ours = pair
  for shape in parity.sizes(ours.spatial_compression).values():
    images = parity.random_images(shape)
    expected = parity.reference_outputs(theirs, images)
    assert max(parity.errors(ours, images, *expected)) < 1e-4


def test_f32c32_equals_diffusers_at_full_width(tmp_path_factory):
  theirs, ours = _pair(parity.CONFIGS["f32c32"], tmp_path_factory)
  assert ours.variant == "f32c32"
  images = parity.random_images((1, 64, 96))
  expected = parity.reference_outputs(theirs, images)
  assert max(parity.errors(ours, images, *expected)) < 1e-4


def test_saved_folders_load_in_diffusers_with_every_bit(pair, tmp_path):
  theirs, ours = pair
  ours.save(tmp_path / "original", layout="original")
  again = dcae_jax.load(tmp_path / "original")
  again.save(tmp_path / "diffusers", layout="diffusers")
  model, report = diffusers.AutoencoderDC.from_pretrained(
    tmp_path / "diffusers", output_loading_info=True
  )
  assert not any(report.values()), report
  assert model.config.scaling_factor == 0.25
  expected, found = theirs.state_dict(), model.state_dict()
  assert found.keys() == expected.keys()
  assert all(torch.equal(found[name], expected[name]) for name in expected)
  images = parity.random_images((1, 128, 128))
  outputs = (
    parity.reference_outputs(m.eval(), images) for m in (model, theirs)
  )
  for a, b in zip(*outputs, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["f32c32", "f64c128", "f32c32-sana"])
def test_original_layout_is_what_diffusers_converts(name, tmp_path_factory):
  config = parity.reduced(parity.CONFIGS[name])
  theirs, ours = _pair(config, tmp_path_factory)
  folder = tmp_path_factory.mktemp("original")
  ours.save(folder, layout="original")
  original = safetensors.torch.load_file(folder / ORIGINAL)
  convert = single_file_utils.convert_autoencoder_dc_checkpoint_to_diffusers
  found, expected = convert(original), theirs.state_dict()
  assert found.keys() == expected.keys()
  assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("channels", [1, 5, 16])
def test_first_channels_are_those_of_sliced_convolutions(
  channels, tmp_path_factory
):
  """Diffusers has no such thing: the projections are written out here."""
  config = parity.reduced(parity.CONFIGS["f64c128-1.5"])
  theirs, ours = _pair(config, tmp_path_factory)
  images = parity.random_images((2, 64, 128))
  last, first = theirs.encoder.conv_out, theirs.decoder.conv_in
  theirs.encoder.conv_out = torch.nn.Identity()
  theirs.decoder.conv_in = torch.nn.Identity()
  convolve = torch.nn.functional.conv2d
  with torch.no_grad():
    x = theirs.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latent
    z = convolve(x, last.weight[:channels], last.bias[:channels], padding=1)
    x = convolve(z, first.weight[:, :channels], first.bias, padding=1)
    y = theirs.decode(x).sample
  z, y = (x.numpy().transpose(0, 2, 3, 1) for x in (z, y))
  found = ours.encode(images, channels=channels)
  assert parity.relative_error(found, z) < 1e-4
  found = ours.decode(z, channels=channels)
  assert parity.relative_error(found, y) < 1e-4


# Structures that no released model has.
UNUSUAL = {
  "one scale more, other heads, asymmetric": {
    "latent_channels": 6,
    "attention_head_dim": 16,
    "encoder_block_types": ["ResBlock", "EfficientViTBlock", "ResBlock"],
    "decoder_block_types": ["EfficientViTBlock", "ResBlock", "ResBlock"],
    "encoder_block_out_channels": [24, 48, 48],
    "decoder_block_out_channels": [18, 36, 72],
    "encoder_layers_per_block": [1, 2, 1],
    "decoder_layers_per_block": [1, 3, 0],
    "encoder_qkv_multiscales": [[], [3, 7], []],
    "decoder_qkv_multiscales": [[5, 5], [], []],
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": False,
    "decoder_norm_types": "batch_norm",
    "decoder_act_fns": ["gelu", "mish", "relu"],
    "decoder_conv_act_fn": "gelu",
    "in_channels": 1,
  },
  "strided and interpolated at the image, no first stage": {
    "latent_channels": 8,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [16, 32, 64],
    "decoder_block_out_channels": [16, 64, 64],
    "encoder_layers_per_block": [0, 1, 2],
    "decoder_layers_per_block": [0, 2, 1],
    "encoder_qkv_multiscales": [[], [], []],
    "decoder_qkv_multiscales": [[], [], [3]],
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "encoder_out_shortcut": False,
    "decoder_norm_types": ["rms_norm", "rms_norm", "batch_norm"],
    "decoder_act_fns": "mish",
    "decoder_conv_act_fn": "swish",
  },
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_any_config_of_diffusers_loads(name, tmp_path_factory):
  theirs, ours = _pair(UNUSUAL[name], tmp_path_factory)
  assert ours.variant == "custom" and ours.spatial_compression == 4
  images = parity.random_images((2, 16, 28))[..., : ours.image_channels]
  expected = parity.reference_outputs(theirs, images)
  assert max(parity.errors(ours, images, *expected)) < 1e-4
