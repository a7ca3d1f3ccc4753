"""One training step of a latent diffusion model."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dcae_jax.diffusion import conditioning, objectives
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.training import freezing
from dcae_jax.training import learning as learning_lib
from dcae_jax.training import state as state_lib

Tree = Any
_STEPS = 1  # what the seed is for; 0 is initial values


def create(
  *,
  denoiser: denoisers.Module,
  objective: objectives.Objective,
  dropout: float,
  channel_candidates: Sequence[int],
  learning: learning_lib.Learning,
  loaded: conditioning.Loaded,
  seed: int,
  gather: Callable[[Tree], Tree] = lambda params: params,
) -> Callable[..., tuple[state_lib.TrainState, dict[str, jax.Array]]]:
  """The step `(state, batch, ...) -> (state, metrics)`.

  A batch is `{"latents": [b, h, w, c]}`, the latents scaled, and what is loaded
  of a condition by the name of its kind; its constants follow. Noise, times and
  dropped conditions are those of the step, whoever computes it.

  Args:
    denoiser: what learns.
    objective: what is learned.
    dropout: part of the conditions that are replaced by none.
    channel_candidates: for augmented training; empty: without.
    learning: how the parameters do.
    loaded: how a condition comes about.
    seed: of all that is random.
    gather: `sharding.gather`, where devices share parameters.
  """
  kind = denoiser.conditioning

  def loss(trainable, frozen, key, batch, constants):
    params = freezing.combine(trainable, frozen)
    drop_key, mask_key, loss_key = jax.random.split(key, 3)
    z = batch["latents"]
    condition = loaded.condition(batch[kind.name], *constants)
    condition = conditioning.dropped(kind, drop_key, condition, dropout)
    mask = None
    if channel_candidates:
      mask = objectives.random_channel_mask(
        mask_key, len(z), z.shape[-1], channel_candidates
      )
    variables = {"params": gather(params)}
    losses, terms = objective.loss(
      lambda z, t: denoiser.apply(variables, z, t, condition), loss_key, z, mask
    )
    metrics = {f"loss/{name}": jnp.mean(x) for name, x in terms.items()}
    return jnp.mean(losses), metrics

  def step(state, batch, *constants):
    key = jax.random.fold_in(jax.random.key(seed), _STEPS)
    key = jax.random.fold_in(key, state.step)
    parts = freezing.partition(state.params, learning.mask)
    (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
      *parts, key, batch, constants
    )
    state, norms = learning.update(state, gradient)
    return state, metrics | {"loss/total": total} | norms

  return step
