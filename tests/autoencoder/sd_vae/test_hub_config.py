"""SD-VAE's configs and files, and the autoencoder made from them."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import dcae_jax
from autoencoder.weights.test_conversion import random_tensors
from benchmarks import parity
from dcae_jax.autoencoder import families, network
from dcae_jax.autoencoder.dcae import variants as dcae_variants
from dcae_jax.autoencoder.sd_vae import variants as sd_vae_variants
from dcae_jax.autoencoder.weights import conversion, released

FILE = conversion.LAYOUTS["diffusers"]
CONFIG = {
  "_class_name": "AutoencoderKL",
  "block_out_channels": [8, 16, 16],
  "down_block_types": ["DownEncoderBlock2D"] * 3,
  "up_block_types": ["UpDecoderBlock2D"] * 3,
  "norm_num_groups": 4,
}
# As the most used one is published.
PUBLISHED = {
  "_class_name": "AutoencoderKL",
  "_diffusers_version": "0.4.2",
  "act_fn": "silu",
  "block_out_channels": [128, 256, 512, 512],
  "down_block_types": ["DownEncoderBlock2D"] * 4,
  "in_channels": 3,
  "latent_channels": 4,
  "layers_per_block": 2,
  "norm_num_groups": 32,
  "out_channels": 3,
  "sample_size": 256,
  "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TINY = families.to_config(sd_vae_variants.VARIANTS["tiny-sd-vae-f8"], 3, 0.5)


def _write(folder, config=CONFIG, tensors=None):
  folder.mkdir(parents=True, exist_ok=True)
  tensors = tensors or random_tensors(config, "diffusers")
  safetensors.numpy.save_file(tensors, folder / FILE)
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def _images(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (*shape, 3)).astype(np.uint8)


def _assert_same_leaves(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return _write(tmp_path_factory.mktemp("sd_vae") / "model")


@pytest.fixture(scope="module")
def ae(folder):
  return dcae_jax.load(folder)


def test_the_published_config_is_f8c4():
  variant, channels = families.from_config(PUBLISHED)
  assert variant is sd_vae_variants.VARIANTS["sd-vae-f8c4"] and channels == 3
  assert families.name_of(variant) == "sd-vae-f8c4"
  later = {"force_upcast": True, "latents_mean": None, "act_fn": "swish"}
  assert families.from_config(PUBLISHED | later) == (variant, 3)


@pytest.mark.parametrize("name", sd_vae_variants.VARIANTS)
def test_table_names_each_parameter_once(name):
  variant = sd_vae_variants.VARIANTS[name]
  entries = conversion.table(variant, 3, "diffusers")
  names = [name for entry in entries for name in entry.names]
  assert len(set(names)) == len(names)
  abstract = network.abstract_variables(families.create(variant), 3)
  assert {e.path: e.shape for e in entries} == {
    path: leaf.shape for path, leaf in conversion._flat(abstract).items()
  }


# As the published file has them.
NAMES = """
encoder.conv_in.weight 128 3 3 3
encoder.down_blocks.0.downsamplers.0.conv.weight 128 128 3 3
encoder.down_blocks.1.resnets.0.conv_shortcut.weight 256 128 1 1
encoder.down_blocks.3.resnets.1.norm2.bias 512
encoder.mid_block.attentions.0.group_norm.weight 512
encoder.mid_block.attentions.0.to_q.weight 512 512
encoder.mid_block.resnets.1.conv1.weight 512 512 3 3
encoder.conv_norm_out.weight 512
encoder.conv_out.weight 8 512 3 3
quant_conv.weight 8 8 1 1
post_quant_conv.bias 4
decoder.conv_in.weight 512 4 3 3
decoder.mid_block.attentions.0.to_out.0.bias 512
decoder.up_blocks.0.resnets.2.conv2.weight 512 512 3 3
decoder.up_blocks.2.upsamplers.0.conv.bias 256
decoder.up_blocks.3.resnets.0.conv_shortcut.weight 128 256 1 1
decoder.conv_out.weight 3 128 3 3
"""


def test_names_are_those_of_the_published_file():
  expected = conversion.tensor_shapes(
    conversion.table(sd_vae_variants.VARIANTS["sd-vae-f8c4"], 3, "diffusers")
  )
  for line in NAMES.strip().splitlines():
    name, *shape = line.split()
    assert expected[name] == tuple(map(int, shape)), line
  assert len(expected) == 248
  assert not any("3.downsamplers" in name for name in expected)


@pytest.mark.parametrize("name", parity.SD_VAES)
def test_load_then_save_keeps_every_bit(tmp_path, name):
  config = parity.reduced(parity.SD_VAES[name]) | {"in_channels": 1}
  config["out_channels"] = 1
  before = random_tensors(config, "diffusers")
  loaded = dcae_jax.load(_write(tmp_path / "a", config, before))
  assert loaded.image_channels == 1
  loaded.save(tmp_path / "b")
  after = safetensors.numpy.load_file(tmp_path / "b" / FILE)
  assert after.keys() == before.keys()
  for tensor in before:
    np.testing.assert_array_equal(after[tensor], before[tensor])
  again = dcae_jax.load(tmp_path / "b")
  assert again.architecture == loaded.architecture


@pytest.mark.parametrize("as_kernels", [False, True])
def test_older_names_of_attention_load(tmp_path, ae, as_kernels):
  older = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
  }
  tensors = {}
  for name, tensor in random_tensors(CONFIG, "diffusers").items():
    for now, before in older.items():
      if now in name:
        name = name.replace(now, before)
        if as_kernels and tensor.ndim == 2:
          tensor = tensor[:, :, None, None]
    tensors[name] = tensor
  assert "encoder.mid_block.attentions.0.proj_attn.bias" in tensors
  found = dcae_jax.load(_write(tmp_path, tensors=tensors))
  _assert_same_leaves(found.variables, ae.variables)
  del tensors["decoder.mid_block.attentions.0.key.bias"]
  with pytest.raises(ValueError, match=r"1 tensors: missing .*0\.key\.bias"):
    dcae_jax.load(_write(tmp_path, tensors=tensors))


def test_the_file_is_recognised_without_a_config(tmp_path):
  shapes = conversion.tensor_shapes(
    conversion.table(sd_vae_variants.VARIANTS["sd-vae-f8c4"], 3, "diffusers")
  )
  found, *_ = released._recognise("a file", shapes)
  assert found is sd_vae_variants.VARIANTS["sd-vae-f8c4"]
  (_write(tmp_path, TINY) / "config.json").unlink()
  loaded = dcae_jax.load(tmp_path / FILE, scaling_factor=2.0)
  assert loaded.variant == "tiny-sd-vae-f8" and loaded.scaling_factor == 2.0
  (_write(tmp_path) / "config.json").unlink()
  with pytest.raises(ValueError, match="recognised as one of DC-AE, SD-VAE"):
    dcae_jax.load(tmp_path / FILE)


def test_scaling_factor_comes_from_config_default_or_name():
  f8c4 = sd_vae_variants.VARIANTS["sd-vae-f8c4"]
  for path, factor in (
    ("stabilityai/sd-vae-ft-mse", 0.18215),
    ("/x/models--stabilityai--sd-vae-ft-ema/snapshots/0/y", 0.18215),
    ("sdxl-vae.safetensors", 0.13025),
    ("other", None),  # those above differ: it must be given
  ):
    name = released._released_name(path, None, f8c4)
    assert released._published_factor(name, f8c4) == factor


def test_the_class_has_its_own_default_scaling_factor(ae):
  assert ae.scaling_factor == 0.18215 and ae.shift_factor == 0.0
  assert ae.variant == "custom"
  assert (ae.spatial_compression, ae.latent_channels) == (4, 4)


def test_scaling_and_shift_are_kept_and_described(tmp_path):
  config = TINY | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
  loaded = dcae_jax.load(_write(tmp_path / "a", config))
  assert loaded.shift_factor == 0.0609
  loaded.save(tmp_path / "b")
  again = dcae_jax.load(tmp_path / "b")
  assert (again.scaling_factor, again.shift_factor) == (1.5305, 0.0609)
  card = (tmp_path / "b" / "README.md").read_text()
  for part in (
    "# SD-VAE, tiny-sd-vae-f8",
    "AutoencoderKL.from_pretrained",
    "Subtract the shift factor, 0.0609,",
    "arXiv 2112.10752",
    "mean of a normal distribution",
  ):
    assert part in card
  assert "2410.10733" not in card
  images = _images(2, 32, 32)
  z = np.asarray(loaded.encode(images), np.float64)
  factor = loaded.measure_scaling_factor([images])
  rms = np.sqrt(np.mean(np.square(z - 0.0609)))
  np.testing.assert_allclose(factor, 1 / rms, rtol=1e-5)


def test_only_diffusers_has_an_sd_vae(ae, tmp_path):
  with pytest.raises(ValueError, match="whose code has no SD-VAE"):
    ae.save(tmp_path / "x", layout="original")
  assert not (tmp_path / "x").exists()
  with pytest.raises(ValueError, match="AutoencoderDC has no shift_factor"):
    families.to_config(dcae_variants.VARIANTS["f32c32"], 3, 1.0, 0.1)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"down_block_types": ["DownEncoderBlock2D"]}, "block for each of the 3"),
    ({"up_block_types": "UpDecoderBlock2D"}, "block for each of the 3"),
    ({"up_block_types": ["UpBlock2D"] * 3}, r"up_block_types\[0\]='UpBlock2D'"),
    ({"act_fn": "relu"}, "act_fn='relu' is not among silu"),
    ({"out_channels": 1}, "in_channels=3 and out_channels=1 differ"),
    ({"block_out_channels": []}, r"=\[\] is not a list of widths"),
    ({"block_out_channels": [8, 16, 0]}, r"block_out_channels\[2\]=0"),
    ({"norm_num_groups": 3}, "width 8 is not divisible by 3"),
    ({"layers_per_block": [2, 2, 2]}, r"layers_per_block=\[2, 2, 2\]"),
    ({"latent_channels": 0}, "latent_channels=0"),
    ({"use_quant_conv": "yes"}, "neither true nor false"),
    ({"mid_block_add_attention": 1}, "neither true nor false"),
    ({"scaling_factor": 0}, "scaling_factor=0 is not a positive number"),
    ({"shift_factor": "x"}, "shift_factor='x' is not a number"),
    ({"use_quant_conv": False}, "unexpected quant_conv.bias"),
    ({"mid_block_add_attention": False}, "20 tensors: unexpected decoder.mid"),
  ],
)
def test_bad_configs_say_what_is_wrong(tmp_path, changes, message):
  tensors = random_tensors(CONFIG, "diffusers")
  _write(tmp_path, CONFIG | changes, tensors)
  with pytest.raises(ValueError, match=message):
    dcae_jax.load(tmp_path)


def test_first_channels_are_not_those_of_dcae_1_5(ae):
  with pytest.raises(ValueError, match=r"DC-AE 1\.5"):
    ae.encode(_images(1, 8, 8), channels=2)


def test_space_to_channel_is_consistent_everywhere(folder, ae, tmp_path):
  moved = dcae_jax.load(folder, space_to_channel=8)
  assert (moved.spatial_compression, moved.latent_channels) == (32, 256)
  assert moved.scaling_factor == ae.scaling_factor
  images = _images(1, 64, 96)
  z = moved.encode(images)
  assert z.shape == (1, 2, 3, 256)
  rms = lambda z: np.sqrt(np.mean(np.square(z, dtype=np.float64)))
  np.testing.assert_allclose(rms(z), rms(ae.encode(images)), rtol=1e-6)
  np.testing.assert_array_equal(moved.decode(z), ae.reconstruct(images))
  # Padding to its own compression, and tiles of its own latents.
  odd = images[:, :50, :70]
  with pytest.raises(ValueError, match=r"50 is not divisible by 32"):
    moved.encode(odd)
  assert moved.encode(odd, pad="reflect").shape == (1, 2, 3, 256)
  assert moved.reconstruct(odd, pad="edge").shape == odd.shape
  tiled = moved.encode(images, tile=64, stride=32)
  assert tiled.shape == z.shape
  with pytest.raises(ValueError, match="multiple of 32"):
    moved.encode(images, tile=36)
  with pytest.raises(ValueError, match="this autoencoder 256"):
    moved.decode(ae.encode(images))
  with pytest.raises(ValueError, match=r"space_to_channel=8 is no part"):
    moved.save(tmp_path / "x")
  assert not (tmp_path / "x").exists()
  with pytest.raises(ValueError, match="from 1 to 64"):
    dcae_jax.load(folder, space_to_channel=0)


def test_hub_repositories_with_a_second_file_give_diffusers_own(
  folder, ae, tmp_path, monkeypatch
):
  """As stabilityai/sdxl-vae, which has its weights in two layouts."""
  commit = "0123456789abcdef0123456789abcdef01234567"
  model = tmp_path / "models--somebody--sdxl-vae"
  snapshot = model / "snapshots" / commit
  snapshot.parent.mkdir(parents=True)
  snapshot.mkdir()
  for file in folder.iterdir():
    (snapshot / file.name).write_bytes(file.read_bytes())
  (snapshot / "sdxl_vae.safetensors").write_bytes(b"another layout")
  (model / "refs").mkdir()
  (model / "refs" / "main").write_text(commit)
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
  found = dcae_jax.load("somebody/sdxl-vae")
  _assert_same_leaves(found.variables, ae.variables)
  with pytest.raises(ValueError, match="several models"):
    dcae_jax.load(snapshot)
