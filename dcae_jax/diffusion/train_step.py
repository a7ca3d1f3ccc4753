"""One training step of a latent diffusion model."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dcae_jax.diffusion import objectives
from dcae_jax.training import learning as learning_lib
from dcae_jax.training import state as state_lib

Tree = Any
_STEPS = 1  # what the seed is for; 0 is initial values


def create(
  *,
  apply: Callable[..., jax.Array],
  objective: objectives.Objective,
  num_classes: int,
  label_dropout: float,
  channel_candidates: Sequence[int],
  learning: learning_lib.Learning,
  seed: int,
  gather: Callable[[Tree], Tree] = lambda params: params,
) -> Callable[..., tuple[state_lib.TrainState, dict[str, jax.Array]]]:
  """The step `(state, batch) -> (state, metrics)`.

  A batch is `{"latents": [b, h, w, c], "labels": [b]}`, the latents scaled.
  Noise, times and dropped labels are those of the step, whoever computes it.

  Args:
    apply: of the denoiser: `(variables, z, t, labels)`.
    objective: what is learned.
    num_classes: the label that stands for none.
    label_dropout: part of the labels that are replaced by it.
    channel_candidates: for augmented training; empty: without.
    learning: how the parameters do.
    seed: of all that is random.
    gather: of parameters that are split over devices (`sharding.gather`).
  """

  def loss(params, key, batch):
    drop_key, mask_key, loss_key = jax.random.split(key, 3)
    z, labels = batch["latents"], batch["labels"]
    dropped = jax.random.bernoulli(drop_key, label_dropout, labels.shape)
    labels = jnp.where(dropped, num_classes, labels)
    mask = None
    if channel_candidates:
      mask = objectives.random_channel_mask(
        mask_key, len(z), z.shape[-1], channel_candidates
      )
    variables = {"params": gather(params)}
    losses, terms = objective.loss(
      lambda z, t: apply(variables, z, t, labels), loss_key, z, mask
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
