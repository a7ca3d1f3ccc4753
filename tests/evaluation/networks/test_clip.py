import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_clip
from PIL import Image

from benchmarks import metric_networks
from dcae_jax.evaluation.networks import clip, pretrained


def _preprocessed(pixels, side):
  """By Pillow, as whole numbers."""
  height, width = pixels.shape[:2]
  shorter = min(height, width)
  size = (side * width // shorter, side * height // shorter)
  image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
  left, top = ((x - side) // 2 for x in size)
  return np.array(image.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize(
  "size", [(256, 256), (512, 300), (130, 511), (50, 83), (224, 224)]
)
def test_images_are_resized_and_cropped_as_pillow_does_it(size):
  images = metric_networks.random_images((1, *size, 3))
  mean = np.array([0.48145466, 0.4578275, 0.40821073])
  deviation = np.array([0.26862954, 0.26130258, 0.27577711])
  found = clip.preprocess(jnp.asarray(images), 224)
  found = np.asarray(found)[0] * deviation + mean
  expected = _preprocessed(images[0].astype(np.uint8), 224) / 255
  difference = np.abs(255 * (found - expected))
  # Halves are rounded up or down, one axis after the other.
  assert difference.max() < 2.1 and difference.mean() < 0.02


def test_grey_images_are_three_equal_channels():
  images = jnp.asarray(metric_networks.random_images((2, 30, 40, 1)))
  grey = clip.preprocess(images, 24)
  colour = clip.preprocess(jnp.repeat(images, 3, axis=-1), 24)
  np.testing.assert_array_equal(grey, colour)


def test_image_features_are_of_the_size_of_the_tensors():
  for size in (tiny_clip.SIZE, clip.LARGE):
    tensors = {
      name: jax.ShapeDtypeStruct(shape, np.float32)
      for name, shape in clip.parameter_shapes(size).items()
    }
    images = jax.ShapeDtypeStruct((2, 70, 90, 3), np.float32)
    found = jax.eval_shape(clip.image_features, tensors, images)
    assert found.shape == (2, size.features) and found.dtype == np.float32
  elements = sum(np.prod(x.shape) for x in tensors.values())
  assert elements == 427_616_513 - 1  # the published ones have a logit scale


def test_texts_are_tokens_between_a_start_and_the_end(tmp_path):
  tiny_clip.write_tokenizer(tmp_path)
  short, long = clip.tokenized(tmp_path, ["A be", "x" * 99], 8)
  start, end = tiny_clip.SIZE.vocabulary - 2, tiny_clip.SIZE.vocabulary - 1
  last = 26  # letters that end a word come after those that do not
  assert short.tolist() == [start, last + 0, 1, last + 4, end, 0, 0, 0]
  assert long.tolist() == [start, *[23] * 6, end]


def test_texts_do_not_depend_on_what_they_are_encoded_with(tmp_path):
  weights = tiny_clip.weights(tmp_path)
  texts = [f"{chr(97 + i % 26)} {chr(97 + i // 3 % 26)}" for i in range(80)]
  found = clip.text_features(weights, texts)
  assert found.shape == (80, tiny_clip.SIZE.features)
  assert len(np.unique(found.round(4), axis=0)) == len(set(texts)) > 70
  for i in (0, 31, 79):
    alone = clip.text_features(weights, texts[i : i + 1])
    np.testing.assert_allclose(alone[0], found[i], rtol=1e-4, atol=1e-4)


def test_what_follows_the_end_of_a_text_does_not_matter():
  parameters = tiny_clip.parameters()
  end = tiny_clip.SIZE.vocabulary - 1
  tokens = np.array([[52, 3, 4, end, 0, 0], [52, 3, 4, end, 7, end]])
  tokens = np.pad(tokens, [(0, 0), (0, 10)])
  first, second = np.asarray(jax.jit(clip.encoded)(parameters, tokens))
  np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  folder = tmp_path / "dcae_jax" / "clip-vit-large-patch14"
  command = (
    "hf download openai/clip-vit-large-patch14 model.safetensors "
    f"tokenizer.json --local-dir {folder}"
  )
  for file in ("model.safetensors", "tokenizer.json"):
    with pytest.raises(pretrained.AbsentWeightsError) as info:
      clip.load()
    assert f"no file {folder / file};" in str(info.value)
    assert str(info.value).endswith(command)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(b"")
  with pytest.raises(ValueError, match=r"not a readable \.safetensors"):
    clip.load()


def test_other_files_are_refused(tmp_path):
  path = tmp_path / clip.FILE
  safetensors.numpy.save_file(tiny_clip.parameters(), path)
  with pytest.raises(ValueError, match=r"does not hold CLIP ViT-L/14.* more"):
    clip.load(str(path))


def test_a_damaged_tokenizer_is_refused(tmp_path):
  weights = tiny_clip.weights(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match=r"tokenizer\.json is not .*hf download"):
    clip.text_features(weights, ["a"])
