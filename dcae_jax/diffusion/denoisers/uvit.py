"""U-ViT, a transformer that removes noise from latents (arXiv 2209.12152).

Everything is a token (section 3.1): the class, the time and the patches.
The first half of the blocks hand their results to the second half over long
skips. As DC-AE's authors have it: the time token is not learned, and no 3x3
convolution follows the last linear layer. Labels are not dropped here,
but by whoever trains.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dcae_jax import errors
from dcae_jax.diffusion import conditioning
from dcae_jax.nn import convolution, transformer

SIZES = {
  "S": {"depth": 12, "hidden": 512, "heads": 8},
  "M": {"depth": 16, "hidden": 768, "heads": 12},
  "L": {"depth": 20, "hidden": 1024, "heads": 16},
  "H": {"depth": 28, "hidden": 1152, "heads": 16},
  "2B": {"depth": 28, "hidden": 2048, "heads": 32},
  "tiny": {"depth": 4, "hidden": 128, "heads": 4},
}
_EPSILON = 1e-5
_EXTRA_TOKENS = 2
# "Truncated normal" in the paper's code, but truncated at 100 deviations.
_normal = nn.initializers.normal(0.02)


class UViTBlock(nn.Module):
  """Attention, then an MLP, each on normalised tokens and added to its input.

  Attributes:
    heads: of the attention.
    dtype: of the linear layers; norms, attention and the tokens are float32.

  With `skip`, the result of an earlier block, a linear layer first merges both.
  """

  heads: int
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], skip: Float[Array, "b n d"] | None = None
  ) -> Float[Array, "b n d"]:
    if skip is not None:
      merge = transformer.Linear(
        x.shape[-1], kernel_init=_normal, dtype=self.dtype, name="merge"
      )
      x = merge(jnp.concatenate([x, skip], axis=-1)).astype(jnp.float32)
    attention = transformer.Attention(
      self.heads, False, _normal, self.dtype, name="attention"
    )
    mlp = transformer.MLP(False, _normal, self.dtype, name="mlp")
    x = x + attention(transformer.LayerNorm(_EPSILON, name="norm1")(x))
    return x + mlp(transformer.LayerNorm(_EPSILON, name="norm2")(x))


class UViT(nn.Module):
  """A denoiser: noisy latents, times and classes to a prediction, float32.

  Attributes:
    depth: number of blocks but the middle one; even.
    hidden: channels of a token, divisible by 2 and by `heads`.
    heads: of the attention.
    latent_size: rows and columns of latents, each with a position learned.
    patch_size: side of the squares of latent positions that make a token.
    remat: recompute each block's activations in the backward pass.
    dtype: of the linear layers; norms, attention and the tokens are float32.
  """

  depth: int
  hidden: int
  heads: int
  latent_size: tuple[int, int]
  latent_channels: int
  conditioning: conditioning.ClassLabels
  patch_size: int = 1
  remat: bool = False
  dtype: DTypeLike = "float32"

  @property
  def out_channels(self) -> int:
    return self.latent_channels

  @property
  def forward_macs(self) -> int:
    """Multiply-accumulates of matrix products for one latent; nothing else."""
    d, area = self.hidden, self.patch_size**2
    patches = self.latent_size[0] * self.latent_size[1] // area
    tokens = patches + _EXTRA_TOKENS
    blocks = (self.depth + 1) * transformer.block_macs(tokens, d)
    merges = self.depth // 2 * tokens * 2 * d**2
    ends = patches * d * area * 2 * self.latent_channels
    return blocks + merges + ends

  @nn.compact
  def __call__(
    self,
    z: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    labels: Int[Array, " b"],
  ) -> Float[Array, "b h w c"]:
    """What is predicted of noisy latents, at times of 0 to 999.

    They need not be whole. Raises UserError for latents that are not made for
    the model.
    """
    transformer.check_latents(z, self.latent_channels, self.patch_size)
    if z.shape[1:3] != self.latent_size:
      raise errors.UserError(
        f"latents of size {z.shape[1:3]}; this model has learned positions for "
        f"{self.latent_size}: create it with latent_size={z.shape[1:3]}, or "
        "take a DiT, whose positions are not learned"
      )
    tokens = self._embed(z, t, labels)
    wrap = nn.remat if self.remat else lambda module: module
    block = lambda name: wrap(UViTBlock)(self.heads, self.dtype, name=name)
    skips = []
    for i in range(self.depth // 2):
      tokens = block(f"in_block_{i}")(tokens)
      skips.append(tokens)
    tokens = block("middle_block")(tokens)
    for i in range(self.depth // 2):
      tokens = block(f"out_block_{i}")(tokens, skips.pop())
    norm = transformer.LayerNorm(_EPSILON, name="norm")
    patches = norm(tokens[:, _EXTRA_TOKENS:])
    # In float32, as `dcae.ImageProjection` is.
    project_out = transformer.Linear(
      self.patch_size**2 * self.latent_channels,
      kernel_init=_normal,
      name="project_out",
    )
    return transformer.from_patches(
      project_out(patches), *self.latent_size, self.patch_size
    )

  def _embed(
    self,
    z: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    labels: Int[Array, " b"],
  ) -> Float[Array, "b n d"]:
    """Class, time and patches as tokens, with their positions added."""
    patches = transformer.to_patches(z, self.patch_size)
    # The authors' framework starts convolutions and tables from these.
    project_in = transformer.Linear(
      self.hidden,
      kernel_init=convolution.kernel_init,
      bias_init=convolution.bias_init(patches.shape[-1]),
      dtype=self.dtype,
      name="project_in",
    )
    label_embedding = nn.Embed(
      self.conditioning.num_classes + 1,
      self.hidden,
      embedding_init=nn.initializers.normal(1.0),
      name="label_embedding",
    )
    tokens = [
      label_embedding(labels)[:, None],
      transformer.time_features(t, self.hidden)[:, None],
      project_in(patches).astype(jnp.float32),
    ]
    tokens = jnp.concatenate(tokens, axis=1)
    positions = self.param("positions", _normal, tokens.shape[1:], jnp.float32)
    return tokens + positions[None]


def check(depth: int, hidden: int, heads: int) -> None:
  """Raises UserError for a U-ViT that cannot be."""
  transformer.check_sizes(depth, hidden, heads, divisor=2)
  if depth % 2:
    raise errors.UserError(
      f"depth={depth} of a UViT is odd; half of the blocks are before the "
      "middle one, half behind it"
    )
