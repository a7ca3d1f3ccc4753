"""Names and axes of released weights, without the libraries they are for."""

import functools
import json
import math
import shutil

import numpy as np
import pytest
import safetensors.numpy

import dcae_jax
from benchmarks import parity
from dcae_jax.autoencoder import families, network
from dcae_jax.autoencoder.dcae import variants
from dcae_jax.autoencoder.weights import conversion, released

CONFIG = parity.reduced(parity.CONFIGS["f32c32"]) | {"scaling_factor": 0.5}
FILE = conversion.LAYOUTS["diffusers"]


def random_tensors(config, layout):
  """Random tensors of a layout; the same values in each."""
  variant, channels = families.from_config(config)
  names = conversion.table(variant, channels, "diffusers")
  tensors = {}
  for entry, there in zip(
    conversion.table(variant, channels, layout), names, strict=True
  ):
    values = [
      parity.random_tensor(name, shape)
      for name, shape in there.tensor_shapes.items()
    ]
    if layout == "original" and not entry.is_count:
      values = entry.to_theirs(there.to_ours(values))
    tensors |= dict(zip(entry.names, values, strict=True))
  return tensors


@pytest.fixture(scope="session")
def write_model(tmp_path_factory):
  """A function that writes a folder of weights."""

  def write(config=CONFIG, layout="diffusers", tensors=None):
    folder = tmp_path_factory.mktemp("weights")
    tensors = tensors or random_tensors(config, layout)
    safetensors.numpy.save_file(tensors, folder / conversion.LAYOUTS[layout])
    if config is not None:
      (folder / "config.json").write_text(json.dumps(config))
    return folder

  return write


@functools.cache
def _abstract(name):
  return conversion._flat(network.abstract_variables(families.create(name), 3))


@pytest.mark.parametrize("layout", conversion.LAYOUTS)
@pytest.mark.parametrize("name", variants.VARIANTS)
def test_table_names_each_parameter_once(name, layout):
  variant = variants.VARIANTS[name]
  entries = conversion.table(variant, 3, layout)
  names = [name for entry in entries for name in entry.names]
  assert len(set(names)) == len(names)
  ours = _abstract(name)
  found = {e.path: e.shape for e in entries if not e.is_count}
  assert found == {path: leaf.shape for path, leaf in ours.items()}
  sizes = [math.prod(s) for e in entries for s in e.tensor_shapes.values()]
  assert sum(sizes) == sum(math.prod(e.shape) for e in entries)


# As the released files have them.
NAMES = """
f32c32 original
  encoder.project_in.conv.conv.weight 64 3 3 3
  encoder.stages.1.op_list.4.main.conv.conv.weight 128 256 3 3
  encoder.stages.3.op_list.1.context_module.main.qkv.conv.weight 1536 512 1 1
  encoder.project_out.main.op_list.0.conv.bias 32
  decoder.project_in.main.conv.bias 1024
  decoder.stages.1.op_list.5.main.conv2.norm.running_var 256
  decoder.stages.4.op_list.0.main.conv.conv.weight 4096 1024 3 3
  decoder.project_out.op_list.2.conv.conv.weight 12 256 3 3
f32c32-sana original
  encoder.project_in.conv.weight 128 3 3 3
  encoder.stages.0.op_list.2.main.conv.weight 256 128 3 3
  decoder.stages.5.op_list.2.context_module.main.aggreg.0.0.weight 3072 1 5 5
  decoder.stages.3.op_list.1.context_module.main.aggreg.0.1.weight 1536 32 1 1
  decoder.project_out.op_list.2.conv.weight 3 128 3 3
f64c128-1.5 original
  encoder.project_out.op_list.0.conv.bias 128
  decoder.project_in.conv.bias 1024
f64c128 diffusers
  encoder.conv_in.conv.weight 64 3 3 3
  encoder.down_blocks.6.1.attn.to_k.weight 2048 2048
  decoder.up_blocks.3.2.conv_out.conv_depth.weight 4096 1 3 3
  decoder.conv_out.conv.bias 12
f32c32-sana diffusers
  decoder.conv_out.weight 3 128 3 3
"""


def test_names_are_those_of_the_released_files():
  for line in NAMES.strip().splitlines():
    first, *others = line.split()
    if not line.startswith(" "):
      variant = variants.VARIANTS[first]
      expected = conversion.tensor_shapes(
        conversion.table(variant, 3, others[0])
      )
    else:
      assert expected[first] == tuple(map(int, others)), line


