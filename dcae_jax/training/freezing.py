"""Which parameters of a tree learn: patterns over paths, and the two parts.

A parameter's path is such as `encoder/project_out/conv/kernel`. What a phase
lets learn is not known here.
"""

import fnmatch
from typing import Any

import jax
import optax

from dcae_jax import errors

Tree = Any


def parameter_paths(parameters: Tree) -> list[str]:
  """The paths of all leaves, in the tree's own order."""
  leaves, _ = jax.tree.flatten_with_path(parameters)
  return [path_of(path) for path, _ in leaves]


def path_of(keys: tuple[Any, ...]) -> str:
  """A leaf's keys in its tree as a path, such as "encoder/stage_1"."""
  return jax.tree_util.keystr(keys, simple=True, separator="/")


def trainable_mask(parameters: Tree, patterns: tuple[str, ...]) -> Tree:
  """A tree of booleans: True where a parameter learns.

  A pattern names a module ("decoder/project_out") or is a shell pattern over
  the whole path ("encoder/*/norm/scale"), in which `*` crosses "/", too. Raises
  UserError for one that matches nothing, or none at all.
  """
  paths = parameter_paths(parameters)
  if not patterns:
    raise errors.UserError("no trainable patterns: nothing would learn")
  for pattern in patterns:
    if not any(_matches(path, pattern) for path in paths):
      modules = sorted({"/".join(path.split("/")[:2]) for path in paths})
      raise errors.UserError(
        f"trainable pattern {pattern!r} matches no parameter; there are "
        f"{', '.join(modules)}, and what is below them"
      )
  return jax.tree.map_with_path(
    lambda keys, _: any(_matches(path_of(keys), p) for p in patterns),
    parameters,
  )


def _matches(path: str, pattern: str) -> bool:
  pattern = pattern.rstrip("/")
  return any(fnmatch.fnmatchcase(path, p) for p in (pattern, f"{pattern}/*"))


def partition(parameters: Tree, mask: Tree) -> tuple[Tree, Tree]:
  """Splits into (trainable, frozen), with `optax.MaskedNode` for the others.

  A masked node has no leaves: what is built over the trainable part (gradients,
  optimizer state) does not exist for frozen parameters.
  """
  masked = optax.MaskedNode()
  part = lambda of: jax.tree.map(
    lambda leaf, learns: leaf if learns == of else masked, parameters, mask
  )
  return part(True), part(False)


def combine(trainable: Tree, frozen: Tree) -> Tree:
  """Inverse of `partition`."""
  is_masked = lambda leaf: isinstance(leaf, optax.MaskedNode)
  return jax.tree.map(
    lambda a, b: b if is_masked(a) else a, trainable, frozen, is_leaf=is_masked
  )


def count(parameters: Tree) -> int:
  """Number of scalars in a tree of arrays or shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(parameters))
