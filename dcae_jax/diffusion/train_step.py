"""One training step of a latent diffusion model."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dcae_jax.diffusion import conditioning, objectives
from dcae_jax.diffusion.denoisers import families as denoisers
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
  seed: int,
  gather: Callable[[Tree], Tree] = lambda params: params,
) -> Callable[..., tuple[state_lib.TrainState, dict[str, jax.Array]]]:
  """The step `(state, batch) -> (state, metrics)`.

  A batch is `{"latents": [b, h, w, c]}`, the latents scaled, and a condition by
  the name of its kind. Noise, times and dropped conditions are those of the
  step, whoever computes it.

  Args:
    denoiser: what learns.
    objective: what is learned.
    dropout: part of the conditions that are replaced by none.
    channel_candidates: for augmented training; empty: without.
    learning: how the parameters do.
    seed: of all that is random.
    gather: `sharding.gather`, where devices share parameters.
  """
  kind = denoiser.conditioning

  def loss(params, key, batch):
    drop_key, mask_key, loss_key = jax.random.split(key, 3)
    z = batch["latents"]
    condition = conditioning.dropped(kind, drop_key, batch[kind.name], dropout)
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

  def step(state, batch):
    key = jax.random.fold_in(jax.random.key(seed), _STEPS)
    key = jax.random.fold_in(key, state.step)
    (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
      state.params, key, batch
    )
    state, norms = learning.update(state, gradient)
    return state, metrics | {"loss/total": total} | norms

  return step
