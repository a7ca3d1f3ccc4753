"""The numbers that layers compute with."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from dcae_jax import errors


def check_dtype(dtype: DTypeLike) -> None:
  """Raises UserError for numbers that layers do not compute with."""
  known = ("float32", "bfloat16")  # float16 would overflow in attention
  try:
    name = jnp.dtype(dtype).name
  except TypeError:
    name = str(dtype)
  if name not in known:
    raise errors.UserError(
      f"unknown dtype {name!r}; known are {', '.join(known)}"
    )
