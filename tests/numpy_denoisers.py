"""DiT and U-ViT from their papers' equations, in numpy and float64.

`p` is a tree of parameters as the modules have it. Also what the tests of both
feed them: random parameters, none of them 0, and random inputs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dcae_jax.diffusion.denoisers import families as denoisers

_erf = np.vectorize(math.erf)


def random_variables(model, seed=0):
  """Of about the size at which each layer keeps the variance of its input."""
  rng = np.random.default_rng(seed)

  def random(path, x):
    name = path[-1].key
    fan_in = math.prod(x.shape[:-1])
    gain = {"kernel": fan_in**-0.5, "positions": 0.5}.get(name, 0.3)
    values = gain * rng.normal(size=x.shape) + (name == "scale")
    return jnp.asarray(values, jnp.float32)

  return jax.tree.map_with_path(random, denoisers.abstract_variables(model))


def random_inputs(model, images=3, latent_size=None, seed=1):
  """Latents, times and conditions; the last condition is the null one."""
  rng = np.random.default_rng(seed)
  size = latent_size or model.latent_size
  z = rng.normal(size=(images, *size, model.latent_channels))
  t = rng.uniform(0, 999, images)
  kind = model.conditioning
  condition = (_captions if kind.is_text else _labels)(kind, images, rng)
  return jnp.asarray(z, jnp.float32), jnp.asarray(t, jnp.float32), condition


def _labels(kind, images, rng):
  labels = rng.integers(0, kind.num_classes, images)
  labels[-1] = kind.num_classes
  return jnp.asarray(labels, jnp.int32)


def _captions(kind, images, rng):
  """Of all numbers of tokens, but none without one."""
  shape = (images, kind.caption_tokens, kind.caption_width)
  lengths = 1 + np.arange(images) % kind.caption_tokens
  return {
    "states": jnp.asarray(rng.normal(size=shape), jnp.float32),
    "mask": jnp.arange(kind.caption_tokens)[None] < lengths[:, None],
    "is_null": jnp.arange(images) == images - 1,
  }


def dit(p, z, t, labels, *, heads, patch_size):
  tokens = _linear(p["project_in"], _patches(z, patch_size))
  height, width = (side // patch_size for side in z.shape[1:3])
  for row in range(height):
    for column in range(width):
      features = place(row, column, tokens.shape[-1])
      tokens[:, row * width + column] += features
  embedding = p["time_embedding"]
  condition = _linear(embedding["linear1"], _time(t, 256))
  condition = _linear(embedding["linear2"], _silu(condition))
  condition += np.asarray(p["label_embedding"]["embedding"])[labels]

  def modulation(parameters, number):
    vectors = _linear(parameters["modulation"]["linear"], _silu(condition))
    return np.split(vectors[:, None], number, axis=-1)

  for i in range(sum(name.startswith("block_") for name in p)):
    block = p[f"block_{i}"]
    vectors = modulation(block, 6)
    x = _normalized(tokens, 1e-6) * (1 + vectors[1]) + vectors[0]
    tokens = tokens + vectors[2] * _attention(block["attention"], x, heads)
    x = _normalized(tokens, 1e-6) * (1 + vectors[4]) + vectors[3]
    tokens = tokens + vectors[5] * _mlp(block["mlp"], x, _tanh_gelu)
  shift, scale = modulation(p["project_out"], 2)
  x = _normalized(tokens, 1e-6) * (1 + scale) + shift
  x = _linear(p["project_out"]["linear"], x)
  return _image(x, height, width, patch_size)


def uvit(p, z, t, labels, *, heads, patch_size):
  patches = _linear(p["project_in"], _patches(z, patch_size))
  label = np.asarray(p["label_embedding"]["embedding"], "float64")[labels]
  time = _time(t, patches.shape[-1])
  tokens = np.concatenate([label[:, None], time[:, None], patches], axis=1)
  tokens = tokens + np.asarray(p["positions"])

  half = sum(name.startswith("in_block_") for name in p)
  results = [tokens]
  for i in range(half):
    results.append(uvit_block(p[f"in_block_{i}"], results[-1], heads))
  tokens = uvit_block(p["middle_block"], results[-1], heads)
  for i in range(half):
    parameters = p[f"out_block_{i}"]
    both = np.concatenate([tokens, results[half - i]], axis=-1)
    merged = _linear(parameters["merge"], both)
    tokens = uvit_block(parameters, merged, heads)
  tokens = _linear(p["project_out"], _layer_norm(p["norm"], tokens))
  height, width = (side // patch_size for side in z.shape[1:3])
  return _image(tokens[:, 2:], height, width, patch_size)


def uvit_block(parameters, x, heads):
  norm1, norm2 = parameters["norm1"], parameters["norm2"]
  x = x + _attention(parameters["attention"], _layer_norm(norm1, x), heads)
  return x + _mlp(parameters["mlp"], _layer_norm(norm2, x), _gelu)


def _layer_norm(parameters, x):
  scale, bias = (np.asarray(parameters[key]) for key in ("scale", "bias"))
  return _normalized(x, 1e-5) * scale + bias


def _patches(z, patch_size):
  b, height, width, _ = z.shape
  p = patch_size
  patches = [
    np.asarray(z[:, y : y + p, x : x + p], "float64").reshape(b, -1)
    for y in range(0, height, p)
    for x in range(0, width, p)
  ]
  return np.stack(patches, axis=1)


def _image(tokens, height, width, patch_size):
  b, p = len(tokens), patch_size
  y = np.zeros((b, height * p, width * p, tokens.shape[-1] // p**2))
  for i in range(tokens.shape[1]):
    row, column = i // width * p, i % width * p
    y[:, row : row + p, column : column + p] = tokens[:, i].reshape(b, p, p, -1)
  return y


def _time(t, features):
  half = features // 2
  frequencies = np.array([10_000 ** (-i / half) for i in range(half)])
  angles = np.asarray(t, "float64")[:, None] * frequencies
  return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def place(row, column, features):
  """Half of the features tell the column, the other half the row."""
  quarter = features // 4
  frequencies = np.array([10_000 ** (-i / quarter) for i in range(quarter)])
  angles = [column * frequencies, row * frequencies]
  return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)])


def _linear(parameters, x):
  y = x @ np.asarray(parameters["kernel"], "float64")
  return y + np.asarray(parameters["bias"]) if "bias" in parameters else y


def _normalized(x, epsilon):
  mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(variance + epsilon)


def _attention(parameters, x, heads):
  q, k, v = np.split(_linear(parameters["qkv"], x), 3, axis=-1)
  size = x.shape[-1] // heads
  y = np.zeros_like(x)
  for i in range(0, x.shape[-1], size):
    of_head = slice(i, i + size)
    keys = k[..., of_head].swapaxes(1, 2)
    weights = np.exp(q[..., of_head] @ keys / np.sqrt(size))
    weights /= weights.sum(-1, keepdims=True)
    y[..., of_head] = weights @ v[..., of_head]
  return _linear(parameters["project"], y)


def _mlp(parameters, x, activation):
  return _linear(
    parameters["contract"], activation(_linear(parameters["expand"], x))
  )


def _silu(x):
  return x / (1 + np.exp(-x))


def _gelu(x):
  return x * (1 + _erf(x / math.sqrt(2))) / 2


def _tanh_gelu(x):
  return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
