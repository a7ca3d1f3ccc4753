"""CLIP against `transformers` with random weights, and its CLIP score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_clip
import torch
import transformers
from PIL import Image

from benchmarks import metric_networks
from dcae_jax.evaluation import sample_metrics
from dcae_jax.evaluation.networks import clip

# The widths and lengths of ViT-L/14, and fewer layers and words.
WIDE = clip.LARGE._replace(
  vision=clip.LARGE.vision._replace(layers=1),
  text=clip.LARGE.text._replace(layers=1),
  vocabulary=99,
)


def _reference(size, parameters):
  vision, text = size.vision, size.text
  common = {"projection_dim": size.features, "hidden_act": "quick_gelu"}
  config = transformers.CLIPConfig(
    projection_dim=size.features,
    vision_config=common
    | {
      "image_size": size.patch * round((vision.tokens - 1) ** 0.5),
      "patch_size": size.patch,
      "hidden_size": vision.width,
      "intermediate_size": 4 * vision.width,
      "num_hidden_layers": vision.layers,
      "num_attention_heads": vision.width // 64,
    },
    text_config=common
    | {
      "vocab_size": size.vocabulary,
      "max_position_embeddings": text.tokens,
      "hidden_size": text.width,
      "intermediate_size": 4 * text.width,
      "num_hidden_layers": text.layers,
      "num_attention_heads": text.width // 64,
      "eos_token_id": 2,  # as in OpenAI's: the end is the largest number
      "bos_token_id": size.vocabulary - 2,
      "pad_token_id": 0,
    },
  )
  model = transformers.CLIPModel(config).eval()
  tensors = {k: torch.from_numpy(x) for k, x in parameters.items()}
  wrong = model.load_state_dict(tensors, strict=False)
  assert wrong.missing_keys == ["logit_scale"] and not wrong.unexpected_keys
  return model


@pytest.fixture(
  scope="module", params=[tiny_clip.SIZE, WIDE], ids=["tiny", "wide"]
)
def pair(request):
  parameters = tiny_clip.parameters(request.param)
  return request.param, parameters, _reference(request.param, parameters)


def _tensor(output):
  """Some versions of transformers wrap features, and some do not."""
  return np.asarray(getattr(output, "pooler_output", output))


def _their_features(model, pixels, tokens):
  pixels = torch.from_numpy(np.array(pixels).transpose(0, 3, 1, 2))
  with torch.no_grad():
    return (
      _tensor(model.get_image_features(pixels)),
      _tensor(model.get_text_features(torch.from_numpy(tokens))),
    )


def _random_tokens(size, texts):
  """Of several lengths, with the end and then zeros."""
  rng = np.random.default_rng(1)
  length, last = size.text.tokens, size.vocabulary - 1
  tokens = rng.integers(1, last, (texts, length)).astype(np.int32)
  for row, end in zip(tokens, rng.integers(1, length, texts), strict=True):
    row[end], row[end + 1 :] = last, 0
  return tokens


def test_features_and_score_equal_transformers(pair):
  size, parameters, model = pair
  images = jnp.asarray(metric_networks.random_images((3, 90, 61, 3)))
  tokens = _random_tokens(size, 3)
  side = model.config.vision_config.image_size
  ours = (
    jax.jit(clip.image_features)(parameters, images),
    jax.jit(clip.encoded)(parameters, tokens),
  )
  theirs = _their_features(model, clip.preprocess(images, side), tokens)
  for found, expected in zip(ours, theirs, strict=True):
    assert metric_networks.error(found, expected) < 1e-4
  # As torchmetrics has it, which puts 0 for a negative mean.
  image, text = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in theirs)
  scores = 100 * (image * text).sum(-1)
  found = sample_metrics.clip_score(*map(np.asarray, ours))
  assert found == pytest.approx(np.maximum(scores, 0).mean(), abs=1e-3)


@pytest.mark.parametrize("size", [(256, 256), (301, 200), (90, 61), (61, 91)])
def test_images_are_those_of_transformers(size):
  images = metric_networks.random_images((2, *size, 3))
  pictures = [Image.fromarray(x.astype(np.uint8)) for x in images]
  expected = transformers.CLIPImageProcessorPil()(pictures)["pixel_values"]
  found = clip.preprocess(jnp.asarray(images), 224)
  difference = np.abs(found - np.stack(expected).transpose(0, 2, 3, 1))
  # Halves are rounded up or down, one axis after the other.
  level = 1 / 255 / 0.26
  assert difference.max() < 2.1 * level and difference.mean() < 0.02 * level


def test_tokens_equal_transformers(tmp_path):
  """Of CLIP's tokenizer, with a small vocabulary."""
  letters = [*"abcdefgh", *(f"{letter}</w>" for letter in "abcdefgh")]
  words = (*letters, "ab", "ab</w>", "<|startoftext|>", "<|endoftext|>")
  theirs = transformers.CLIPTokenizer(
    vocab={word: i for i, word in enumerate(words)},
    merges=[("a", "b"), ("a", "b</w>")],
  )
  theirs.save_pretrained(tmp_path)
  texts = ["A  cab", "head, bead; face", "abba " * 9, ""]
  found = clip.tokenized(tmp_path, texts, 12)
  expected = theirs(texts, padding="max_length", truncation=True, max_length=12)
  mask = np.array(expected["attention_mask"])
  np.testing.assert_array_equal(found, np.array(expected["input_ids"]) * mask)
