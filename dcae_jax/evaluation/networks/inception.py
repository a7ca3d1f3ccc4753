"""Inception-v3 as the Frechet inception distance uses it (arXiv 1706.08500).

The network of 2015-12-05 with the weights and the input of `pytorch-fid`, in
float32. It is not the Inception-v3 of torchvision: its average pools leave the
padding out, and the last block has a max pool.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from dcae_jax.autoencoder.weights import safetensors_files
from dcae_jax.evaluation.networks import pretrained

SIDE = 299  # pixels, of the images that enter the network
FEATURES, CLASSES = 2048, 1008
FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

_BATCH_NORM_EPSILON = 1e-3


class Convolution(NamedTuple):
  """A convolution, its batch normalisation and a ReLU."""

  name: str  # in the state dict, inside its block
  channels: int  # of the output
  size: tuple[int, int] = (1, 1)  # of the kernel, height and width
  stride: int = 1
  padding: str = ""  # "SAME" or "VALID"; "": "SAME" unless strided


class Pool(NamedTuple):
  """A 3x3 pool, "max" or "average"; padded unless strided."""

  kind: str
  stride: int = 1


class Block(NamedTuple):
  """Branches side by side, each a row of layers; channels are concatenated."""

  name: str
  branches: tuple[tuple["Layer", ...], ...]


Layer = Convolution | Pool | Block


def _pooled(kind: str, channels: int) -> tuple[Layer, ...]:
  return Pool(kind), Convolution("branch_pool", channels)


def _block_35(name: str, pool_channels: int) -> Block:
  return Block(
    name,
    (
      (Convolution("branch1x1", 64),),
      (
        Convolution("branch5x5_1", 48),
        Convolution("branch5x5_2", 64, (5, 5)),
      ),
      (
        Convolution("branch3x3dbl_1", 64),
        Convolution("branch3x3dbl_2", 96, (3, 3)),
        Convolution("branch3x3dbl_3", 96, (3, 3)),
      ),
      _pooled("average", pool_channels),
    ),
  )


def _block_17(name: str, width: int) -> Block:
  return Block(
    name,
    (
      (Convolution("branch1x1", 192),),
      (
        Convolution("branch7x7_1", width),
        Convolution("branch7x7_2", width, (1, 7)),
        Convolution("branch7x7_3", 192, (7, 1)),
      ),
      (
        Convolution("branch7x7dbl_1", width),
        Convolution("branch7x7dbl_2", width, (7, 1)),
        Convolution("branch7x7dbl_3", width, (1, 7)),
        Convolution("branch7x7dbl_4", width, (7, 1)),
        Convolution("branch7x7dbl_5", 192, (1, 7)),
      ),
      _pooled("average", 192),
    ),
  )


def _block_8(name: str, pool: str) -> Block:
  def both(prefix):
    row = Convolution(f"{prefix}a", 384, (1, 3))
    column = Convolution(f"{prefix}b", 384, (3, 1))
    return Block("", ((row,), (column,)))

  return Block(
    name,
    (
      (Convolution("branch1x1", 320),),
      (Convolution("branch3x3_1", 384), both("branch3x3_2")),
      (
        Convolution("branch3x3dbl_1", 448),
        Convolution("branch3x3dbl_2", 384, (3, 3)),
        both("branch3x3dbl_3"),
      ),
      _pooled(pool, 192),
    ),
  )


LAYERS: tuple[Layer, ...] = (
  Convolution("Conv2d_1a_3x3", 32, (3, 3), 2),
  Convolution("Conv2d_2a_3x3", 32, (3, 3), padding="VALID"),
  Convolution("Conv2d_2b_3x3", 64, (3, 3)),
  Pool("max", 2),
  Convolution("Conv2d_3b_1x1", 80),
  Convolution("Conv2d_4a_3x3", 192, (3, 3), padding="VALID"),
  Pool("max", 2),
  _block_35("Mixed_5b", 32),
  _block_35("Mixed_5c", 64),
  _block_35("Mixed_5d", 64),
  Block(
    "Mixed_6a",
    (
      (Convolution("branch3x3", 384, (3, 3), 2),),
      (
        Convolution("branch3x3dbl_1", 64),
        Convolution("branch3x3dbl_2", 96, (3, 3)),
        Convolution("branch3x3dbl_3", 96, (3, 3), 2),
      ),
      (Pool("max", 2),),
    ),
  ),
  _block_17("Mixed_6b", 128),
  _block_17("Mixed_6c", 160),
  _block_17("Mixed_6d", 160),
  _block_17("Mixed_6e", 192),
  Block(
    "Mixed_7a",
    (
      (
        Convolution("branch3x3_1", 192),
        Convolution("branch3x3_2", 320, (3, 3), 2),
      ),
      (
        Convolution("branch7x7x3_1", 192),
        Convolution("branch7x7x3_2", 192, (1, 7)),
        Convolution("branch7x7x3_3", 192, (7, 1)),
        Convolution("branch7x7x3_4", 192, (3, 3), 2),
      ),
      (Pool("max", 2),),
    ),
  ),
  _block_8("Mixed_7b", "average"),
  # A slip of 2015 that all published distances share.
  _block_8("Mixed_7c", "max"),
)

Parameters = Mapping[str, Array | np.ndarray]


def _convolve(parameters: Parameters, name: str, x: Array, layer: Convolution):
  x = jax.lax.conv_general_dilated(
    x,
    parameters[f"{name}/kernel"],
    (layer.stride, layer.stride),
    layer.padding or ("SAME" if layer.stride == 1 else "VALID"),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=jax.lax.Precision.HIGHEST,
  )
  return jax.nn.relu(x + parameters[f"{name}/bias"][None, None, None])


def _pool(x: Array, layer: Pool) -> Array:
  options = {
    "window_shape": (3, 3),
    "strides": (layer.stride, layer.stride),
    "padding": "SAME" if layer.stride == 1 else "VALID",
  }
  if layer.kind == "max":
    return nn.max_pool(x, **options)
  return nn.avg_pool(x, **options, count_include_pad=False)


def _apply(
  parameters: Parameters, prefix: str, x: Array, layers: tuple[Layer, ...]
) -> Array:
  for layer in layers:
    if isinstance(layer, Convolution):
      x = _convolve(parameters, prefix + layer.name, x, layer)
    elif isinstance(layer, Pool):
      x = _pool(x, layer)
    else:
      inner = prefix + layer.name + "." * bool(layer.name)
      branches = [_apply(parameters, inner, x, b) for b in layer.branches]
      x = jnp.concatenate(branches, axis=-1)
  return x


def _neighbours(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Two neighbours of each of the `SIDE` positions, and the second's weight.

  In float32, and in this order, as the reference computes them.
  """
  scale = np.float32(size) / np.float32(SIDE)
  centres = np.arange(SIDE, dtype=np.float32) + np.float32(0.5)
  positions = np.maximum(centres * scale - np.float32(0.5), np.float32(0))
  first = positions.astype(np.int32)
  second = np.minimum(first + 1, size - 1)
  return first, second, positions - first


