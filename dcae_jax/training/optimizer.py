"""AdamW, the paper's optimizer, or Muon; and the learning rate over a run.

Muon makes the momentum of each matrix orthogonal (Newton-Schulz iterations):
all directions of a kernel learn at the same speed, however badly conditioned
images are. What is no matrix is left to Adam, with a rate of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib, schedules

from dcae_jax import errors

Tree = Any


@dataclasses.dataclass(frozen=True)
class Settings:
  """The keys of `config.optimizer`, which `configs/base.py` describes.

  `kind` is a key of `KINDS`, `schedule` of `SCHEDULES`. Weight decay is
  decoupled, and times the learning rate.
  """

  kind: str
  learning_rate: float
  adam_learning_rate: float
  schedule: str
  warmup_steps: int
  decay_steps: int
  final_rate: float
  beta1: float
  beta2: float
  epsilon: float
  weight_decay: float
  decay_all: bool
  clip_norm: float


def create(
  settings: Settings,
  steps: int,
  on_whole_arrays: Callable[[Callable], Callable] = lambda function: function,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimizer, and its learning rate as a function of the step.

  Applied to the trainable part of `freezing.partition`, it has no state for
  frozen parameters.

  A rate that decays has fallen at the end of the steps. Where arrays are split,
  `on_whole_arrays` is that of `sharding`. Raises UserError for an unknown kind
  or schedule, or nothing to decay over.
  """
  for key, known in (("kind", KINDS), ("schedule", SCHEDULES)):
    if getattr(settings, key) not in known:
      raise errors.UserError(
        f"unknown config.optimizer.{key}={getattr(settings, key)!r}; known are "
        f"{', '.join(known)}"
      )
  rate = _rate(settings, settings.learning_rate, steps)
  adam_rate = _rate(settings, settings.adam_learning_rate, steps)
  optimizer = KINDS[settings.kind](settings, rate, adam_rate, on_whole_arrays)
  if settings.clip_norm:
    clip = optax.clip_by_global_norm(settings.clip_norm)
    optimizer = optax.chain(clip, optimizer)
  return optimizer, rate


def of_discriminator(settings: Settings, learning_rate: float) -> Settings:
  """AdamW with that rate; 0: the one that Adam has in the autoencoder."""
  is_adamw = settings.kind == "adamw"
  adams = settings.learning_rate if is_adamw else settings.adam_learning_rate
  return dataclasses.replace(
    settings, kind="adamw", learning_rate=learning_rate or adams
  )


def _adamw(settings: Settings, rate: optax.Schedule, *_: Any):
  return optax.adamw(
    rate,
    b1=settings.beta1,
    b2=settings.beta2,
    eps=settings.epsilon,
    weight_decay=settings.weight_decay,
    mask=None if settings.decay_all else _is_kernel,
  )


def _muon(
  settings: Settings,
  rate: optax.Schedule,
  adam_rate: optax.Schedule,
  on_whole_arrays: Callable[[Callable], Callable],
):
  dimensions = lambda kernels: jax.tree.map(
    lambda x: contrib.MuonDimensionNumbers(
      tuple(range(x.ndim - 1)), x.ndim - 1
    ),
    kernels,
  )
  descent = contrib.muon(1.0, muon_weight_dimension_numbers=dimensions)
  matrices = optax.chain(
    optax.GradientTransformation(descent.init, on_whole_arrays(descent.update)),
    # Element by element, so that it is not done on whole arrays; and minus,
    # since the update already is: all matrices are kernels, which decay.
    optax.add_decayed_weights(-settings.weight_decay),
    optax.scale_by_schedule(rate),
  )
  return optax.partition(
    {"muon": matrices, "adam": _adamw(settings, adam_rate)},
    lambda parameters: jax.tree.map_with_path(
      lambda keys, x: "muon" if _is_matrix(keys, x) else "adam", parameters
    ),
  )


# Name to `(settings, rate, rate of Adam beside Muon, on_whole_arrays)` to it.
KINDS = {"adamw": _adamw, "muon": _muon}


def _is_kernel(parameters: Tree) -> Tree:
  return jax.tree.map_with_path(
    lambda keys, _: keys[-1].key == "kernel", parameters
  )


def _is_matrix(keys: tuple[Any, ...], parameter: jax.Array) -> bool:
  """Kernels: (h w in) x out of convolutions, unless depthwise; in x out."""
  if keys[-1].key != "kernel" or parameter.ndim not in (2, 4):
    return False
  return parameter.ndim == 2 or parameter.shape[2] > 1


def _rate(settings: Settings, largest: float, steps: int) -> optax.Schedule:
  warmup_steps = settings.warmup_steps
  after = SCHEDULES[settings.schedule](settings, largest, steps - warmup_steps)
  if not warmup_steps:
    return after
  warmup = schedules.linear_schedule(largest / 10, largest, warmup_steps)
  return schedules.join_schedules([warmup, after], [warmup_steps])


def _constant(settings: Settings, largest: float, steps: int):
  del settings, steps
  return schedules.constant_schedule(largest)


def _cosine(settings: Settings, largest: float, steps: int):
  return schedules.cosine_decay_schedule(
    largest, _decay_steps(settings, steps), alpha=settings.final_rate
  )


def _linear(settings: Settings, largest: float, steps: int):
  return schedules.linear_schedule(
    largest, settings.final_rate * largest, _decay_steps(settings, steps)
  )


def _warmup_stable_decay(settings: Settings, largest: float, steps: int):
  if not settings.decay_steps:
    raise errors.UserError(
      "config.optimizer.decay_steps=0 leaves nothing to decay with schedule "
      "wsd; set it to the number of the last steps, such as a tenth of all"
    )
  return schedules.join_schedules(
    [schedules.constant_schedule(largest), _linear(settings, largest, steps)],
    [steps - _decay_steps(settings, steps)],
  )


# Name to `(settings, largest rate, steps after the warm-up) -> schedule`.
SCHEDULES = {
  "constant": _constant,
  "cosine": _cosine,
  "linear": _linear,
  "wsd": _warmup_stable_decay,
}


def _decay_steps(settings: Settings, steps: int) -> int:
  """All that there are, where that is less: a trial run may be short."""
  return max(min(settings.decay_steps or steps, steps), 1)
