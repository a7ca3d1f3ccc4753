"""Digests of arrays: the same over any devices, processes and shardings.

A digest is the sum, modulo 2**64, of an array's elements as bits, each times an
odd number of its own: a flipped bit changes it for certain, other damage all
but always. It is no protection against intent.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dcae_jax.runs import processes

_ODD = np.uint64(0x9E3779B97F4A7C15)
_AT_ONCE = 2**20  # elements
_Part = tuple[np.ndarray, tuple[slice, ...]]
Tree = Any


def digests(tree: Tree) -> dict[str, str]:
  """Of each array of a tree, by its path, over all processes."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  own = [
    sum(_sum(*part, x.shape) for part in _parts(x)) % 2**64 for _, x in leaves
  ]
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): f"{value:016x}"
    for (path, _), value in zip(leaves, processes.sums(own), strict=True)
  }


def not_finite(tree: Tree) -> int:
  """How many parts of a tree's arrays have values that are not."""
  return processes.total(
    sum(
      not np.isfinite(part).all()
      for array in jax.tree.leaves(tree)
      if jax.dtypes.issubdtype(array.dtype, np.floating)
      for part, _ in _parts(array)
    )
  )


def _parts(array: jax.Array) -> Iterator[_Part]:
  """Those that this process answers for, and where they lie."""
  for shard in array.addressable_shards:
    if shard.replica_id == 0:
      yield np.asarray(shard.data), shard.index


def _sum(
  part: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]
) -> int:
  """Of a part of an array of that shape, block by block of its rows."""
  bits = np.ascontiguousarray(part).view(f"uint{8 * part.itemsize}")
  if bits.size == math.prod(shape):  # all of it: its rows are its elements
    bits, index, shape = bits.ravel(), (slice(None),), (bits.size,)
  total, rows = 0, max(1, _AT_ONCE * len(bits) // max(bits.size, 1))
  first, *others = (
    np.arange(*where.indices(side), dtype=np.uint64)
    for where, side in zip(index, shape, strict=True)
  )
  for start in range(0, len(bits), rows):
    block = slice(start, start + rows)
    positions = np.ravel_multi_index(
      np.ix_(first[block], *others), shape
    ).astype(np.uint64)
    weights = positions * _ODD * np.uint64(2) + np.uint64(1)
    total += int((bits[block] * weights).sum(dtype=np.uint64))
  return total
