"""Convolutions as the paper's networks use them, with fast CPU lowerings.

XLA's CPU back end is 10 to 60 times too slow for depthwise convolutions and
for 3x3 kernels on tiny grids; on large grids it runs near the peak of the
machine, so that only fewer multiplications are faster. There
`jax.lax.platform_dependent` picks another lowering: shifted sums (depthwise),
one matrix product (1x1), patches and one matrix product (grids up to 8x8),
Winograd's algorithm (3x3, float32, but for few channels). Parameters, and the
programs for TPU and GPU, are those of `jax.lax.conv_general_dilated`.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

_LARGEST_PATCH_GRID = 64  # positions; beyond, lax.conv is faster on a CPU too
_TILE = 4  # outputs of a Winograd tile, on each side
# With fewer, lax.conv was measured as fast, or faster: with its gradients, a
# batch of 16 images of 16x16 positions and 64 channels takes 6 ms instead of
# 16, one of 32x32 positions and 24 channels 7 ms instead of 9. The size of the
# batch has no say, so that latents do not depend on the number of devices.
_FEWEST_WINOGRAD_CHANNELS = 16
_FEWEST_WINOGRAD_PRODUCTS = 24 * 24  # of input and output channels


def _lax_conv(
  x: Array,
  kernel: Array,
  stride: int,
  groups: int,
  padding: tuple[int, int] | None = None,
) -> Array:
  side = kernel.shape[0] // 2  # symmetric, also where the stride is 2
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride, stride),
    padding=[padding or (side, side)] * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


def _shifts(x: Array, size: int) -> list[Array]:
  """The `size * size` shifted views of `x`, zero-padded, row by row."""
  height, width = x.shape[1:3]
  p = size // 2
  x = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
  # Without the barrier, XLA pads, and computes what made `x`, for each shift.
  x = jax.lax.optimization_barrier(x)
  return [
    x[:, i : i + height, j : j + width]
    for i in range(size)
    for j in range(size)
  ]


def _shifted_sum(x: Array, kernel: Array) -> Array:
  taps = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1])
  return sum(
    shifted * tap
    for shifted, tap in zip(_shifts(x, kernel.shape[0]), taps, strict=True)
  )


def _shifted_sum_vjp(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
  size, (height, width) = kernel.shape[0], x.shape[1:3]
  p = size // 2
  padded = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))

  def kernel_row(i):
    rows = jax.lax.dynamic_slice_in_dim(padded, i, height, 1)
    products = [rows[:, :, j : j + width] * g for j in range(size)]
    return jnp.stack(
      [jnp.sum(y, axis=(0, 1, 2), dtype=jnp.float32) for y in products]
    )

  # A loop, before which XLA pads once, with what made `x`, and not each shift.
  gradient = jax.lax.map(kernel_row, jnp.arange(size))
  gradient = gradient.reshape(kernel.shape).astype(g.dtype)
  return _shifted_sum(g, kernel[::-1, ::-1]), gradient


def _patch_product(x: Array, kernel: Array) -> Array:
  patches = x
  if kernel.shape[0] > 1:
    patches = jnp.concatenate(_shifts(x, kernel.shape[0]), axis=-1)
  # Two-dimensional factors: XLA copies them around otherwise.
  patches = patches.reshape(-1, patches.shape[-1])
  y = patches @ kernel.reshape(-1, kernel.shape[-1])
  return y.reshape(*x.shape[:3], -1)


def _winograd_matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Transforms of input, kernel and product for tiles of `_TILE`, kernels of 3.

  The product of two polynomials follows from its values at enough points (one
  of them infinity); convolution by a kernel is the transpose of that.
  """
  # Reciprocal and symmetric: half the rounding error of 0, +-1, +-2.
  points = [0, 2**-0.5, -(2**-0.5), 2**0.5, -(2**0.5)]

  def values(degree):
    powers = np.vander(points, degree, increasing=True)
    return np.vstack([powers, np.eye(degree)[-1]])

  interpolation = np.linalg.inv(values(_TILE + 2)).T
  interpolation[np.abs(interpolation) < 1e-9] = 0
  return interpolation, values(3), values(_TILE).T


def _combinations(matrix: np.ndarray, xs: Array | list[Array]) -> list[Array]:
  """`matrix @ xs`, without the zeros."""
  return [
    sum(float(a) * x for a, x in zip(row, xs, strict=True) if a)
    for row in matrix
  ]


