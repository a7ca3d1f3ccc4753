"""SANA, a PixArt whose cost is linear in positions (arXiv 2410.10629).

ReLU linear attention and a gated convolution stand in for attention and MLP
(section 2.2). The convolution tells neighbours apart, so that only models of
the largest images have positions. Captions are encoded elsewhere, and dropped
by whoever trains.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from dcae_jax import errors
from dcae_jax.diffusion import conditioning
from dcae_jax.diffusion.denoisers import dit, pixart
from dcae_jax.nn import linear_attention, transformer

SIZES = {
  "600M": {"depth": 28, "hidden": 1152, "heads": 16},
  "1600M": {"depth": 20, "hidden": 2240, "heads": 20},
  "4800M": {"depth": 60, "hidden": 2240, "heads": 20, "qk_norm": True},
  "tiny": {"depth": 4, "hidden": 128, "heads": 4},
}
HEAD_DIM = 32
MLP_RATIO = 2.5
_ATTENTION_EPSILON = 1e-8
_NORM_EPSILON = 1e-5
_CROSS_NORM_EPSILON = 1e-6
_xavier = nn.initializers.xavier_uniform()


class LinearAttention(nn.Module):
  """Multi-head ReLU linear attention; only the result's projection has a bias.

  Attributes:
    head_dim: consecutive channels of a head.
    qk_norm: an RMS norm of q and of k, over all heads.
    dtype: of the linear layers; the attention is float32.
  """

  head_dim: int
  qk_norm: bool
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    d = x.shape[-1]
    qkv = transformer.Linear(3 * d, False, dtype=self.dtype, name="qkv")(x)
    q, k, v = jnp.split(qkv, 3, axis=-1)
    if self.qk_norm:
      q = transformer.RMSNorm(_NORM_EPSILON, name="q_norm")(q)
      k = transformer.RMSNorm(_NORM_EPSILON, name="k_norm")(k)
    q, k, v = (
      rearrange(y, "b n (heads d) -> b 1 n heads d", d=self.head_dim)
      for y in (q, k, v)
    )
    y = linear_attention.relu_linear_attention(q, k, v, _ATTENTION_EPSILON)
    y = rearrange(y, "b 1 n heads d -> b n (heads d)")
    return transformer.Linear(d, dtype=self.dtype, name="project")(y)


class SanaBlock(nn.Module):
  """Linear attention, attention to the caption, and a gated convolution.

  Each is added to its input; the first and the last are modulated and gated.

  Attributes:
    heads: of the attention to the caption.
    grid: rows and columns of the tokens.
    linear_head_dim: channels of a head of the linear attention.
    qk_norm: queries and keys of both attentions are normalised.
    dtype: of the linear layers and convolutions; norms, modulation, attention
      and the tokens are float32.
  """

  heads: int
  grid: tuple[int, int]
  linear_head_dim: int
  qk_norm: bool
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    shared: Float[Array, "b 6 d"],
    states: Float[Array, "b l d"],
    mask: Bool[Array, "b l"],
  ) -> Float[Array, "b n d"]:
    attention = LinearAttention(
      self.linear_head_dim, self.qk_norm, self.dtype, name="attention"
    )
    cross_attention = transformer.CrossAttention(
      self.heads,
      _xavier,
      _xavier,
      self.dtype,
      _CROSS_NORM_EPSILON if self.qk_norm else None,
      name="cross_attention",
    )
    mlp = linear_attention.GLUMBConv(
      int(MLP_RATIO * x.shape[-1]), norm=False, dtype=self.dtype, name="mlp"
    )
    vectors = pixart.Table(6, name="table")(shared)
    shift, scale, gate = vectors[:3]
    x = x + gate * attention(dit.modulated(x, shift, scale))
    x = x + cross_attention(x, states, mask)
    shift, scale, gate = vectors[3:]
    height, width = self.grid
    y = rearrange(
      dit.modulated(x, shift, scale), "b (h w) d -> b h w d", h=height, w=width
    )
    return x + gate * rearrange(mlp(y), "b h w d -> b (h w) d")


class Sana(nn.Module):
  """A denoiser: noisy latents, times and captions to a prediction, float32.

  A condition is that of `conditioning.Captions`. With `guidance_embedding` it
  may have `guidance` [b], the scale of guidance as the network sees it (SANA
  Sprint: a tenth of it); without, it is 0.

  Attributes:
    depth: number of blocks.
    hidden: channels of a token, divisible by 4, by `heads` and by
      `linear_head_dim`.
    heads: of the attention to the caption.
    latent_size: rows and columns of latents; others are taken too.
    patch_size: side of the squares of latent positions that make a token.
    linear_head_dim: channels of a head of the linear attention.
    qk_norm: queries and keys are normalised (SANA-1.5 and Sprint).
    guidance_embedding: the scale of guidance is added to the time (Sprint).
    interpolation_scale: how much closer positions are than in a grid of
      `latent_size` whose distance is 1 (2048 px: 1, 4096 px: 2); None: no
      positions.
    remat: recompute each block's activations in the backward pass.
    dtype: of the linear layers and convolutions; norms, modulation, attention
      and the tokens are float32.
  """

  depth: int
  hidden: int
  heads: int
  latent_size: tuple[int, int]
  latent_channels: int
  conditioning: conditioning.Captions
  patch_size: int = 1
  linear_head_dim: int = HEAD_DIM
  qk_norm: bool = False
  guidance_embedding: bool = False
  interpolation_scale: float | None = None
  remat: bool = False
  dtype: DTypeLike = "float32"

  @property
  def out_channels(self) -> int:
    return self.latent_channels

  @property
  def forward_macs(self) -> int:
    """Multiply-accumulates of products and convolutions for one latent."""
    d, area = self.hidden, self.patch_size**2
    tokens = self.latent_size[0] * self.latent_size[1] // area
    captions = self.conditioning
    caption = captions.caption_tokens * d * (captions.caption_width + d)
    embedding = 6 * d**2
    embedding += (1 + self.guidance_embedding) * d * (dit.TIME_FEATURES + d)
    inner = int(MLP_RATIO * d)
    linear = 4 * d**2 + d * (2 * self.linear_head_dim + 1)
    block = tokens * (linear + 3 * inner * d + 2 * inner * 9)
    block += transformer.cross_attention_macs(
      tokens, captions.caption_tokens, d
    )
    ends = 2 * tokens * d * area * self.latent_channels
    return self.depth * block + caption + embedding + ends

  @nn.compact
  def __call__(
    self,
    z: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    condition: dict[str, Any],
  ) -> Float[Array, "b h w c"]:
    """What is predicted of noisy latents, at times of 0 to 1000.

    They need not be whole, though the authors' networks saw whole ones. Raises
    UserError for latents or captions that are not made for the model.
    """
    transformer.check_latents(z, self.latent_channels, self.patch_size)
    p = self.patch_size
    height, width = z.shape[1:3]
    grid = height // p, width // p
    project_in = transformer.Linear(
      self.hidden, kernel_init=_xavier, dtype=self.dtype, name="project_in"
    )
    x = project_in(transformer.to_patches(z, p)).astype(jnp.float32)
    if self.interpolation_scale is not None:
      base = self.latent_size[0] // p, self.latent_size[1] // p
      scale = self.interpolation_scale
      x = x + pixart.positions(grid, base, self.hidden, scale)[None]
    embedding = dit.TimeEmbedding(self.hidden, name="time_embedding")(t)
    if self.guidance_embedding:
      of_guidance = dit.TimeEmbedding(
        self.hidden, nn.initializers.zeros, name="guidance_embedding"
      )
      embedding += of_guidance(condition.get("guidance", jnp.zeros_like(t)))
    shared = pixart.modulation(self.hidden, embedding)
    caption_norm = transformer.RMSNorm(
      _NORM_EPSILON, nn.initializers.constant(0.01), name="caption_norm"
    )
    states = caption_norm(pixart.caption_states(self, condition))
    block = nn.remat(SanaBlock) if self.remat else SanaBlock
    settings = self.linear_head_dim, self.qk_norm, self.dtype
    for i in range(self.depth):
      block_i = block(self.heads, grid, *settings, name=f"block_{i}")
      x = block_i(x, shared, states, condition["mask"])
    head = pixart.Head(p * p * self.out_channels, _xavier, name="project_out")
    return transformer.from_patches(head(x, embedding), height, width, p)


def check(
  depth: int,
  hidden: int,
  heads: int,
  *,
  linear_head_dim: int = HEAD_DIM,
  interpolation_scale: float | None = None,
  **switches: bool,
) -> None:
  """Raises UserError for a SANA that cannot be."""
  transformer.check_sizes(depth, hidden, heads, divisor=4)
  if linear_head_dim < 1 or hidden % linear_head_dim:
    raise errors.UserError(
      f"hidden={hidden} is not divisible by linear_head_dim={linear_head_dim}; "
      "change one of them"
    )
  if interpolation_scale is not None and not interpolation_scale > 0:
    raise errors.UserError(
      f"interpolation_scale={interpolation_scale} is not above 0; None leaves "
      "positions out"
    )
