"""AdamW with warm-up, clipping, and weight decay on kernels only."""

import jax
import optax


def create(
  *,
  learning_rate: float,
  warmup_steps: int,
  beta1: float,
  beta2: float,
  weight_decay: float,
  clip_norm: float,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimizer and its learning rate as a function of the step.

  Norms and biases do not decay. Applied to the trainable part of
  `phases.partition`, it has no state for frozen parameters.

  Args:
    learning_rate: constant after the warm-up.
    warmup_steps: of a linear rise from a tenth of it; 0: none.
    beta1: of Adam's first moment.
    beta2: of Adam's second moment.
    weight_decay: decoupled, times the learning rate.
    clip_norm: largest global gradient norm; 0: not clipped.
  """
  schedule = optax.constant_schedule(learning_rate)
  if warmup_steps:
    schedule = optax.linear_schedule(
      learning_rate / 10, learning_rate, warmup_steps
    )
  adamw = optax.adamw(
    schedule, b1=beta1, b2=beta2, weight_decay=weight_decay, mask=_is_kernel
  )
  if clip_norm:
    adamw = optax.chain(optax.clip_by_global_norm(clip_norm), adamw)
  return adamw, schedule


def _is_kernel(parameters):
  return jax.tree.map_with_path(
    lambda keys, _: keys[-1].key == "kernel", parameters
  )
