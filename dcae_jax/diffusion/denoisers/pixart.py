"""PixArt-alpha, a DiT that reads captions (arXiv 2310.00426).

Between attention and MLP of each block, the tokens of the image attend to those
of the caption (section 2.3). One linear layer gives the modulation of all
blocks, to which each adds a table of its own. Captions are encoded elsewhere,
and dropped by whoever trains.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from dcae_jax import errors
from dcae_jax.diffusion import conditioning
from dcae_jax.diffusion.denoisers import dit
from dcae_jax.nn import transformer

SIZES = {
  "XL": {"depth": 28, "hidden": 1152, "heads": 16},
  "tiny": {"depth": 4, "hidden": 128, "heads": 4},
}
_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros


def table_init(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
  """Normal, with the variance of one over the channels."""
  return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5


class CaptionProjection(nn.Module):
  """An MLP that brings the states of a caption to the channels of the image."""

  hidden: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, states: Float[Array, "b l c"]) -> Float[Array, "b l d"]:
    settings = {"kernel_init": dit.embedding_init, "dtype": self.dtype}
    y = transformer.Linear(self.hidden, name="linear1", **settings)(states)
    y = jax.nn.gelu(y, approximate=True)
    return transformer.Linear(self.hidden, name="linear2", **settings)(y)


class Table(nn.Module):
  """The vectors of a layer: those for all layers, plus its own, float32."""

  number: int

  @nn.compact
  def __call__(
    self, shared: Float[Array, "b m d"]
  ) -> list[Float[Array, "b 1 d"]]:
    shape = (self.number, shared.shape[-1])
    vectors = self.param("vectors", table_init, shape, jnp.float32)
    return jnp.split(shared + vectors[None], self.number, axis=1)


class PixArtBlock(nn.Module):
  """Attention, attention to the caption, and an MLP, each added to its input.

  The first and the last are modulated and gated; the middle one is zero at
  first, and has no norm.

  Attributes:
    heads: of both attentions.
    dtype: of the linear layers; norms, modulation, attention and the tokens are
      float32.
  """

  heads: int
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    shared: Float[Array, "b 6 d"],
    states: Float[Array, "b l d"],
    mask: Bool[Array, "b l"],
  ) -> Float[Array, "b n d"]:
    attention = transformer.Attention(
      self.heads, True, _xavier, self.dtype, name="attention"
    )
    cross_attention = transformer.CrossAttention(
      self.heads, _xavier, _zeros, self.dtype, name="cross_attention"
    )
    mlp = transformer.MLP(True, _xavier, self.dtype, name="mlp")
    vectors = Table(6, name="table")(shared)
    shift, scale, gate = vectors[:3]
    x = x + gate * attention(dit.modulated(x, shift, scale))
    x = x + cross_attention(x, states, mask)
    shift, scale, gate = vectors[3:]
    return x + gate * mlp(dit.modulated(x, shift, scale))


class Head(nn.Module):
  """Modulated norm, then a linear layer to the patches, in float32."""

  features: int
  kernel_init: nn.initializers.Initializer

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n c"], embedding: Float[Array, "b c"]
  ) -> Float[Array, "b n d"]:
    shift, scale = Table(2, name="table")(embedding[:, None])
    linear = transformer.Linear(
      self.features, kernel_init=self.kernel_init, name="linear"
    )
    return linear(dit.modulated(x, shift, scale))


def positions(
  grid: tuple[int, int],
  base: tuple[int, int],
  features: int,
  interpolation_scale: float,
) -> Float[np.ndarray, "n d"]:
  """Those of DiT in a grid that is stretched to `base`, then scaled down."""
  rows, columns = (
    b / g / interpolation_scale for g, b in zip(grid, base, strict=True)
  )
  return dit.positions(*grid, features, (rows, columns))


def modulation(
  hidden: int, embedding: Float[Array, "b d"]
) -> Float[Array, "b 6 d"]:
  """The vectors that all blocks share; to be called in a module."""
  linear = transformer.Linear(
    6 * hidden, kernel_init=dit.embedding_init, name="modulation"
  )
  return linear(jax.nn.silu(embedding)).reshape(-1, 6, hidden)


def caption_states(
  module: nn.Module, condition: dict[str, Any]
) -> Float[Array, "b l d"]:
  """The states of captions in the channels of a module's tokens.

  Or of its parameter `null_caption`, where `is_null` says so; to be called in
  the module. Raises UserError for states that the null caption cannot replace.
  """
  states, captions = condition["states"], module.conditioning
  tokens, width = states.shape[1:]
  most, expected = captions.caption_tokens, captions.caption_width
  if tokens > most or width != expected:
    raise errors.UserError(
      f"captions have {tokens} tokens of {width} channels; this model takes at "
      f"most {most} tokens, of {expected} channels: those of its text encoder"
    )
  null_caption = module.param(
    "null_caption", table_init, (most, expected), jnp.float32
  )
  is_null = condition["is_null"][:, None, None]
  states = jnp.where(is_null, null_caption[None, :tokens], states)
  project = CaptionProjection(
    module.hidden, module.dtype, name="caption_projection"
  )
  return project(states)


class PixArt(nn.Module):
  """A denoiser: noisy latents, times and captions to a prediction, float32.

  A condition is that of `conditioning.Captions`. With `size_conditions` it may
  have `resolution` [b, 2], height and width of the images in pixels, and
  `aspect_ratio` [b, 1], their quotient; without them, images are as large as
  the latents say.

  Attributes:
    depth: number of blocks.
    hidden: channels of a token, divisible by 4 and by `heads`, by 3 too with
      `size_conditions`.
    heads: of the attentions.
    latent_size: rows and columns of latents; others are taken too.
    patch_size: side of the squares of latent positions that make a token.
    learn_sigma: twice the channels come out, and the second half tells the
      variance.
    interpolation_scale: how much closer positions are than in a grid of
      `latent_size` whose distance is 1 (1024 px models: 2).
    size_conditions: the size of the images is added to the time (1024 px
      models).
    spatial_compression: of the autoencoder, to know that size by the latents.
    remat: recompute each block's activations in the backward pass.
    dtype: of the linear layers; norms, modulation, attention and the tokens are
      float32.
  """

  depth: int
  hidden: int
  heads: int
  latent_size: tuple[int, int]
  latent_channels: int
  conditioning: conditioning.Captions
  patch_size: int = 1
  learn_sigma: bool = False
  interpolation_scale: float = 1.0
  size_conditions: bool = False
  spatial_compression: int = 8
  remat: bool = False
  dtype: DTypeLike = "float32"

  @property
  def out_channels(self) -> int:
    return self.latent_channels * (2 if self.learn_sigma else 1)

  @property
  def forward_macs(self) -> int:
    """Multiply-accumulates of matrix products for one latent; nothing else."""
    d, area = self.hidden, self.patch_size**2
    tokens = self.latent_size[0] * self.latent_size[1] // area
    captions = self.conditioning
    caption = captions.caption_tokens * d * (captions.caption_width + d)
    embedding = dit.TIME_FEATURES * d + d**2 + 6 * d**2
    if self.size_conditions:
      third = d // 3
      embedding += 3 * third * (dit.TIME_FEATURES + third)
    ends = tokens * d * area * (self.latent_channels + self.out_channels)
    block = transformer.block_macs(tokens, d)
    block += transformer.cross_attention_macs(
      tokens, captions.caption_tokens, d
    )
    return self.depth * block + caption + embedding + ends

  @nn.compact
  def __call__(
    self,
    z: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    condition: dict[str, Any],
  ) -> Float[Array, "b h w d"]:
    """What is predicted, and behind it the variance with `learn_sigma`.

    Of noisy latents at times of 0 to 999, not necessarily whole. Raises
    UserError for latents or captions that are not made for the model.
    """
    transformer.check_latents(z, self.latent_channels, self.patch_size)
    p = self.patch_size
    height, width = z.shape[1:3]
    project_in = transformer.Linear(
      self.hidden, kernel_init=_xavier, dtype=self.dtype, name="project_in"
    )
    x = project_in(transformer.to_patches(z, p)).astype(jnp.float32)
    base = self.latent_size[0] // p, self.latent_size[1] // p
    grid = height // p, width // p
    x = x + positions(grid, base, self.hidden, self.interpolation_scale)[None]
    embedding = dit.TimeEmbedding(self.hidden, name="time_embedding")(t)
    if self.size_conditions:
      embedding = embedding + self._size_embedding(z, condition)
    shared = modulation(self.hidden, embedding)
    states = caption_states(self, condition)
    block = nn.remat(PixArtBlock) if self.remat else PixArtBlock
    for i in range(self.depth):
      block_i = block(self.heads, self.dtype, name=f"block_{i}")
      x = block_i(x, shared, states, condition["mask"])
    head = Head(p * p * self.out_channels, _zeros, name="project_out")
    return transformer.from_patches(head(x, embedding), height, width, p)

  def _size_embedding(
    self, z: Float[Array, "b h w c"], condition: dict[str, Any]
  ) -> Float[Array, "b d"]:
    """Of height, width and their quotient, a third of the channels each."""
    height, width = (self.spatial_compression * side for side in z.shape[1:3])
    sizes = condition.get("resolution", jnp.array([[height, width]], float))
    sizes = jnp.broadcast_to(sizes, (len(z), 2))
    ratios = condition.get("aspect_ratio", jnp.array([[height / width]]))
    ratios = jnp.broadcast_to(ratios, (len(z), 1))
    third = self.hidden // 3
    of_side = dit.TimeEmbedding(third, name="resolution_embedding")
    of_ratio = dit.TimeEmbedding(third, name="aspect_ratio_embedding")
    parts = [of_side(sizes[:, 0]), of_side(sizes[:, 1]), of_ratio(ratios[:, 0])]
    return jnp.concatenate(parts, axis=-1)


def check(
  depth: int,
  hidden: int,
  heads: int,
  *,
  size_conditions: bool = False,
  interpolation_scale: float = 1.0,
  spatial_compression: int = 8,
) -> None:
  """Raises UserError for a PixArt that cannot be."""
  transformer.check_sizes(depth, hidden, heads, divisor=4)
  if size_conditions and hidden % 3:
    raise errors.UserError(
      f"hidden={hidden} is not divisible by 3, as size_conditions need it; use "
      f"{hidden // 12 * 12 or 12}, or switch them off"
    )
  if not interpolation_scale > 0:
    raise errors.UserError(
      f"interpolation_scale={interpolation_scale} is not above 0; 1 keeps the "
      "positions of DiT"
    )
  if spatial_compression < 1:
    raise errors.UserError(
      f"spatial_compression={spatial_compression} is below 1; give that of the "
      "autoencoder"
    )
