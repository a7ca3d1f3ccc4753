"""What the networks of all families of autoencoders have in common."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from dcae_jax import errors
from dcae_jax.autoencoder.dcae import residual_autoencoding
from dcae_jax.nn import precision


@dataclasses.dataclass(frozen=True)
class Options:
  """How a network computes; its parameters stay the same.

  Attributes:
    residual_autoencoding: False removes DC-AE's shortcuts, the paper's
      ablation.
    remat: recompute each block's activations in the backward pass.
    scan: compile the blocks of DC-AE's stages as loops.
    dtype: of the computation; attention and norms are float32.
    space_to_channel: side of the squares of latent positions that are moved
      into channels, as in table 1's "f8 + p=8"; 1: none.

  Raises UserError for a dtype or a side that it cannot compute with.
  """

  residual_autoencoding: bool = True
  remat: bool = False
  scan: bool = False
  dtype: DTypeLike = "float32"
  space_to_channel: int = 1

  def __post_init__(self):
    precision.check_dtype(self.dtype)
    side = self.space_to_channel
    is_whole = isinstance(side, int) and not isinstance(side, bool)
    if not is_whole or not 1 <= side <= 64:
      raise errors.UserError(
        f"space_to_channel={side!r} is not a whole number from 1 to 64; 1 "
        "leaves latents as they are"
      )

  def wrap(self, block: type[nn.Module]) -> type[nn.Module]:
    """The class of a block, recomputed in the backward pass if that is on."""
    return nn.remat(block) if self.remat else block


class Network(nn.Module):
  """An autoencoder: `encode`, `decode`, or both by a call.

  Images are float in [-1, 1], NHWC; latents are not scaled. Both directions
  return float32.
  """

  architecture: Any
  encoder: nn.Module
  decoder: nn.Module
  options: Options = Options()

  @property
  def spatial_compression(self) -> int:
    """How many times smaller than an image's the sides of its latents are."""
    return self.architecture.spatial_compression * self.options.space_to_channel

  @property
  def latent_channels(self) -> int:
    return self.architecture.latent_channels * self.options.space_to_channel**2

  def latents(
    self, images: Float[Array, "b h w c"]
  ) -> Float[Array, "b h2 w2 d"]:
    """Before space goes to channels."""
    return self.encoder(images).astype("float32")

  def encode(
    self, images: Float[Array, "b h w c"]
  ) -> Float[Array, "b h2 w2 d"]:
    """Raises UserError for sides that the compression does not divide."""
    for side in images.shape[1:3]:
      check_side(side, self.spatial_compression)
    z, p = self.latents(images), self.options.space_to_channel
    return residual_autoencoding.space_to_channel(z, p)

  def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    p = self.options.space_to_channel
    z = residual_autoencoding.channel_to_space(z, p)
    return self.decoder(z).astype("float32")

  def __call__(
    self, images: Float[Array, "b h w c"]
  ) -> Float[Array, "b h w c"]:
    return self.decode(self.encode(images))


def initial_variables(
  model: nn.Module, image_channels: int, key: PRNGKeyArray
) -> dict[str, Any]:
  """`{"params": ..., "batch_stats": ...}` as training starts from them."""
  side = model.spatial_compression
  image = jnp.zeros((1, side, side, image_channels), jnp.float32)
  return {"batch_stats": {}} | model.init(key, image)


def abstract_variables(model: nn.Module, image_channels: int) -> dict[str, Any]:
  """Shapes of `initial_variables`; nothing is allocated."""
  initial = lambda key: initial_variables(model, image_channels, key)
  return jax.eval_shape(initial, jax.random.key(0))


def check_side(
  side: int, spatial_compression: int, advice: str = "", key: str = ""
) -> None:
  """Raises UserError unless `side` pixels make whole latent positions.

  The message names the key, if it is one of a config.
  """
  if side < 1 or side % spatial_compression:
    below = max(side // spatial_compression, 1) * spatial_compression
    of_key = f" in {key}" if key else ""
    raise errors.UserError(
      f"image side {side}{of_key} is not divisible by {spatial_compression}, "
      f"the spatial compression of this autoencoder; use {below} or "
      f"{below + spatial_compression}{advice}"
    )