@pytest.mark.parametrize("name", parity.CONFIGS)
def test_released_configs_are_the_named_variants(name):
  variant, channels = families.from_config(parity.CONFIGS[name])
  assert variant == variants.VARIANTS[name] and channels == 3
  config = families.to_config(variant, 1, 0.25)
  assert families.from_config(config) == (variant, 1)
  assert config["scaling_factor"] == 0.25


@pytest.mark.parametrize("layout", conversion.LAYOUTS)
@pytest.mark.parametrize("name", ["f32c32", "f32c32-sana", "f64c128-1.5"])
def test_load_then_save_keeps_every_bit(write_model, tmp_path, name, layout):
  config = parity.reduced(parity.CONFIGS[name])
  folder = write_model(config, layout)
  dcae_jax.load(folder).save(tmp_path / "same", layout=layout)
  other = next(x for x in conversion.LAYOUTS if x != layout)
  dcae_jax.load(folder).save(tmp_path / "other", layout=other)
  dcae_jax.load(tmp_path / "other").save(tmp_path / "back", layout=layout)
  before = safetensors.numpy.load_file(folder / conversion.LAYOUTS[layout])
  for saved in ("same", "back"):
    after = safetensors.numpy.load_file(
      tmp_path / saved / conversion.LAYOUTS[layout]
    )
    assert after.keys() == before.keys()
    for tensor in before:
      assert after[tensor].dtype == before[tensor].dtype
      np.testing.assert_array_equal(after[tensor], before[tensor])


def test_layouts_hold_the_same_network(write_model):
  images = parity.random_images((1, 32, 64))
  loaded = [
    dcae_jax.load(write_model(layout=layout)) for layout in conversion.LAYOUTS
  ]
  a, b = (np.asarray(ae.encode(images)) for ae in loaded)
  np.testing.assert_array_equal(a, b)


def test_all_bad_tensors_are_listed(write_model):
  tensors = random_tensors(CONFIG, "diffusers")
  del tensors["encoder.conv_out.bias"], tensors["decoder.conv_in.weight"]
  tensors["surplus"] = np.zeros(3, np.float32)
  tensors["encoder.conv_out.weight"] = np.zeros((4, 128, 1, 1), np.float32)
  with pytest.raises(ValueError) as caught:
    dcae_jax.load(write_model(tensors=tensors))
  for part in (
    "4 tensors",
    "missing encoder.conv_out.bias [8]",
    "missing decoder.conv_in.weight [128, 8, 3, 3]",
    "unexpected surplus [3]",
    "encoder.conv_out.weight has the shape [4, 128, 1, 1], not [8, 128, 3, 3]",
  ):
    assert part in str(caught.value)


def test_shards_and_single_files_load(write_model, tmp_path):
  folder = write_model()
  tensors = safetensors.numpy.load_file(folder / FILE)
  names = sorted(tensors)
  shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
  for file, part in shards.items():
    safetensors.numpy.save_file({n: tensors[n] for n in part}, tmp_path / file)
  index = {n: file for file, part in shards.items() for n in part}
  index_file = tmp_path / f"{FILE}.index.json"
  index_file.write_text(json.dumps({"weight_map": index}))
  shutil.copy(folder / "config.json", tmp_path)
  expected = dcae_jax.load(folder).variables
  for path in (tmp_path, folder / FILE):
    found = conversion._flat(dcae_jax.load(path).variables)
    for name, leaf in conversion._flat(expected).items():
      np.testing.assert_array_equal(found[name], leaf)
  (tmp_path / "b.safetensors").unlink()
  with pytest.raises(ValueError, match=r"lacks the shards b\.safetensors"):
    dcae_jax.load(tmp_path)


def test_half_precision_files_load_as_float32(write_model):
  tensors = {
    name: x.astype(np.float16) if x.dtype == np.float32 else x
    for name, x in random_tensors(CONFIG, "diffusers").items()
  }
  ae = dcae_jax.load(write_model(tensors=tensors))
  found = ae.variables["params"]["encoder"]["project_out"]["conv"]["bias"]
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, tensors["encoder.conv_out.bias"])


TINY = families.to_config(variants.VARIANTS["tiny-f8"], 3, 1.0)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("encoder.conv_out.bias", np.nan),
    ("decoder.conv_in.weight", np.inf),
    ("decoder.up_blocks.1.1.norm.running_var", -1.0),
  ],
)
def test_values_that_cannot_be_weights_are_refused(write_model, name, value):
  tensors = random_tensors(CONFIG, "diffusers")
  tensors[name].flat[0] = value
  with pytest.raises(ValueError, match=f"{name} in .*not finite, or negative"):
    dcae_jax.load(write_model(tensors=tensors))


