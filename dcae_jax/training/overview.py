"""A table of all parameters of a run: what there is, where, and what learns."""

import dataclasses
from typing import Any

import jax
from clu import parameter_overview

from dcae_jax.training import freezing

Tree = Any


@dataclasses.dataclass(frozen=True)
class _Row:
  name: str
  shape: tuple[int, ...]
  size: int
  sharding: tuple[Any, ...]
  learns: bool


def table(parameters: Tree, mask: Tree, shardings: Tree) -> str:
  """A row for each parameter, with whether it learns and its sharding."""
  rows = [
    _Row(name, leaf.shape, leaf.size, tuple(sharding.spec), learns)
    for name, leaf, sharding, learns in zip(
      freezing.parameter_paths(parameters),
      *map(jax.tree.leaves, (parameters, shardings, mask)),
      strict=True,
    )
  ]
  return parameter_overview.make_table(rows)


def summary(parameters: Tree, mask: Tree) -> str:
  """How many scalars learn, and how many are frozen."""
  learning, frozen = freezing.partition(parameters, mask)
  return (
    f"{freezing.count(learning):,} parameters learn, "
    f"{freezing.count(frozen):,} are frozen"
  )