def _slices(x: Array, size: int, axis: int) -> list[Array]:
  """Positions 0 to `size - 1` of all the tiles along an axis."""
  span = x.shape[axis] - size + 1
  return [
    jax.lax.slice_in_dim(x, i, i + span, _TILE, axis) for i in range(size)
  ]


def _tile_rows(x: Array, size: int) -> list[Array]:
  """`_slices` of the rows of `x`, zero-padded to whole tiles."""
  before = (size - _TILE) // 2
  after = [-side % _TILE + before for side in x.shape[1:3]]
  x = jnp.pad(x, ((0, 0), (before, after[0]), (before, after[1]), (0, 0)))
  # Without the barrier, XLA pads, and computes what made `x`, for each row.
  x = jax.lax.optimization_barrier(x)
  return _slices(x, size, 1)


def _values(
  row_factors: Array, tile_rows: list[Array], matrix: np.ndarray
) -> Array:
  """One row of the transformed tiles, `[6, tiles, channels]`."""
  row = sum(f * y for f, y in zip(row_factors, tile_rows, strict=True))
  row = jax.lax.optimization_barrier(row)
  values = _combinations(matrix, _slices(row, matrix.shape[1], 2))
  return jnp.stack([y.reshape(-1, y.shape[-1]) for y in values])


def _map_rows(f: Callable, x: Array, *matrices: np.ndarray) -> Array:
  """`f` of the rows of the matrices, one after the other, stacked.

  A loop keeps program and memory small. It starts from a value of `x`, to be
  overwritten: the zeros of `jax.lax.map` depend on nothing, so that XLA would
  make those of all layers at the start of the program, and keep them.
  """
  matrices = [jnp.asarray(matrix, x.dtype) for matrix in matrices]
  row = lambda i: f(*(matrix[i] for matrix in matrices))
  shape = jax.eval_shape(row, 0).shape
  return jax.lax.fori_loop(
    0,
    6,
    lambda i, y: jax.lax.dynamic_update_index_in_dim(y, row(i), i, 0),
    jnp.broadcast_to(x[0, 0, 0, 0], (6, *shape)),
  )


