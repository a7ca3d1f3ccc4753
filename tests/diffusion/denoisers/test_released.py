"""Files in the authors' layouts, by the names and shapes that they publish."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import numpy_denoisers
import pytest
import safetensors.numpy

from dcae_jax.diffusion import conditioning, objectives
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.diffusion.denoisers import released

D, WIDTH, CLASSES = 128, 20, 7  # of a tiny one; no other has these channels


def _linear(name, out, inside, bias=True):
  shapes = {f"{name}.weight": (out, inside)}
  return shapes | ({f"{name}.bias": (out,)} if bias else {})


def _uvit():
  shapes = {
    "patch_embed.proj.weight": (D, 6, 2, 2), "patch_embed.proj.bias": (D,),
    "pos_embed": (1, 2 + 9, D),
    "label_emb.embedding_table.weight": (CLASSES + 1, D),
    "norm.weight": (D,), "norm.bias": (D,),
  } | _linear("decoder_pred", 24, D)  # fmt: skip
  for block in ("in_blocks.0", "mid_block", "out_blocks.0"):
    for norm in ("norm1", "norm2"):
      shapes |= {f"{block}.{norm}.{x}": (D,) for x in ("weight", "bias")}
    shapes |= _linear(f"{block}.attn.qkv", 3 * D, D, bias=False)
    shapes |= _linear(f"{block}.attn.proj", D, D)
    shapes |= _linear(f"{block}.mlp.fc1", 4 * D, D)
    shapes |= _linear(f"{block}.mlp.fc2", D, 4 * D)
  return shapes | _linear("out_blocks.0.skip_linear", D, 2 * D)


def _dit():
  shapes = {
    "x_embedder.proj.weight": (D, 6, 2, 2), "x_embedder.proj.bias": (D,),
    "pos_embed": (1, 9, D),
    "y_embedder.embedding_table.weight": (CLASSES + 1, D),
  }  # fmt: skip
  shapes |= _linear("t_embedder.mlp.0", D, 256)
  shapes |= _linear("t_embedder.mlp.2", D, D)
  for i in range(2):
    shapes |= _linear(f"blocks.{i}.attn.qkv", 3 * D, D)
    shapes |= _linear(f"blocks.{i}.attn.proj", D, D)
    shapes |= _linear(f"blocks.{i}.mlp.fc1", 4 * D, D)
    shapes |= _linear(f"blocks.{i}.mlp.fc2", D, 4 * D)
    shapes |= _linear(f"blocks.{i}.adaLN_modulation.1", 6 * D, D)
  shapes |= _linear("final_layer.adaLN_modulation.1", 2 * D, D)
  return shapes | _linear("final_layer.linear", 48, D)


def _captioned(patch_size, tokens):
  p = patch_size
  shapes = {
    "x_embedder.proj.weight": (D, 6, p, p), "x_embedder.proj.bias": (D,),
    "y_embedder.y_embedding": (tokens, WIDTH),
    "final_layer.scale_shift_table": (2, D),
  }  # fmt: skip
  shapes |= _linear("t_embedder.mlp.0", D, 256)
  shapes |= _linear("t_embedder.mlp.2", D, D)
  shapes |= _linear("t_block.1", 6 * D, D)
  shapes |= _linear("y_embedder.y_proj.fc1", D, WIDTH)
  shapes |= _linear("y_embedder.y_proj.fc2", D, D)
  for i in range(2):
    shapes[f"blocks.{i}.scale_shift_table"] = (6, D)
    shapes |= _linear(f"blocks.{i}.attn.proj", D, D)
    shapes |= _linear(f"blocks.{i}.cross_attn.q_linear", D, D)
    shapes |= _linear(f"blocks.{i}.cross_attn.kv_linear", 2 * D, D)
    shapes |= _linear(f"blocks.{i}.cross_attn.proj", D, D)
  return shapes


def _pixart():
  shapes = _captioned(2, 5) | {"pos_embed": (1, 9, D)}
  for i in range(2):
    shapes |= _linear(f"blocks.{i}.attn.qkv", 3 * D, D)
    shapes |= _linear(f"blocks.{i}.mlp.fc1", 4 * D, D)
    shapes |= _linear(f"blocks.{i}.mlp.fc2", D, 4 * D)
  return shapes | _linear("final_layer.linear", 48, D)


def _sana():
  shapes = _captioned(1, 5) | {"attention_y_norm.weight": (D,)}
  for i in range(2):
    name, hidden = f"blocks.{i}", 2 * 320
    for attention in ("attn", "cross_attn"):
      shapes[f"{name}.{attention}.q_norm.weight"] = (D,)
      shapes[f"{name}.{attention}.k_norm.weight"] = (D,)
    shapes |= _linear(f"{name}.attn.qkv", 3 * D, D, bias=False)
    shapes[f"{name}.mlp.inverted_conv.conv.weight"] = (hidden, D, 1, 1)
    shapes[f"{name}.mlp.inverted_conv.conv.bias"] = (hidden,)
    shapes[f"{name}.mlp.depth_conv.conv.weight"] = (hidden, 1, 3, 3)
    shapes[f"{name}.mlp.depth_conv.conv.bias"] = (hidden,)
    shapes[f"{name}.mlp.point_conv.conv.weight"] = (D, 320, 1, 1)
  return shapes | _linear("final_layer.linear", 6, D)


ORIGINALS = {"UViT": _uvit, "DiT": _dit, "PixArt": _pixart, "SANA": _sana}
SCALE = {"DiT": 1.0, "PixArt": 2.0}  # of positions that are not learned


def _tensors(family):
  """Random, but for the fixed positions of a grid of 3x3."""
  rng = np.random.default_rng(0)
  tensors = {
    name: rng.normal(size=shape).astype("float32")
    for name, shape in ORIGINALS[family]().items()
  }
  if family in SCALE:
    places = [
      numpy_denoisers.place(i / SCALE[family], j / SCALE[family], D)
      for i in range(3)
      for j in range(3)
    ]
    tensors["pos_embed"] = np.array([places], "float32")
  if family in ("UViT", "DiT"):
    tensors = {f"diffusion_model.{n}": x for n, x in tensors.items()}
  return tensors


def _write(folder, tensors, config=None):
  folder.mkdir(exist_ok=True)
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  if config is not None:
    (folder / "config.json").write_text(json.dumps(config))
  return str(folder)


SIT = objectives.FlowMatching(convention="sit")
UVIT = objectives.NoisePrediction(0.00085, 0.012, "scaled_linear", first_time=1)


@pytest.fixture(params=list(ORIGINALS))
def original(request, tmp_path):
  tensors = _tensors(request.param)
  return request.param, tensors, _write(tmp_path / "original", tensors)


def test_files_are_recognised_by_their_tensors_alone(original):
  family, _, source = original
  found = released.find(source)
  patch_size = 1 if family == "SANA" else 2
  fields = {"depth": 2, "hidden": D, "heads": 4}
  fields |= {
    "PixArt": {"size_conditions": False, "interpolation_scale": 2.0},
    "SANA": {
      "qk_norm": True, "guidance_embedding": False,
      "interpolation_scale": None,
    },
  }.get(family, {})  # fmt: skip
  kind = conditioning.ClassLabels(CLASSES)
  if family in ("PixArt", "SANA"):
    kind = conditioning.Captions(5, WIDTH)
  assert found.variant == denoisers.Variant(family, fields)
  assert found.latent_size == (32 if family == "SANA" else 6)
  assert found.latent_channels == 6 and found.patch_size == patch_size
  assert found.learn_sigma == (family in ("DiT", "PixArt"))
  assert found.conditioning == kind and found.layout == "original"
  usual = {
    "UViT": UVIT, "SANA": objectives.FlowMatching((0.0, 1.0), 3.0),
  }  # fmt: skip
  assert found.objective == usual.get(family, objectives.improved_ddpm())
  assert (found.autoencoder, found.scaling_factor) == ("", None)


def test_every_tensor_comes_back_bit_for_bit(original, tmp_path):
  _, tensors, source = original
  found = released.find(source)
  variables, model = released.read(found), released.create(found)
  released.save(tmp_path / "again", variables, model, "original")
  file = tmp_path / "again" / "model.safetensors"
  again = safetensors.numpy.load_file(file)
  assert again.keys() == tensors.keys()
  for name, x in tensors.items():
    np.testing.assert_array_equal(again[name], x, err_msg=name)
  same = released.find(str(tmp_path / "again"))
  assert same.entries == found.entries
  assert denoisers.abstract_variables(released.create(same)) == (
    denoisers.abstract_variables(model)
  )
  shapes = jax.eval_shape(
    model.apply, variables, *numpy_denoisers.random_inputs(model)
  )
  assert shapes.shape[-1] == 6 * (1 + found.learn_sigma)


def test_arrays_are_turned_as_layers_need_them(tmp_path):
  tensors = _tensors("UViT")
  found = released.find(_write(tmp_path / "uvit", tensors))
  params = released.read(found)["params"]
  tensor = lambda name: tensors[f"diffusion_model.{name}"]
  kernel = tensor("patch_embed.proj.weight").transpose(2, 3, 1, 0)
  block = params["out_block_0"]
  for ours, theirs in (
    (params["project_in"]["kernel"], kernel.reshape(24, D)),
    (params["positions"], tensor("pos_embed")[0]),
    (
      params["label_embedding"]["embedding"],
      tensor("label_emb.embedding_table.weight"),
    ),
    (block["merge"]["kernel"], tensor("out_blocks.0.skip_linear.weight").T),
    (
      block["attention"]["qkv"]["kernel"],
      tensor("out_blocks.0.attn.qkv.weight").T,
    ),
    (
      params["middle_block"]["norm2"]["scale"],
      tensor("mid_block.norm2.weight"),
    ),
  ):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("family", ["PixArt", "SANA"])
def test_both_layouts_hold_the_same(family, tmp_path):
  tensors = _tensors(family)
  found = released.find(_write(tmp_path / "original", tensors))
  variables, model = released.read(found), released.create(found)
  released.save(tmp_path / "new", variables, model, "diffusers")
  file = tmp_path / "new" / "diffusion_pytorch_model.safetensors"
  new = safetensors.numpy.load_file(file)
  parts = [new[f"transformer_blocks.1.attn1.to_{x}.weight"] for x in "qkv"]
  qkv = tensors["blocks.1.attn.qkv.weight"]
  np.testing.assert_array_equal(np.concatenate(parts), qkv)
  parts = [new[f"transformer_blocks.0.attn2.to_{x}.bias"] for x in "kv"]
  kv = tensors["blocks.0.cross_attn.kv_linear.bias"]
  np.testing.assert_array_equal(np.concatenate(parts), kv)
  # The null caption stands beside them.
  own = {"y_embedder.y_embedding", "pos_embed"}
  count = sum(x.size for name, x in tensors.items() if name not in own)
  assert sum(x.size for x in new.values()) == count
  again = released.find(str(tmp_path / "new"))
  assert again.layout == "diffusers"
  jax.tree.map(np.testing.assert_array_equal, released.read(again), variables)
  assert released.create(again) == model


def test_weights_without_a_null_caption_get_zeros_and_a_warning(
  tmp_path, caplog
):
  found = released.find(_write(tmp_path / "original", _tensors("SANA")))
  variables, model = released.read(found), released.create(found)
  folder = tmp_path / "new"
  released.save(folder, variables, model, "diffusers")
  (folder / "null_caption.npy").unlink()
  config = json.loads((folder / "config.json").read_bytes())
  del config["_dcae_jax"]  # as diffusers writes it
  (folder / "config.json").write_text(json.dumps(config))
  found = released.find(str(folder))
  assert found.conditioning == conditioning.Captions(300, WIDTH)
  with caplog.at_level("WARNING"):
    null = released.read(found)["params"]["null_caption"]
  assert "has no null caption" in caplog.text
  np.testing.assert_array_equal(null, np.zeros((300, WIDTH)))


@pytest.mark.parametrize(
  ("name", "objective", "factor"),
  [
    ("dc-ae-f32c32-in-1.0-usit-2b-in-512px", SIT, 0.3189),
    ("dc-ae-f64c128-in-1.0-uvit-h-in-512px", UVIT, 0.2889),
    ("dc-ae-1.5-f64c128-usit-3b-in-512px", SIT, 0.5935),
  ],
)
def test_names_tell_objective_and_autoencoder(
  name, objective, factor, tmp_path
):
  """The autoencoder in the same file is none of the denoiser's tensors."""
  tensors = _tensors("UViT") | {"autoencoder.a.weight": np.zeros(3, "f4")}
  by_config = _write(tmp_path / "a", tensors, {"model_name": name})
  by_path = _write(tmp_path / f"models--mit-han-lab--{name}", tensors)
  for source in (by_config, by_path):
    found = released.find(source)
    assert found.name == found.label == name
    assert (found.objective, found.scaling_factor) == (objective, factor)
    assert name.startswith(found.autoencoder)
  variables, model = released.read(found), released.create(found)
  released.save(
    tmp_path / "again", variables, model, "original", name=name,
    objective=objective, autoencoder=found.autoencoder,
  )  # fmt: skip
  again = released.find(str(tmp_path / "again"))
  assert again.label == name and again.scaling_factor == factor
  config = json.loads((tmp_path / "again" / "config.json").read_bytes())
  assert config["model_name"] == name


