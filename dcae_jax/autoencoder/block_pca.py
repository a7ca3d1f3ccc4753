"""Block PCA, the simplest compressor of images: a floor for autoencoders.

A linear projection of square blocks of pixels on their principal components,
the best that is linear for its latent size, fitted in closed form. An
autoencoder with latents of the same size that does not reconstruct better has
learned nothing yet that its architecture is for.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dcae_jax import errors
from dcae_jax.autoencoder import streaming_moments

# Pixels a side: of a block of 32 the covariance takes 75 MB, of 64 1.2 GB.
LARGEST_BLOCK = 32

Parameters = Mapping[str, Array | np.ndarray]


def shape(
  spatial_compression: int, latent_channels: int, image_channels: int
) -> tuple[int, int]:
  """Side and components of the blocks that make latents of the same size.

  Blocks larger than `LARGEST_BLOCK` are split, their components shared out:
  f64c128 is compared with f32c32, which has as many latent values per image.
  Raises UserError if there is no such projection.
  """
  f, c = spatial_compression, latent_channels
  impossible = f"block PCA has no latents of the size of f{f}c{c}: "
  while f > LARGEST_BLOCK:
    if f % 2 or c % 4:
      raise errors.UserError(
        f"{impossible}blocks of more than {LARGEST_BLOCK} pixels a side are "
        f"quartered, and f{f}c{c} cannot be"
      )
    f, c = f // 2, c // 4
  values = f * f * image_channels
  if not 1 <= c <= values:
    raise errors.UserError(
      f"{impossible}{c} components of blocks of {f} x {f} x {image_channels} = "
      f"{values} values; an autoencoder that compresses has fewer"
    )
  return f, c


class BlockPCA:
  """An autoencoder as evaluations take it.

  Its `variables` are `{"params": {"mean": [d], "components": [d, c]}}`, of
  blocks of d = f x f x image_channels values in [-1, 1].
  """

  variant = "block PCA"
  shift_factor = 0.0

  def __init__(
    self, mean: np.ndarray, components: np.ndarray, image_channels: int
  ):
    values, self.latent_channels = components.shape
    self.spatial_compression = round((values / image_channels) ** 0.5)
    self.image_channels = image_channels
    self.variables = {
      "params": {
        "mean": np.float32(mean), "components": np.float32(components)
      }
    }  # fmt: skip

  def apply(self, variables: Any, x: jax.Array, *, method: str) -> jax.Array:
    """The function for your own `jax.jit`; `method`: "encode" or "decode"."""
    function = {"encode": self._encode, "decode": self._decode}[method]
    with jax.default_matmul_precision("highest"):
      return function(variables["params"], x)

  def _encode(
    self, params: Parameters, images: Float[Array, "b h w c"]
  ) -> Float[Array, "b i j d"]:
    f = self.spatial_compression
    blocks = einops.rearrange(
      images, "b (i p) (j q) c -> b i j (p q c)", p=f, q=f
    )
    return (blocks - params["mean"][None, None, None]) @ params["components"]

  def _decode(
    self, params: Parameters, z: Float[Array, "b i j d"]
  ) -> Float[Array, "b h w c"]:
    f = self.spatial_compression
    blocks = z @ params["components"].T + params["mean"][None, None, None]
    return einops.rearrange(
      blocks, "b i j (p q c) -> b (i p) (j q) c", p=f, q=f
    )

  def encode(self, images: ArrayLike) -> jax.Array:
    """Images [b, h, w, image_channels] in [-1, 1] to [b, h / f, w / f, c]."""
    return self.apply(self.variables, jnp.asarray(images), method="encode")

  def decode(self, z: ArrayLike) -> jax.Array:
    """Latents to images, not clipped to [-1, 1], as `Autoencoder.decode`."""
    return self.apply(self.variables, jnp.asarray(z), method="decode")


def fit(batches: Iterable[np.ndarray], latent_channels: int) -> BlockPCA:
  """The projection that loses least of the blocks' squared values.

  `batches` are blocks [n, f, f, image_channels] with values in [-1, 1], any n.
  Raises UserError for fewer than two blocks, or more components than values.
  """
  moments = None
  for blocks in batches:
    if moments is None:
      channels = blocks.shape[-1]
      shape(blocks.shape[1], latent_channels, channels)
      moments = streaming_moments.Moments(blocks[0].size)
    moments.update(blocks.reshape(len(blocks), -1))
  if moments is None or moments.count < 2:
    raise errors.UserError("block PCA needs at least two blocks")
  _, vectors = np.linalg.eigh(moments.covariance)
  components = vectors[:, ::-1][:, :latent_channels]  # largest variance first
  return BlockPCA(moments.mean, components, channels)
