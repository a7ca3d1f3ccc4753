"""Images as a saved file holds them: 8-bit pixels."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num


def quantise(images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
  """[-1, 1] floats to whole numbers from 0 to 255, as a saved file holds."""
  return jnp.clip(jnp.round(images * 127.5 + 127.5), 0.0, 255.0)


def to_float(
  pixels: Num[Array | np.ndarray, "b h w c"],
) -> Float[Array | np.ndarray, "b h w c"]:
  """Numbers from 0 to 255 to [-1, 1] floats."""
  return pixels.astype("float32") / 127.5 - 1.0