def _resize(x: Float[Array, "b h w c"]) -> Float[Array, "b 299 299 c"]:
  """Bilinear, without a low-pass filter; corners are corners of pixels.

  What published distances were computed with, although it aliases: equal to
  `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.
  """
  for axis in (1, 2):
    first, second, weight = _neighbours(x.shape[axis])
    weight = jnp.expand_dims(weight, [i for i in range(4) if i != axis])
    a, b = (jnp.take(x, i, axis=axis, mode="clip") for i in (first, second))
    x = a * (1 - weight) + b * weight
  return x


def features(
  parameters: Parameters, images: Float[Array, "b h w c"]
) -> tuple[Float[Array, "b 2048"], Float[Array, "b 1008"]]:
  """What the Frechet inception distance and the inception score are made of.

  Images have whole numbers from 0 to 255, any size, and 3 channels or 1 (grey).
  They are resized to 299 x 299 and brought to [-1, 1] as `pytorch-fid` does it;
  `torch-fidelity` resizes differently.

  Returns:
    The features after the last pool, and the logits of the 1008 classes without
    the bias of the last layer, as the first scores were computed, and those of
    `torch-fidelity` still are.
  """
  x = _resize(images.astype(jnp.float32))
  if x.shape[-1] == 1:
    x = jnp.repeat(x, 3, axis=-1)
  x = _apply(parameters, "", x / 127.5 - 1, LAYERS)
  pool = jnp.mean(x, axis=(1, 2))
  logits = jnp.matmul(
    pool, parameters["fc/kernel"], precision=jax.lax.Precision.HIGHEST
  )
  return pool, logits


def _convolutions(
  prefix: str, channels: int, layers: tuple[Layer, ...]
) -> Iterator[tuple[str, int, Convolution]]:
  """Yields name, input channels and layer; returns the output channels."""
  for layer in layers:
    if isinstance(layer, Convolution):
      yield prefix + layer.name, channels, layer
      channels = layer.channels
    elif isinstance(layer, Block):
      inner = prefix + layer.name + "." * bool(layer.name)
      widths = []
      for branch in layer.branches:
        widths.append((yield from _convolutions(inner, channels, branch)))
      channels = sum(widths)
  return channels


def parameter_shapes() -> dict[str, tuple[int, ...]]:
  """Of the tensors in the published file that are used."""
  shapes = {}
  for name, channels, layer in _convolutions("", 3, LAYERS):
    shapes[f"{name}.conv.weight"] = (layer.channels, channels, *layer.size)
    shapes |= pretrained.batch_norm_shapes(f"{name}.bn", layer.channels)
  return shapes | {"fc.weight": (CLASSES, FEATURES), "fc.bias": (CLASSES,)}


def load(path: str = "") -> pretrained.Pretrained:
  """The published weights.

  Args:
    path: of the published file, or of an `.npz` or `.safetensors` with the
      names and shapes of `parameter_shapes`, which is taken as it is; or its
      hub id. Empty: the published file in the user's cache.

  Returns:
    Each convolution with its batch normalisation folded in, as
    "<name>/kernel" (HWIO) and "<name>/bias", and the last layer's "fc/kernel".

  Raises:
    AbsentWeightsError: the file is not in the cache.
    UserError: no such file; one with another hash, other names or shapes.
  """
  cached = pretrained.cache_directory() / FILE
  source = safetensors_files.find_file(path) if path else cached
  command = f"curl -L --create-dirs -o {cached} {URL}"
  if not path and not cached.is_file():
    raise pretrained.AbsentWeightsError(
      "the Frechet inception distance needs the published weights of its "
      f"Inception-v3, and there is no file {cached}; run: {command}"
    )
  loaded = pretrained.load(
    source,
    parameter_shapes(),
    SHA256,
    "the Inception-v3 of the Frechet inception distance",
    f"run: {command}",
    ignored=r"AuxLogits\..*|.*\.num_batches_tracked",
  )
  tensors, parameters = loaded.parameters, {}
  for name, _, _ in _convolutions("", 3, LAYERS):
    kernel, bias = pretrained.fold_batch_norm(
      tensors, f"{name}.conv", f"{name}.bn", _BATCH_NORM_EPSILON
    )
    parameters |= {f"{name}/kernel": kernel, f"{name}/bias": bias}
  parameters["fc/kernel"] = tensors["fc.weight"].T
  return loaded._replace(parameters=parameters)
