"""Convolutions of stride 1 in forms that XLA's CPU back end is fast at.

Shifted sums (depthwise), one matrix product (1x1), patches and one matrix
product (tiny grids), Winograd's algorithm (3x3, float32). All pad with zeros
and keep the size. Which of them is fast where, `convolution.py` decides.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

_TILE = 4  # outputs of a Winograd tile, on each side


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


def shifted_sum(x: Array, kernel: Array) -> Array:
  taps = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1])
  return sum(
    shifted * tap
    for shifted, tap in zip(_shifts(x, kernel.shape[0]), taps, strict=True)
  )


def shifted_sum_vjp(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
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
  return shifted_sum(g, kernel[::-1, ::-1]), gradient


def patch_product(x: Array, kernel: Array) -> Array:
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


def winograd(x: Array, kernel: Array) -> Array:
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


def winograd_vjp(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
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
  return winograd(g, flipped), kernel_gradient