@pytest.mark.parametrize(
  "objective", [SIT, objectives.scaled_linear(), objectives.improved_ddpm()]
)
def test_what_is_saved_keeps_its_objective(objective, tmp_path):
  found = released.find(_write(tmp_path / "original", _tensors("UViT")))
  released.save(
    tmp_path / "again", released.read(found), released.create(found),
    "original", objective=objective, scaling_factor=0.7,
  )  # fmt: skip
  again = released.find(str(tmp_path / "again"))
  assert (again.objective, again.scaling_factor) == (objective, 0.7)


def test_diffusers_knows_no_normalisation_of_channels(tmp_path):
  found = released.find(_write(tmp_path / "original", _tensors("SANA")))
  numbers = {"shift": [0.0], "scale": [1.0]}
  with pytest.raises(ValueError, match="normalised by channels; save it with"):
    released.save(
      tmp_path / "a", released.read(found), released.create(found),
      "diffusers", normalisation=numbers,
    )  # fmt: skip
  assert not (tmp_path / "a").exists()


def test_networks_see_the_times_that_they_learned(original):
  family, _, source = original
  found = released.find(source)
  objective = found.objective
  assert objective.output_channels(6) == 6 * (1 + found.learn_sigma)
  t = jnp.array([0.5]) if family == "SANA" else jnp.array([500])
  seen = {"UViT": 501.0}.get(family, 500.0)
  np.testing.assert_array_equal(objective.model_time(t), [seen])


