"""How far training moves the latents of an autoencoder.

Where only the decoder learns (DC-AE, section 3.2, phase 3), latents that were
exported before stay valid: the change is exactly 0.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dcae_jax.autoencoder import quantisation
from dcae_jax.evaluation import reconstruction


def relative(
  encode: Callable[[Any, Array], Array],
  before: Any,
  after: Any,
  batches: Iterable[reconstruction.Batch],
  whole: jax.sharding.Sharding,
) -> float:
  """||after - before|| / ||before||, of the latents of all images together.

  Args:
    encode: `(variables, images in [-1, 1])`.
    before: variables; sharded as those of after.
    after: variables.
    batches: images; those count whose mask is True.
    whole: on every device.
  """
  # Both by one program: two may round differently.
  latents = jax.jit(
    lambda variables, images: encode(
      variables, quantisation.to_float(images.astype(jnp.float32))
    )
  )
  squares = jax.jit(_squares, out_shardings=whole)
  total = np.zeros(2)
  for batch in batches:
    both = (latents(variables, batch.images) for variables in (before, after))
    total += np.asarray(squares(*both, batch.mask), float)
  size, change = total
  return float(np.sqrt(change / size))


def _squares(
  before: Float[Array, "b h w c"],
  after: Float[Array, "b h w c"],
  mask: Bool[Array, " b"],
) -> Float[Array, " 2"]:
  """Sums of those of the latents before, and of their changes."""
  before, after = (z.astype(jnp.float32) for z in (before, after))
  sums = [
    jnp.sum(jnp.square(z), axis=(1, 2, 3)) for z in (before, after - before)
  ]
  return jnp.sum(jnp.stack(sums), axis=1, where=mask)
