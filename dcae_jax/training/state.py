"""What a training step carries from one step to the next."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dcae_jax.training import freezing

Tree = Any


class TrainState(flax.struct.PyTreeNode):
  """Everything that learns, moves or counts; all of it is checkpointed.

  Attributes:
    step: steps done, int32.
    params: of the autoencoder.
    batch_stats: running statistics of batch norm; empty without it.
    ema: averages of both: `{"params": ..., "batch_stats": ...}`.
    optimizer: state over the trainable parameters alone.
    discriminator: its parameters, or None outside phase 3.
    discriminator_optimizer: its optimizer's state, or None.
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
    """What `apply` of the autoencoder takes."""
    return {"params": self.params, "batch_stats": self.batch_stats}


def create(
  variables: Tree,
  mask: Tree,
  optimizer: optax.GradientTransformation,
  ema: Tree | None = None,
  discriminator: Tree = None,
  discriminator_optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
  """A state at step 0.

  Args:
    variables: `{"params": ..., "batch_stats": ...}`.
    mask: which parameters learn (`freezing.trainable_mask`).
    optimizer: of the autoencoder.
    ema: averages to go on from; None: a copy of `variables`.
    discriminator: its parameters, in phase 3.
    discriminator_optimizer: its optimizer, in phase 3.
  """
  params = variables["params"]
  batch_stats = variables["batch_stats"]
  trainable, _ = freezing.partition(params, mask)
  if ema is None:
    ema = {"params": params, "batch_stats": batch_stats}
  optimizer_state = None
  if discriminator is not None:
    optimizer_state = discriminator_optimizer.init(discriminator)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    ema=jax.tree.map(jnp.copy, ema),  # donated apart from the parameters
    optimizer=optimizer.init(trainable),
    discriminator=discriminator,
    discriminator_optimizer=optimizer_state,
  )
