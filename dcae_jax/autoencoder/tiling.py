"""Large images in overlapping tiles, blended linearly where they overlap."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcae_jax import errors


class Tiles(NamedTuple):
  """Squares of `size` latent positions, `stride` from one to the next.

  Both 0: no tiles.
  """

  size: int
  stride: int

  @classmethod
  def create(
    cls, tile: int | None, stride: int | None, spatial_compression: int
  ) -> "Tiles":
    """From sides in pixels; raises UserError for tiles that cannot be."""
    if tile is None:
      if stride is not None:
        raise errors.UserError(f"stride={stride} needs tile=")
      return cls(0, 0)
    for name, value in (("tile", tile), ("stride", stride)):
      if value is not None and (
        not isinstance(value, int | np.integer)
        or value < 1
        or value % spatial_compression
      ):
        raise errors.UserError(
          f"{name}={value!r} is not a multiple of {spatial_compression}, the "
          "spatial compression of this autoencoder"
        )
    size = tile // spatial_compression
    if stride is None:
      return cls(size, max(size * 3 // 4, 1))
    if stride > tile:
      raise errors.UserError(f"stride={stride} leaves gaps: tile={tile}")
    return cls(size, stride // spatial_compression)

  def apply(
    self,
    f: Callable[[np.ndarray], jax.Array],
    x: np.ndarray,
    source_unit: int,
    result_unit: int,
  ) -> jax.Array:
    """`f` of `x`, in tiles if `x` is larger than one.

    `f` goes from [b, h * source_unit, w * source_unit, c] to
    [b, h * result_unit, w * result_unit, d]; one side of the two is in pixels,
    the other in latent positions. Only a tile is on the device at a time.
    """
    grid = [side // source_unit for side in x.shape[1:3]]
    if not self.size or max(grid) <= self.size:
      return f(x)
    sizes = [min(self.size, side) for side in grid]
    weights = [self._ramp(size * result_unit, result_unit) for size in sizes]
    window = (weights[0][:, None] * weights[1])[:, :, None]
    total, norm = None, 0.0
    for corner in itertools.product(*map(self._starts, grid)):
      part = f(x[:, *_slices(corner, sizes, source_unit)])
      if total is None:
        shape = [side * result_unit for side in grid]
        total = np.zeros((len(x), *shape, part.shape[-1]), np.float32)
        norm = np.zeros((*shape, 1), np.float32)
      where = _slices(corner, sizes, result_unit)
      total[:, *where] += np.asarray(part) * window
      norm[*where] += window
    total /= norm
    return jnp.asarray(total)

  def _starts(self, length: int) -> list[int]:
    """The last tile ends where the image does: all have the same size."""
    last = max(length - self.size, 0)
    return [*range(0, last, self.stride), last]

  def _ramp(self, length: int, unit: int) -> np.ndarray:
    """Weights that rise over the overlap, stay, and fall: [length]."""
    overlap = max((self.size - self.stride) * unit, 0)
    distance = np.arange(length) + 0.5
    distance = np.minimum(distance, distance[::-1])
    return np.minimum(distance / max(overlap, 1), 1).astype(np.float32)


def _slices(
  corner: tuple[int, ...], sizes: list[int], unit: int
) -> tuple[slice, ...]:
  return tuple(
    slice(start * unit, (start + size) * unit)
    for start, size in zip(corner, sizes, strict=True)
  )