def test_models_of_one_family_have_no_layout_of_another(tmp_path):
  found = released.find(_write(tmp_path / "original", _tensors("UViT")))
  with pytest.raises(ValueError, match="no layout 'diffusers'; use 'original'"):
    released.save(
      tmp_path / "a", released.read(found), released.create(found), "diffusers"
    )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop("blocks.1.attn.qkv.bias"), "missing blocks.1.attn.qkv"),
    (lambda t: t.update(extra=np.zeros(2, "f4")), "unexpected extra"),
    (
      lambda t: t.update(pos_embed=t["pos_embed"][:, ::-1].copy()),
      "not the sines and cosines",
    ),
    (lambda t: t.pop("pos_embed"), "nothing tells the size of its latents"),
    (
      lambda t: t.update({"x_embedder.proj.weight": np.zeros((96, 6, 2, 2))}),
      "how many heads have 96 channels",
    ),
    (lambda t: t.pop("t_block.1.weight"), "not recognised as one of DiT"),
  ],
)
def test_files_that_do_not_fit_are_refused(change, message, tmp_path):
  tensors = _tensors("PixArt")
  change(tensors)
  with pytest.raises(ValueError, match=message):
    released.find(_write(tmp_path / "a", tensors))


def test_a_null_caption_that_is_not_finite_is_refused(tmp_path):
  found = released.find(_write(tmp_path / "original", _tensors("PixArt")))
  variables, model = released.read(found), released.create(found)
  released.save(tmp_path / "new", variables, model, "diffusers")
  file = tmp_path / "new/null_caption.npy"
  np.save(file, np.load(file) * np.nan)
  with pytest.raises(ValueError, match="is no null caption: not finite"):
    released.find(str(file.parent))


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path):
  file = tmp_path / "PixArt-XL-2-512x512.pth"
  file.write_bytes(b"")
  with pytest.raises(ValueError, match=r"is a pickle.*d.get.'state_dict', d"):
    released.find(str(file))


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"_class_name": "PixArtTransformer2DModel"}, "caption_channels=None"),
    (
      {
        "_class_name": "PixArtTransformer2DModel",
        "activation_fn": "geglu",
      },
      "activation_fn='geglu' is not 'gelu-approximate'",
    ),
    ({"_class_name": "SanaTransformer2DModel"}, "it describes a SANA"),
    ({"_dcae_jax": {"family": "PixArt"}}, "_dcae_jax in its config.json is"),
    (
      {"_dcae_jax": {"family": "PixArt", "fields": {"wide": 3}}},
      "is damaged.*unexpected keyword|is damaged.*missing a required",
    ),
  ],
)
def test_configs_that_do_not_fit_are_refused(config, message, tmp_path):
  tensors = {"adaln_single.linear.weight": np.zeros((2, 2), "f4")}
  with pytest.raises(ValueError, match=message):
    released.find(_write(tmp_path / "a", tensors, config))