def test_indices_point_to_files_of_their_folder(write_model):
  folder = write_model()
  index = folder / f"{FILE}.index.json"
  for shard in ("../x.safetensors", "/etc/passwd", "x.bin", 3):
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match="not a safetensors file of that"):
      dcae_jax.load(folder)
  index.write_text("{}")
  with pytest.raises(ValueError, match='has no "weight_map"'):
    dcae_jax.load(folder)
  shutil.copy(folder / FILE, folder / "b.safetensors")
  shards = {"a": FILE, "b": "b.safetensors"}
  index.write_text(json.dumps({"weight_map": shards}))
  with pytest.raises(ValueError, match="is in both"):
    dcae_jax.load(folder)


@pytest.mark.parametrize(
  "path", ["", "https://x/y", "s3://b/x", "file:///x", "~nobody-here/x"]
)
def test_addresses_that_cannot_be_read_are_refused(path):
  with pytest.raises(ValueError, match="hub id"):
    dcae_jax.load(path)


@pytest.mark.parametrize("layout", conversion.LAYOUTS)
def test_variant_is_recognised_without_a_config(write_model, layout):
  folder = write_model(TINY, layout)
  (folder / "config.json").unlink()
  ae = dcae_jax.load(folder)
  assert ae.variant == "tiny-f8" and ae.scaling_factor is None
  folder = write_model(CONFIG, layout)
  (folder / "config.json").unlink()
  with pytest.raises(ValueError, match="not recognised as one of DC-AE"):
    dcae_jax.load(folder)


@pytest.mark.parametrize("name", parity.CONFIGS)
@pytest.mark.parametrize("layout", conversion.LAYOUTS)
def test_each_released_variant_is_recognised_by_its_shapes(name, layout):
  shapes = conversion.tensor_shapes(
    conversion.table(variants.VARIANTS[name], 3, layout)
  )
  found, *_ = released._recognise("a file", shapes)
  assert found == variants.VARIANTS[name]


def test_scaling_factor_comes_from_config_name_or_variant():
  in_and_mix = variants.VARIANTS["f32c32"]
  name = released._released_name
  for path in (
    "mit-han-lab/dc-ae-f32c32-mix-1.0-diffusers",
    "/x/models--mit-han-lab--dc-ae-f32c32-mix-1.0/snapshots/0/y.safetensors",
    "dc-ae-f32c32-mix-1.0.safetensors",
  ):
    found = name(path, None, in_and_mix)
    assert released._published_factor(found, in_and_mix) == 0.4552
  found = name("x", "dc-ae-f32c32-in-1.0", in_and_mix)
  assert released._published_factor(found, in_and_mix) == 0.3189
  assert name("dc-ae-f64c128-in-1.0", None, in_and_mix) == ""
  assert name("dc-ae-f32c32-mix-1.0/mine/model.x", None, in_and_mix) == ""
  assert released._published_factor("", in_and_mix) is None
  assert (
    released._published_factor("", variants.VARIANTS["f32c32-sana"]) == 0.41407
  )


