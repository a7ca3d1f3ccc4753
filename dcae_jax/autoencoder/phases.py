"""The three training phases of DC-AE (arXiv 2410.10733, section 3.2, figure 6).

A phase says which parameters learn, whether the GAN loss acts, and whether
batch statistics move. Parameters are named by their path, such as
`encoder/project_out/conv/kernel`; which of them the paper means by "middle
layers" and "decoder head" is not published beyond these words, so that they are
patterns, with defaults.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

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
