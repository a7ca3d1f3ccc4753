"""Classifier-free guidance (arXiv 2207.12598), at all times or some of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dcae_jax import errors
from dcae_jax.diffusion import conditioning, objectives


def check_guidance(scale: float, interval: tuple[float, float] | None) -> None:
  """Raises UserError for a negative scale, or an empty interval."""
  if not 0 <= scale < np.inf:
    what = "negative" if scale < 0 else "not a finite number"
    raise errors.UserError(
      f"guidance scale {scale} is {what}; 1 is without guidance, and larger "
      "scales guide"
    )
  if interval is not None and not 0 <= interval[0] < interval[1] <= 1000:
    raise errors.UserError(
      f"guidance interval {interval} is not (low, high) between 0 and 1000; "
      "None is for all times"
    )


def guided(
  network: Callable[
    [objectives.Latents, Float[Array, " b"], conditioning.Condition],
    objectives.Output,
  ],
  condition: conditioning.Condition,
  null: conditioning.Condition,
  scale: float,
  interval: tuple[float, float] | None = None,
) -> objectives.ModelFunction:
  """Classifier-free guidance as model_fn(z, t).

  The output is null + scale (conditional - null) on all latent channels (the
  code of DiT guides the first three only); learned variances, which come after
  them, are the conditional ones. Both halves are one call of 2b examples, each
  with its own null beside it, so that a batch which is split over devices stays
  where it is.

  Args:
    network: a function of (z, t, condition).
    condition: of the b examples.
    null: the null condition, one row for each example.
    scale: 1 is the conditional network alone, and costs no more; 0 the
      unconditional one. A negative one is a UserError.
    interval: the times (low, high), ends included and as the network sees them
      (0 to 1000), within which guidance acts; outside, the output is the
      conditional one (arXiv 2404.07724).
  """
  check_guidance(scale, interval)
  if scale == 1:
    return lambda z, t: network(z, t, condition)

  def model_fn(z, t):
    both = jax.tree.map(
      lambda x, none: jnp.stack([x, none], 1).reshape(-1, *x.shape[1:]),
      condition,
      null,
    )
    output = network(jnp.repeat(z, 2, 0), jnp.repeat(t, 2), both)
    output = output.astype(jnp.float32).reshape(len(z), 2, *output.shape[1:])
    conditional, unconditional = output[:, 0], output[:, 1]
    excess = jnp.full(t.shape, scale - 1, jnp.float32)
    if interval is not None:
      inside = (interval[0] <= t) & (t <= interval[1])
      excess = jnp.where(inside, excess, 0.0)
    guides = jnp.arange(output.shape[-1]) < z.shape[-1]
    excess = excess[:, None, None, None] * guides[None, None, None]
    return conditional + excess * (conditional - unconditional)

  return model_fn