def test_ambiguous_scaling_factor_must_be_given(monkeypatch, write_model):
  folder = write_model(TINY)
  (folder / "config.json").unlink()
  monkeypatch.setattr(
    released,
    "RELEASED",
    {"dc-ae-a": ("tiny-f8", 0.25), "dc-ae-b": ("tiny-f8", 0.5)},
  )
  with pytest.raises(ValueError, match=r"dc-ae-a: 0\.25, dc-ae-b: 0\.5"):
    dcae_jax.load(folder)
  assert dcae_jax.load(folder, scaling_factor=0.3).scaling_factor == 0.3
  named = folder.rename(folder.parent / "dc-ae-b-diffusers")
  assert dcae_jax.load(named).scaling_factor == 0.5
  (named / "config.json").write_text('{"scaling_factor": null}')
  assert dcae_jax.load(named).scaling_factor == 0.5


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"_class_name": "VQModel"}, "'VQModel' is not among AutoencoderDC, Auto"),
    ({"encoder_block_types": "Swin"}, "'Swin' is not among ResBlock, Eff"),
    ({"decoder_norm_types": "layer_norm"}, "not among rms_norm, batch_norm"),
    ({"decoder_act_fns": ["relu"]}, "one value for each of the 6 stages"),
    ({"latent_channels": 0}, "latent_channels=0 is not a whole number from 1"),
    ({"latent_channels": 7}, r"config\.json of .*cannot go from 128 to 7"),
    ({"encoder_layers_per_block": [10**9] * 6}, "from 0 to 100"),
    ({"scaling_factor": True}, "scaling_factor=True is not a positive number"),
    ({"encoder_block_out_channels": 3}, "=3 is not a list"),
    ({"scaling_factor": -1}, "scaling_factor=-1 is not a positive number"),
    ({"decoder_in_shortcut": "false"}, "neither true nor false"),
    ({"decoder_conv_act_fn": None}, "=None is not among silu, relu"),
    ({"decoder_act_fns": "identity"}, "'identity' is not among"),
    ({"attention_head_dim": 256}, "below 256, the channels of one attention"),
  ],
)
def test_bad_configs_say_what_is_wrong(write_model, changes, message):
  folder = write_model()
  (folder / "config.json").write_text(json.dumps(CONFIG | changes))
  with pytest.raises(ValueError, match=message):
    dcae_jax.load(folder)


def test_settings_that_diffusers_lacks_are_not_saved():
  variant = variants.Architecture(
    8,
    (variants.Stage(8, 1, norm="batch_norm"), variants.Stage(16, 1)),
    (variants.Stage(8, 1), variants.Stage(16, 1)),
  )
  with pytest.raises(ValueError, match="no AutoencoderDC config"):
    families.to_config(variant, 3, 1.0)


def test_absent_activations_are_saved_as_such(write_model, tmp_path):
  settings = {"decoder_act_fns": [None, "relu", None, *["Swish"] * 3]}
  dcae_jax.load(write_model(CONFIG | settings)).save(tmp_path / "again")
  config = json.loads((tmp_path / "again" / "config.json").read_text())
  assert config["decoder_act_fns"][1:4] == ["relu", None, "silu"]
  assert dcae_jax.load(tmp_path / "again").architecture.decoder[2].activation


def test_a_scaling_factor_beside_a_name_describes_no_architecture(write_model):
  folder = write_model(TINY, "original")
  config = {"model_name": "mine", "scaling_factor": 0.3, "in_channels": 3}
  (folder / "config.json").write_text(json.dumps(config))
  ae = dcae_jax.load(folder)
  assert ae.variant == "tiny-f8" and ae.scaling_factor == 0.3


def test_what_is_no_model_is_refused(write_model, tmp_path, monkeypatch):
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  with pytest.raises(ValueError, match="nor a hub id"):
    dcae_jax.load(tmp_path / "nothing")
  with pytest.raises(ValueError, match="hub did not give it"):
    dcae_jax.load("nobody/nothing")
  with pytest.raises(ValueError, match="no safetensors file"):
    dcae_jax.load(tmp_path)
  (tmp_path / "model.pt").write_bytes(b"pickle")
  for path in (tmp_path, tmp_path / "model.pt"):
    with pytest.raises(ValueError, match=r"is a pickle.*python -c"):
      dcae_jax.load(path)
  (tmp_path / "notes.txt").write_text("x")
  with pytest.raises(ValueError, match="not a safetensors file"):
    dcae_jax.load(tmp_path / "notes.txt")
  folder = write_model()
  whole = (folder / FILE).read_bytes()
  for damaged in (whole[: len(whole) // 2], whole[:100], b""):
    (folder / FILE).write_bytes(damaged)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
      dcae_jax.load(folder)
  (folder / FILE).write_bytes(whole)
  (folder / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json is damaged"):
    dcae_jax.load(folder)
  shutil.copy(folder / FILE, folder / "second.safetensors")
  with pytest.raises(ValueError, match="several models"):
    dcae_jax.load(folder)


def test_hub_models_come_from_the_cache(write_model, tmp_path, monkeypatch):
  folder = write_model()
  model = tmp_path / "models--somebody--dc-ae-f32c32-mix-1.0-diffusers"
  commit = "0123456789abcdef0123456789abcdef01234567"
  shutil.copytree(folder, model / "snapshots" / commit)
  (model / "refs").mkdir()
  (model / "refs" / "main").write_text(commit)
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
  ae = dcae_jax.load("somebody/dc-ae-f32c32-mix-1.0-diffusers")
  assert ae.scaling_factor == 0.5  # the config knows better than the name
