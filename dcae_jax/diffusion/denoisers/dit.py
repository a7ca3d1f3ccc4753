"""DiT, a transformer that removes noise from latents (arXiv 2212.09748).

Time and class act through adaLN-Zero (section 3.2): they shift and scale what
enters a layer and gate what leaves it, by nothing at first. Positions are fixed
sines and cosines. Labels are not dropped here, but by whoever trains.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dcae_jax.diffusion import conditioning
from dcae_jax.nn import transformer

SIZES = {
  "S": {"depth": 12, "hidden": 384, "heads": 6},
  "B": {"depth": 12, "hidden": 768, "heads": 12},
  "L": {"depth": 24, "hidden": 1024, "heads": 16},
  "XL": {"depth": 28, "hidden": 1152, "heads": 16},
  "tiny": {"depth": 4, "hidden": 128, "heads": 4},
}
_EPSILON = 1e-6
TIME_FEATURES = 256
_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros
embedding_init = nn.initializers.normal(0.02)


def positions(
  height: int,
  width: int,
  features: int,
  spacing: tuple[float, float] = (1.0, 1.0),
) -> Float[np.ndarray, "n d"]:
  """Fixed features of the patches' places in a grid, float32.

  Sines and cosines of the column in the first half, of the row in the second.
  `features` is divisible by 4; `spacing` is between rows and between columns.
  """
  quarter = features // 4
  frequencies = 10_000.0 ** (-np.arange(quarter) / quarter)

  def of_axis(places):
    angles = places[:, None] * frequencies[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

  columns = of_axis(np.tile(spacing[1] * np.arange(width), height))
  rows = of_axis(np.repeat(spacing[0] * np.arange(height), width))
  return np.concatenate([columns, rows], axis=1).astype("float32")


def modulated(
  x: Float[Array, "b n d"],
  shift: Float[Array, "b 1 d"],
  scale: Float[Array, "b 1 d"],
) -> Float[Array, "b n d"]:
  """Normalised tokens with the scale and the shift of their image, float32."""
  return transformer.normalized(x, _EPSILON) * (1 + scale) + shift


class Modulation(nn.Module):
  """What time and class do to a layer: `number` vectors, zero at first."""

  number: int

  @nn.compact
  def __call__(
    self, condition: Float[Array, "b d"]
  ) -> list[Float[Array, "b 1 d"]]:
    features = self.number * condition.shape[-1]
    linear = transformer.Linear(features, kernel_init=_zeros, name="linear")
    y = linear(jax.nn.silu(condition))
    return jnp.split(y[:, None], self.number, axis=-1)


class DiTBlock(nn.Module):
  """Attention, then an MLP, each modulated, gated and added to its input.

  Attributes:
    heads: of the attention.
    dtype: of the linear layers; norms, modulation, attention and the tokens are
      float32.
  """

  heads: int
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], condition: Float[Array, "b d"]
  ) -> Float[Array, "b n d"]:
    attention = transformer.Attention(
      self.heads, True, _xavier, self.dtype, name="attention"
    )
    mlp = transformer.MLP(True, _xavier, self.dtype, name="mlp")
    vectors = Modulation(6, name="modulation")(condition)
    shift, scale, gate = vectors[:3]
    x = x + gate * attention(modulated(x, shift, scale))
    shift, scale, gate = vectors[3:]
    return x + gate * mlp(modulated(x, shift, scale))


class TimeEmbedding(nn.Module):
  """An MLP over sines and cosines of time, in float32.

  `last_init` is of the kernel of its second layer.
  """

  hidden: int
  last_init: nn.initializers.Initializer = embedding_init

  @nn.compact
  def __call__(self, t: Float[Array, " b"]) -> Float[Array, "b d"]:
    linear1 = transformer.Linear(
      self.hidden, kernel_init=embedding_init, name="linear1"
    )
    linear2 = transformer.Linear(
      self.hidden, kernel_init=self.last_init, name="linear2"
    )
    x = transformer.time_features(t, TIME_FEATURES)
    return linear2(jax.nn.silu(linear1(x)))


class Head(nn.Module):
  """Modulated norm, then a linear layer to the patches; zero at first.

  It computes in float32, as `dcae.ImageProjection` does.
  """

  features: int

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n c"], condition: Float[Array, "b c"]
  ) -> Float[Array, "b n d"]:
    shift, scale = Modulation(2, name="modulation")(condition)
    linear = transformer.Linear(
      self.features, kernel_init=_zeros, name="linear"
    )
    return linear(modulated(x, shift, scale))


class DiT(nn.Module):
  """A denoiser: noisy latents, times and classes to a prediction, float32.

  Attributes:
    depth: number of blocks.
    hidden: channels of a token, divisible by 4 and by `heads`.
    heads: of the attention.
    latent_size: rows and columns of latents; others are taken too.
    patch_size: side of the squares of latent positions that make a token.
    learn_sigma: twice the channels come out, and the second half tells the
      variance.
    remat: recompute each block's activations in the backward pass.
    dtype: of the linear layers; norms, modulation, attention and the tokens are
      float32.
  """

  depth: int
  hidden: int
  heads: int
  latent_size: tuple[int, int]
  latent_channels: int
  conditioning: conditioning.ClassLabels
  patch_size: int = 1
  learn_sigma: bool = False
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
    conditioning = TIME_FEATURES * d + d**2 + (6 * self.depth + 2) * d**2
    ends = tokens * d * area * (self.latent_channels + self.out_channels)
    blocks = self.depth * transformer.block_macs(tokens, d)
    return blocks + conditioning + ends

  @nn.compact
  def __call__(
    self,
    z: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    labels: Int[Array, " b"],
  ) -> Float[Array, "b h w d"]:
    """What is predicted, and behind it the variance with `learn_sigma`.

    Of noisy latents at times of 0 to 999, not necessarily whole. Raises
    UserError for latents that are not made for the model.
    """
    transformer.check_latents(z, self.latent_channels, self.patch_size)
    height, width, p = *z.shape[1:3], self.patch_size
    project_in = transformer.Linear(
      self.hidden, kernel_init=_xavier, dtype=self.dtype, name="project_in"
    )
    x = project_in(transformer.to_patches(z, p)).astype(jnp.float32)
    x = x + positions(height // p, width // p, self.hidden)[None]
    label_embedding = nn.Embed(
      self.conditioning.num_classes + 1,
      self.hidden,
      embedding_init=embedding_init,
      name="label_embedding",
    )
    condition = TimeEmbedding(self.hidden, name="time_embedding")(t)
    condition = condition + label_embedding(labels)
    block = nn.remat(DiTBlock) if self.remat else DiTBlock
    for i in range(self.depth):
      x = block(self.heads, self.dtype, name=f"block_{i}")(x, condition)
    head = Head(p * p * self.out_channels, name="project_out")
    return transformer.from_patches(head(x, condition), height, width, p)


def check(depth: int, hidden: int, heads: int) -> None:
  """Raises UserError for a DiT that cannot be."""
  transformer.check_sizes(depth, hidden, heads, divisor=4)
