"""The three training phases of DC-AE (arXiv 2410.10733, section 3.2, figure 6).

A phase says which parameters learn, whether the GAN loss acts, and whether
batch statistics move. Parameters are named by their path, such as
`encoder/project_out/conv/kernel`; which of them the paper means by "middle
layers" and "decoder head" is not published beyond these words, so that they are
patterns, with defaults.
"""

import dataclasses
import fnmatch
from collections.abc import Callable
from typing import Any

import jax
import optax

Tree = Any


@dataclasses.dataclass(frozen=True)
class Phase:
  """What one phase trains, and with which losses.

  Attributes:
    trainable: patterns over parameter paths; the rest is frozen.
    adversarial: the PatchGAN loss acts beside L1 and LPIPS.
    moves_batch_statistics: batch norm uses, and records, each batch's
      statistics; otherwise the stored ones are used and stay as they are.
  """

  trainable: tuple[str, ...]
  adversarial: bool = False
  moves_batch_statistics: bool = False


def low_resolution_full_training(
  trainable: tuple[str, ...] = ("*",),
) -> Phase:
  """Phase 1: everything learns, from L1 + LPIPS."""
  return Phase(trainable, moves_batch_statistics=True)


def high_resolution_latent_adaptation(
  trainable: tuple[str, ...] = ("encoder/project_out", "decoder/project_in"),
) -> Phase:
  """Phase 2: the middle layers learn at high resolution, from L1 + LPIPS.

  The paper: "encoder's head layers and decoder's input layers". A wider choice
  adds the deepest stages, such as "encoder/stage_5" and "decoder/stage_5".
  """
  return Phase(trainable)


def low_resolution_local_refinement(
  trainable: tuple[str, ...] = ("decoder/project_out",),
) -> Phase:
  """Phase 3: the decoder's head learns, from L1 + LPIPS + GAN.

  The encoder stays bit-identical, so that latents of phase 2 stay valid.
  """
  return Phase(trainable, adversarial=True)


PHASES: dict[str, Callable[[tuple[str, ...]], Phase]] = {
  phase.__name__: phase
  for phase in (
    low_resolution_full_training,
    high_resolution_latent_adaptation,
    low_resolution_local_refinement,
  )
}


def create(name: str, trainable: tuple[str, ...]) -> Phase:
  """The phase of that name; ValueError with the known names otherwise."""
  if name not in PHASES:
    raise ValueError(f"unknown phase {name!r}; known are {', '.join(PHASES)}")
  if not all(isinstance(pattern, str) for pattern in trainable or (None,)):
    raise ValueError(
      f"trainable patterns {trainable!r} are not strings, at least one of them"
    )
  return PHASES[name](tuple(trainable))


def parameter_paths(parameters: Tree) -> list[str]:
  """The paths of all leaves, in the tree's own order."""
  leaves, _ = jax.tree.flatten_with_path(parameters)
  return [_path(path) for path, _ in leaves]


def _path(keys: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(keys, simple=True, separator="/")


def trainable_mask(parameters: Tree, patterns: tuple[str, ...]) -> Tree:
  """A tree of booleans: True where a parameter learns.

  A pattern names a module ("decoder/project_out") or is a shell pattern over
  the whole path ("encoder/*/norm/scale").

  Raises:
    ValueError: a pattern that matches no parameter, or no patterns at all.
  """
  paths = parameter_paths(parameters)
  if not patterns:
    raise ValueError("no trainable patterns are given, so nothing would learn")
  for pattern in patterns:
    if not any(_matches(path, pattern) for path in paths):
      modules = sorted({"/".join(path.split("/")[:2]) for path in paths})
      raise ValueError(
        f"trainable pattern {pattern!r} matches no parameter; there are "
        f"{', '.join(modules)}, and what is below them"
      )
  return jax.tree.map_with_path(
    lambda keys, _: any(_matches(_path(keys), p) for p in patterns), parameters
  )


def _matches(path: str, pattern: str) -> bool:
  pattern = pattern.rstrip("/")
  return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(
    path, f"{pattern}/*"
  )


def blocks_learn_alike(mask: Tree) -> bool:
  """Whether all blocks of a stage have the same frozen parameters."""
  for part in mask.values():
    for stage in part.values():
      blocks = [
        jax.tree.leaves(x) for name, x in stage.items() if "block_" in name
      ]
      if any(block != blocks[0] for block in blocks):
        return False
  return True


def partition(parameters: Tree, mask: Tree) -> tuple[Tree, Tree]:
  """Splits into (trainable, frozen), with `optax.MaskedNode` for the others.

  A masked node has no leaves: what is built over the trainable part (gradients,
  optimizer state) does not exist for frozen parameters.
  """
  masked = optax.MaskedNode()
  trainable = jax.tree.map(
    lambda leaf, learns: leaf if learns else masked, parameters, mask
  )
  frozen = jax.tree.map(
    lambda leaf, learns: masked if learns else leaf, parameters, mask
  )
  return trainable, frozen


def combine(trainable: Tree, frozen: Tree) -> Tree:
  """Inverse of `partition`."""
  is_masked = lambda leaf: isinstance(leaf, optax.MaskedNode)
  return jax.tree.map(
    lambda a, b: b if is_masked(a) else a, trainable, frozen, is_leaf=is_masked
  )


def count(parameters: Tree) -> int:
  """Number of scalars in a tree of arrays or shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(parameters))
