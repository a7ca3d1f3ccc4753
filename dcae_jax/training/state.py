"""What a training step carries from one step to the next."""

from typing import Any

import flax.struct

Tree = Any


class TrainState(flax.struct.PyTreeNode):
  """Everything that learns, moves or counts; all of it is checkpointed.

  Attributes:
    step: steps done, int32.
    params: of the model.
    batch_stats: running statistics of batch norm; empty without it.
    ema: averages of both: `{"params": ..., "batch_stats": ...}`.
    optimizer: state over the trainable parameters alone.
    discriminator: its parameters; as the state of its optimizer, None outside
      phase 3.
  """

  step: Tree
  params: Tree
  batch_stats: Tree
  ema: Tree
  optimizer: Tree
  discriminator: Tree = None
  discriminator_optimizer: Tree = None

  @property
  def variables(self) -> Tree:
    """What `apply` of the model takes."""
    return {"params": self.params, "batch_stats": self.batch_stats}