def _winograd(x: Array, kernel: Array) -> Array:
  """3x3 convolution by Winograd's F(4x4, 3x3) (arXiv 1509.09308).

  Tiles of 4x4 outputs come from 6x6 inputs by 36 products of matrices, a
  quarter of the multiplications; the relative error is about 2e-6.
  """
  of_input, of_kernel, of_output = _winograd_matrices()
  tile_rows = _tile_rows(x, 6)

  def transformed_row(input_factors, kernel_factors):
    taps = jnp.tensordot(kernel_factors, kernel, 1)
    taps = _combinations(of_kernel, jax.lax.optimization_barrier(taps))
    products = jnp.einsum(
      "ntc,ncd->ntd",
      _values(input_factors, tile_rows, of_input),
      jnp.stack(taps),
    )
    products = jax.lax.optimization_barrier(products)
    return jnp.stack(_combinations(of_output, products), axis=1)

  y = _map_rows(transformed_row, x, of_input, of_kernel)
  batch, height, width, _ = x.shape
  rows, columns = -(-height // _TILE), -(-width // _TILE)
  y = y.reshape(6, batch, rows, columns * _TILE, -1)
  y = jnp.stack(_combinations(of_output, y), axis=2)
  return y.reshape(batch, rows * _TILE, *y.shape[3:])[:, :height, :width]


def _winograd_vjp(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
  of_input, of_kernel, of_output = _winograd_matrices()
  x_rows, g_rows = _tile_rows(x, 6), _tile_rows(g, 4)

  def transformed_row(input_factors, output_factors):
    products = jnp.einsum(
      "ntc,ntd->ncd",
      _values(input_factors, x_rows, of_input),
      _values(output_factors, g_rows, of_output.T),
    )
    products = jax.lax.optimization_barrier(products)
    return jnp.stack(_combinations(of_kernel.T, products))

  kernel_gradient = _map_rows(transformed_row, g, of_input, of_output.T)
  kernel_gradient = jnp.stack(_combinations(of_kernel.T, kernel_gradient))
  flipped = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
  return _winograd(g, flipped), kernel_gradient


def _vjp(f: Callable) -> Callable:
  return lambda x, kernel, g: jax.vjp(f, x, kernel)[1](g)


def _by_platform(
  cpu: Callable, default: Callable, cpu_vjp: Callable | None = None
) -> Callable:
  """`cpu` on CPUs, `default` elsewhere, in values and in gradients.

  The choice is made apart for the two directions: only the inputs are kept
  between them, so that no platform keeps what another one's gradient needs.
  """

  @jax.custom_vjp
  def convolve(x, kernel):
    return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)

  def forward(x, kernel):
    return convolve(x, kernel), (x, kernel)

  def backward(residuals, g):
    return jax.lax.platform_dependent(
      *residuals, g, cpu=cpu_vjp or _vjp(cpu), default=_vjp(default)
    )

  convolve.defvjp(forward, backward)
  return convolve


_depthwise = _by_platform(
  _shifted_sum,
  lambda x, kernel: _lax_conv(x, kernel, 1, x.shape[-1]),
  _shifted_sum_vjp,
)
_as_winograd = _by_platform(
  _winograd, lambda x, kernel: _lax_conv(x, kernel, 1, 1), _winograd_vjp
)
_as_product = _by_platform(
  _patch_product, lambda x, kernel: _lax_conv(x, kernel, 1, 1)
)


def depthwise_convolution(
  x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"]
) -> Float[Array, "b h w c"]:
  """Convolves each channel alone; zero padding keeps the size; `k` is odd."""
  return _depthwise(x, kernel)


def _suits_winograd(x: Array, kernel: Array) -> bool:
  return (
    kernel.shape[:2] == (3, 3)
    and x.dtype == kernel.dtype == jnp.float32
    and min(kernel.shape[2:]) >= _FEWEST_WINOGRAD_CHANNELS
    and math.prod(kernel.shape[2:]) >= _FEWEST_WINOGRAD_PRODUCTS
  )


def convolution(
  x: Float[Array, "b h w c"],
  kernel: Float[Array, "k k d e"],
  stride: int = 1,
  groups: int = 1,
  padding: tuple[int, int] | None = None,
) -> Float[Array, "b h2 w2 e"]:
  """Convolves with zero padding; `d = c / groups`.

  `padding` stands before and behind both axes; None: `k // 2` on each side.
  """
  size = kernel.shape[0]
  dense = stride == 1 and groups == 1 and padding is None
  if dense and (size == 1 or math.prod(x.shape[1:3]) <= _LARGEST_PATCH_GRID):
    return _as_product(x, kernel)
  if dense and _suits_winograd(x, kernel):
    return _as_winograd(x, kernel)
  return _lax_conv(x, kernel, stride, groups, padding)


# Uniform in +-1/sqrt(fan in), for kernels and biases: what the convolutions of
# the authors' framework start from.
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int) -> Callable:
  """An initializer; `kernel_init` is that of the kernel beside the bias."""
  bound = 1 / math.sqrt(fan_in)
  return functools.partial(jax.random.uniform, minval=-bound, maxval=bound)


def _add_bias(y: Array, bias: Array) -> Array:
  """In float32: its gradient sums over all positions of the batch."""
  return (y.astype(jnp.float32) + bias[None, None, None]).astype(y.dtype)


class Conv(nn.Module):
  """Convolution with zero padding.

  Attributes:
    channels: of the output.
    size: of the kernel, odd.
    stride: 1 or 2.
    groups: of channels that do not mix.
    padding: zeros before and behind both axes; None: `size // 2` on each side.
    use_bias: add a bias.
    dtype: of the computation; parameters are float32.
  """

  channels: int
  size: int = 3
  stride: int = 1
  groups: int = 1
  padding: tuple[int, int] | None = None
  use_bias: bool = True
  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    shape = (self.size, self.size, x.shape[-1] // self.groups, self.channels)
    kernel = self.param("kernel", kernel_init, shape, jnp.float32)
    y = convolution(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      self.stride,
      self.groups,
      self.padding,
    )
    if self.use_bias:
      init = bias_init(math.prod(shape[:3]))
      bias = self.param("bias", init, (self.channels,), jnp.float32)
      y = _add_bias(y, bias)
    return y


class DepthwiseConv(nn.Module):
  """Convolution of each channel alone, zero padding of `size // 2`.

  Attributes:
    size: of the kernel, odd.
    use_bias: add a bias.
    dtype: of the computation; parameters are float32.
  """

  size: int = 3
  use_bias: bool = True
  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    channels = x.shape[-1]
    shape = (self.size, self.size, 1, channels)
    kernel = self.param("kernel", kernel_init, shape, jnp.float32)
    y = depthwise_convolution(x.astype(self.dtype), kernel.astype(self.dtype))
    if self.use_bias:
      init = bias_init(self.size * self.size)
      bias = self.param("bias", init, (channels,), jnp.float32)
      y = _add_bias(y, bias)
    return y
