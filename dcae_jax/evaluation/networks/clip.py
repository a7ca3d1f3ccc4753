"""CLIP (arXiv 2103.00020): images and texts as vectors that can be compared.

Two transformers, of image patches and of words, and a projection of each. Sizes
are those of the tensors, which have the names of the Hugging Face release;
`load` is of OpenAI's ViT-L/14, which published CLIP scores are of. Arithmetic
is float32.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from dcae_jax import errors
from dcae_jax.autoencoder.weights import safetensors_files
from dcae_jax.evaluation.networks import pretrained
from dcae_jax.nn import transformer
from dcae_jax.runs import installed

REPOSITORY = "openai/clip-vit-large-patch14"
SHA256 = "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"
FILE, TOKENIZER = "model.safetensors", "tokenizer.json"

_HEAD = 64  # channels of an attention head, in all of OpenAI's
_LAYER_NORM_EPSILON = 1e-5
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of images in [0, 1]
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_BATCH = 64  # texts that are encoded at once

Parameters = Mapping[str, Array | np.ndarray]


class Transformer(NamedTuple):
  """The size of one of the two; its heads have 64 channels, its MLP 4 width."""

  layers: int
  width: int
  tokens: int


class Size(NamedTuple):
  """That of a CLIP; an image is `patch` sqrt(vision tokens - 1) pixels wide."""

  vision: Transformer
  text: Transformer
  patch: int  # pixels
  vocabulary: int
  features: int


LARGE = Size(
  vision=Transformer(layers=24, width=1024, tokens=257),
  text=Transformer(layers=12, width=768, tokens=77),
  patch=14,
  vocabulary=49_408,
  features=768,
)


def image_features(
  parameters: Parameters, images: Float[Array, "b h w c"]
) -> Float[Array, "b d"]:
  """Of images with whole numbers from 0 to 255, any size, and 3 channels or 1.

  They have the lengths that the projection gives them.
  """
  kernel = parameters["vision_model.embeddings.patch_embedding.weight"]
  position = parameters["vision_model.embeddings.position_embedding.weight"]
  width, _, patch, _ = kernel.shape
  x = preprocess(images, patch * math.isqrt(len(position) - 1))
  x = rearrange(x, "b (h p) (w q) c -> b (h w) (c p q)", p=patch, q=patch)
  with jax.default_matmul_precision("highest"):
    x = x @ kernel.reshape(width, -1).T
    first = parameters["vision_model.embeddings.class_embedding"]
    first = jnp.broadcast_to(first, (len(x), 1, width))
    x = jnp.concatenate([first, x], axis=1) + position[None]
    x = _layer_norm(parameters, "vision_model.pre_layrnorm", x)  # [sic]
    x = _transformer(parameters, "vision_model", x, is_causal=False)
    x = _layer_norm(parameters, "vision_model.post_layernorm", x)
    return x[:, 0] @ parameters["visual_projection.weight"].T


def preprocess(
  images: Float[Array, "b h w c"], side: int
) -> Float[Array, "b side side 3"]:
  """The middle square of images, whose shorter side becomes `side` pixels.

  They are resized as Pillow does it, bicubic, low-pass filtered if they get
  smaller, one axis after the other, and to whole numbers each time.
  """
  x = images.astype(jnp.float32)
  for axis in (2, 1):
    shorter, size = min(images.shape[1:3]), images.shape[axis]
    shape = (*x.shape[:axis], side * size // shorter, *x.shape[axis + 1 :])
    x = jnp.floor(jax.image.resize(x, shape, "cubic") + 0.5)
    x = jnp.clip(x, 0, 255)
  top, left = ((size - side) // 2 for size in x.shape[1:3])
  x = x[:, top : top + side, left : left + side]
  if x.shape[-1] == 1:
    x = jnp.repeat(x, 3, axis=-1)
  mean, deviation = (
    np.array(values, np.float32)[None, None, None]
    for values in (_MEAN, _DEVIATION)
  )
  return (x / 255 - mean) / deviation


def text_features(
  weights: pretrained.Pretrained, texts: Sequence[str] | np.ndarray
) -> np.ndarray:
  """[n, d] of texts, of which the tokens that are too many are cut off.

  Texts that are there several times are encoded once. They have the lengths
  that the projection gives them.

  Raises:
    UserError: the tokenizer beside the weights cannot be read.
  """
  different, places = np.unique(np.asarray(texts), return_inverse=True)
  parameters = jax.device_put(
    {k: v for k, v in weights.parameters.items() if k.startswith("text_")}
  )
  position = parameters["text_model.embeddings.position_embedding.weight"]
  folder = pathlib.Path(weights.file).parent
  tokens = tokenized(folder, different.tolist(), len(position))
  encode = jax.jit(encoded)
  size, features = min(_BATCH, len(different)), []
  for first in range(0, len(different), size):
    # The last batch is filled up with its own rows.
    rows = np.arange(first, min(first + size, len(different)))
    batch = encode(parameters, tokens[np.resize(rows, size)])
    features.append(np.asarray(batch)[: len(rows)])
  return np.concatenate(features)[places]


def tokenized(
  folder: pathlib.Path, texts: Sequence[str], length: int
) -> Int[np.ndarray, "n t"]:
  """Tokens of texts, by the tokenizer in a folder.

  The last token of a text ends it, and has the largest number of all; zeros
  follow. Longer texts lose the tokens before it.
  """
  import tokenizers  # of an extra: `load` asks for it

  file = folder / TOKENIZER
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # whatever a damaged file makes of the library
    raise errors.UserError(
      f"weights: {file} is not a readable tokenizer ({error}); "
      f"run: {_command(folder)}"
    ) from error
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length, pad_id=0)
  rows = tokenizer.encode_batch(list(texts))
  return np.array([row.ids for row in rows], np.int32)


def encoded(
  parameters: Parameters, tokens: Int[Array | np.ndarray, "b t"]
) -> Float[Array, "b d"]:
  """Features of texts, from their tokens."""
  name = "text_model.embeddings"
  x = jnp.take(parameters[f"{name}.token_embedding.weight"], tokens, axis=0)
  x = x + parameters[f"{name}.position_embedding.weight"][None]
  with jax.default_matmul_precision("highest"):
    x = _transformer(parameters, "text_model", x, is_causal=True)
    x = _layer_norm(parameters, "text_model.final_layer_norm", x)
    ends = x[jnp.arange(len(x)), jnp.argmax(tokens, axis=1)]
    return ends @ parameters["text_projection.weight"].T


def _transformer(
  parameters: Parameters, name: str, x: Float[Array, "b n d"], is_causal: bool
) -> Float[Array, "b n d"]:
  i = 0
  while f"{name}.encoder.layers.{i}.mlp.fc1.weight" in parameters:
    layer = f"{name}.encoder.layers.{i}"
    y = _layer_norm(parameters, f"{layer}.layer_norm1", x)
    x = x + _attention(parameters, f"{layer}.self_attn", y, is_causal)
    y = _layer_norm(parameters, f"{layer}.layer_norm2", x)
    y = _linear(parameters, f"{layer}.mlp.fc1", y)
    y = y * jax.nn.sigmoid(1.702 * y)
    x, i = x + _linear(parameters, f"{layer}.mlp.fc2", y), i + 1
  return x


def _attention(
  parameters: Parameters, name: str, x: Float[Array, "b n d"], is_causal: bool
) -> Float[Array, "b n d"]:
  q, k, v = (
    rearrange(
      _linear(parameters, f"{name}.{leaf}_proj", x),
      "b n (h d) -> b n h d",
      d=_HEAD,
    )
    for leaf in "qkv"
  )
  y = jax.nn.dot_product_attention(q, k, v, is_causal=is_causal)
  y = rearrange(y, "b n h d -> b n (h d)")
  return _linear(parameters, f"{name}.out_proj", y)


def _linear(
  parameters: Parameters, name: str, x: Float[Array, "b n c"]
) -> Float[Array, "b n d"]:
  y = x @ parameters[f"{name}.weight"].T
  return y + parameters[f"{name}.bias"][None, None]


def _layer_norm(
  parameters: Parameters, name: str, x: Float[Array, "b n d"]
) -> Float[Array, "b n d"]:
  scale, bias = (parameters[f"{name}.{leaf}"] for leaf in ("weight", "bias"))
  x = transformer.normalized(x, _LAYER_NORM_EPSILON)
  return x * scale[None, None] + bias[None, None]


def parameter_shapes(size: Size = LARGE) -> dict[str, tuple[int, ...]]:
  """Of the tensors in the published file that are used."""
  vision, text, features = size.vision, size.text, size.features
  shapes = {
    "vision_model.embeddings.class_embedding": (vision.width,),
    "vision_model.embeddings.patch_embedding.weight": (
      *(vision.width, 3),
      *(size.patch, size.patch),
    ),
    "text_model.embeddings.token_embedding.weight": (
      size.vocabulary,
      text.width,
    ),
    "visual_projection.weight": (features, vision.width),
    "text_projection.weight": (features, text.width),
  }
  for name, width in (
    ("vision_model.pre_layrnorm", vision.width),
    ("vision_model.post_layernorm", vision.width),
    ("text_model.final_layer_norm", text.width),
  ):
    shapes |= _shapes_with_bias(name, (width,))
  for name, (layers, width, tokens) in (
    ("vision_model", vision),
    ("text_model", text),
  ):
    shapes[f"{name}.embeddings.position_embedding.weight"] = (tokens, width)
    for i in range(layers):
      layer = f"{name}.encoder.layers.{i}"
      for leaf in ("layer_norm1", "layer_norm2"):
        shapes |= _shapes_with_bias(f"{layer}.{leaf}", (width,))
      for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= _shapes_with_bias(f"{layer}.self_attn.{leaf}", (width, width))
      shapes |= _shapes_with_bias(f"{layer}.mlp.fc1", (4 * width, width))
      shapes |= _shapes_with_bias(f"{layer}.mlp.fc2", (width, 4 * width))
  return shapes


def _shapes_with_bias(
  name: str, weight: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
  return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def _command(folder: pathlib.Path) -> str:
  return f"hf download {REPOSITORY} {FILE} {TOKENIZER} --local-dir {folder}"


def load(path: str = "") -> pretrained.Pretrained:
  """The published weights.

  Args:
    path: of the published file, or of an `.npz` or `.safetensors` with the
      names and shapes of `parameter_shapes`, which is taken as it is; or its
      hub id. `text_features` wants the tokenizer beside it. Empty: the
      published file in the user's cache.

  Raises:
    AbsentWeightsError: it or the tokenizer is not in the cache.
    UserError: no such file; one with other names or shapes; no `tokenizers`.
  """
  installed.require("tokenizers", "text", "the CLIP score")
  folder = pretrained.cache_directory() / REPOSITORY.rpartition("/")[2]
  source = safetensors_files.find_file(path) if path else folder / FILE
  if not path:
    for file in (source, folder / TOKENIZER):
      if not file.is_file():
        raise pretrained.AbsentWeightsError(
          "the CLIP score needs the published weights of CLIP ViT-L/14 and "
          f"their tokenizer, and there is no file {file}; "
          f"run: {_command(folder)}"
        )
  return pretrained.load(
    source,
    parameter_shapes(),
    SHA256,
    "CLIP ViT-L/14",
    f"run: {_command(folder)}",
    ignored=r"logit_scale|.*\.position_ids",
  )
