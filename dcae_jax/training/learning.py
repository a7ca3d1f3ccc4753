"""From gradients to the next state: the tail of every training step.

The optimizer's update, the averages (EMA) and the norms that are logged, for
the parameters that learn; the others are carried along untouched.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dcae_jax.training import freezing
from dcae_jax.training import state as state_lib

Tree = Any
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Ema:
  """Averages with the decay `decay * (1 - exp(-step / ramp_steps))`."""

  decay: float
  ramp_steps: int

  def at(self, step: jax.Array) -> jax.Array:
    """The decay of that step, counted from 1."""
    if not self.ramp_steps:
      return jnp.float32(self.decay)
    return self.decay * (1 - jnp.exp(-step / self.ramp_steps))


@dataclasses.dataclass(frozen=True)
class Learning:
  """How parameters learn from their gradients.

  Attributes:
    mask: which of them do (`freezing.trainable_mask`).
    optimizer: of these; it has no state for the others.
    schedule: its learning rate, for the metrics.
  """

  mask: Tree
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  ema: Ema

  def init(self, variables: Tree, ema: Tree = None) -> state_lib.TrainState:
    """The state at step 0; the averages start as a copy of the variables.

    Unless `ema` has others; both are `{"params": ..., "batch_stats": ...}`.
    """
    trainable, _ = freezing.partition(variables["params"], self.mask)
    return state_lib.TrainState(
      step=jnp.zeros((), jnp.int32),
      params=variables["params"],
      batch_stats=variables["batch_stats"],
      # A copy, because the step donates both.
      ema=jax.tree.map(jnp.copy, variables if ema is None else ema),
      optimizer=self.optimizer.init(trainable),
    )

  def update(
    self, state: state_lib.TrainState, gradient: Tree, batch_stats: Tree = None
  ) -> tuple[state_lib.TrainState, Metrics]:
    """The state after a step, and what is logged of it.

    Args:
      state: before the step.
      gradient: of the trainable part of the parameters.
      batch_stats: after the step; None: they stay.
    """
    trainable, frozen = freezing.partition(state.params, self.mask)
    averages, frozen_averages = freezing.partition(
      state.ema["params"], self.mask
    )
    updates, optimizer_state = self.optimizer.update(
      gradient, state.optimizer, trainable
    )
    trainable = optax.apply_updates(trainable, updates)
    decay = self.ema.at(state.step + 1)
    average = lambda old, new: decay * old + (1 - decay) * new
    averages = jax.tree.map(average, averages, trainable)
    averaged_stats = state.ema["batch_stats"]
    if batch_stats is None:
      batch_stats = state.batch_stats
    else:
      averaged_stats = jax.tree.map(average, averaged_stats, batch_stats)
    metrics = {
      "gradient_norm": optax.tree.norm(gradient),
      # Of what a checkpoint would hold: the losses are from before the update.
      "parameter_norm": optax.tree.norm(trainable),
      "learning_rate": jnp.asarray(self.schedule(state.step), jnp.float32),
    }
    state = state.replace(
      step=state.step + 1,
      params=freezing.combine(trainable, frozen),
      batch_stats=batch_stats,
      ema={
        "params": freezing.combine(averages, frozen_averages),
        "batch_stats": averaged_stats,
      },
      optimizer=optimizer_state,
    )
    return state, metrics
