"""The three training phases of DC-AE (arXiv 2410.10733, section 3.2, figure 6).

A phase says which parameters learn, whether the GAN loss acts, and whether
batch statistics move. Which parameters the paper means by "middle layers" and
"decoder head" is not published beyond these words, so that they are patterns
over paths such as `encoder/project_out/conv/kernel`, in the config.
"""

import dataclasses
from typing import Any

import jax

from dcae_jax import errors

Tree = Any


@dataclasses.dataclass(frozen=True)
class Phase:
  """What one phase trains, and with which losses.

  Attributes:
    trainable: patterns over parameter paths, from a config; the rest is frozen.
    adversarial: the PatchGAN loss acts beside L1 and LPIPS.
    moves_batch_statistics: batch norm uses, and records, each batch's
      statistics; otherwise the stored ones are used and stay as they are.
    from_scratch: may begin with initial values, not only with trained ones.
  """

  trainable: tuple[str, ...] = ()
  adversarial: bool = False
  moves_batch_statistics: bool = False
  from_scratch: bool = False


PHASES = {
  # Phase 1: everything learns, from L1 + LPIPS.
  "low_resolution_full_training": Phase(
    moves_batch_statistics=True, from_scratch=True
  ),
  # Phase 2: the middle layers learn at high resolution, from L1 + LPIPS.
  "high_resolution_latent_adaptation": Phase(),
  # Phase 3: the decoder's head learns, from L1 + LPIPS + GAN. The encoder stays
  # bit-identical, so that latents of phase 2 stay valid.
  "low_resolution_local_refinement": Phase(adversarial=True),
}


def create(name: str, trainable: tuple[str, ...]) -> Phase:
  """The phase of that name, in which parameters of these patterns learn.

  Raises UserError for an unknown phase, or a pattern that is not a string.
  """
  if name not in PHASES:
    raise errors.UserError(
      f"unknown phase {name!r}; known are {', '.join(PHASES)}"
    )
  if not all(isinstance(pattern, str) for pattern in trainable or (None,)):
    raise errors.UserError(
      f"trainable patterns {trainable!r} are not strings, at least one of them"
    )
  return dataclasses.replace(PHASES[name], trainable=tuple(trainable))


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
