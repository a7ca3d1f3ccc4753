"""SD-VAE, the autoencoder that the paper compares with (arXiv 2112.10752).

Stable Diffusion's variational autoencoder, diffusers' `AutoencoderKL`: residual
blocks with group norm, one softmax attention at the latents, no shortcut around
its resampling. The encoder gives the moments of a normal distribution; latents
are its mean, and samples of it in training alone. Stages are listed from
shallow (image) to deep (latent), for the decoder too.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from dcae_jax.autoencoder.dcae import network as dcae
from dcae_jax.autoencoder.dcae import residual_autoencoding
from dcae_jax.nn import convolution, normalization

_LOG_VARIANCES = (-30.0, 20.0)  # what is beyond counts as these


def attention(
  q: Float[Array, "b h w c"],
  k: Float[Array, "b h w c"],
  v: Float[Array, "b h w c"],
) -> Float[Array, "b h w c"]:
  """Softmax attention with one head over all positions of an image.

  The softmax is float32. Memory is quadratic in the number of positions.
  """
  scores = jnp.einsum(
    "bhwc,bijc->bhwij", q, k, preferred_element_type=jnp.float32
  )
  weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=(-2, -1))
  return jnp.einsum("bhwij,bijc->bhwc", weights.astype(v.dtype), v)


class ResBlock(nn.Module):
  """norm, SiLU, conv, twice, added to the input.

  Attributes:
    width: channels of the output; where those of the input differ, a 1x1
      convolution adapts them.
    groups: of the norms.
    dtype: of the convolutions.
  """

  width: int
  groups: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    y = x
    for i in (1, 2):
      y = normalization.GroupNorm(self.groups, name=f"norm{i}")(y)
      conv = convolution.Conv(self.width, dtype=self.dtype, name=f"conv{i}")
      y = conv(jax.nn.silu(y))
    if x.shape[-1] != self.width:
      x = convolution.Conv(self.width, 1, dtype=self.dtype, name="shortcut")(x)
    return x + y


class Attention(nn.Module):
  """Group norm and attention, added to the input.

  Attributes:
    groups: of the norm.
    dtype: of the projections.
  """

  groups: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    channels = x.shape[-1]
    qkv = convolution.Conv(3 * channels, 1, dtype=self.dtype, name="qkv")
    project = convolution.Conv(channels, 1, dtype=self.dtype, name="project")
    y = normalization.GroupNorm(self.groups, name="norm")(x)
    return x + project(attention(*jnp.split(qkv(y), 3, axis=-1)))


class Downsample(nn.Module):
  """3x3 convolution of stride 2, padded below and on the right alone."""

  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    return convolution.Conv(
      x.shape[-1], stride=2, padding=(0, 1), dtype=self.dtype, name="conv"
    )(x)


class Stage(nn.Module):
  """Blocks, then the resampling to the next stage, if there is one.

  Attributes:
    width: channels.
    depth: number of blocks.
    attends: each block is followed by attention.
    resample: "down", "up" or None.
    groups: of the norms.
    rematerialisation: recompute each block's activations in the backward pass.
    dtype: of the computation; softmax and norms are float32.
  """

  width: int
  depth: int
  attends: bool
  resample: str | None
  groups: int
  rematerialisation: bool
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    wrap = nn.remat if self.rematerialisation else lambda module: module
    settings = (self.groups, self.dtype)
    for i in range(self.depth):
      x = wrap(ResBlock)(self.width, *settings, name=f"block_{i}")(x)
      if self.attends:
        x = wrap(Attention)(*settings, name=f"attention_{i}")(x)
    if self.resample == "down":
      x = Downsample(self.dtype, name="downsample")(x)
    elif self.resample == "up":
      x = residual_autoencoding.Upsample(
        self.width,
        "nearest",
        residual_autoencoding=False,
        dtype=self.dtype,
        name="upsample",
      )(x)
    return x


class Middle(nn.Module):
  """A block, attention if it attends, a block; see `Stage`."""

  attends: bool
  groups: int
  rematerialisation: bool
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    wrap = nn.remat if self.rematerialisation else lambda module: module
    width, settings = x.shape[-1], (self.groups, self.dtype)
    x = wrap(ResBlock)(width, *settings, name="block_0")(x)
    if self.attends:
      x = wrap(Attention)(*settings, name="attention_0")(x)
    return wrap(ResBlock)(width, *settings, name="block_1")(x)


class LatentProjection(nn.Module):
  """A 1x1 convolution of the latents, if it mixes them, then a 3x3 one."""

  width: int
  mixes: bool
  dtype: DTypeLike

  @nn.compact
  def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    if self.mixes:
      z = convolution.Conv(z.shape[-1], 1, dtype=self.dtype, name="mix")(z)
    return convolution.Conv(self.width, dtype=self.dtype, name="conv")(z)


class Head(nn.Module):
  """norm, SiLU, conv, and a 1x1 convolution if it mixes what comes out.

  It computes in float32, as `dcae.ImageProjection` does.
  """

  channels: int
  groups: int
  mixes: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    norm = normalization.GroupNorm(self.groups, name="norm")
    x = jax.nn.silu(norm(x.astype("float32")))
    x = convolution.Conv(self.channels, name="conv")(x)
    if self.mixes:
      x = convolution.Conv(self.channels, 1, name="mix")(x)
    return x


class Encoder(nn.Module):
  """Images to means and log variances, one after the other in the channels.

  Attributes:
    widths: of the stages, shallow to deep.
    latent_channels: half of the output's.
    depth: blocks of a stage.
    attending: indices of the stages whose blocks are followed by attention.
    groups: of the norms.
    middle_attention: attention between the deepest stage and the latents.
    mixes: a last 1x1 convolution over means and log variances.
    rematerialisation: recompute each block's activations in the backward pass.
    dtype: of the computation; softmax, norms and the head are float32.
  """

  widths: tuple[int, ...]
  latent_channels: int
  depth: int = 2
  attending: tuple[int, ...] = ()
  groups: int = 32
  middle_attention: bool = True
  mixes: bool = True
  rematerialisation: bool = False
  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"]
  ) -> Float[Array, "b h2 w2 d"]:
    shared = (self.groups, self.rematerialisation, self.dtype)
    x = convolution.Conv(self.widths[0], dtype=self.dtype, name="project_in")(
      images
    )
    for i, width in enumerate(self.widths):
      resample = "down" if i + 1 < len(self.widths) else None
      attends = i in self.attending
      x = Stage(
        width, self.depth, attends, resample, *shared, name=f"stage_{i}"
      )(x)
    x = Middle(self.middle_attention, *shared, name="middle")(x)
    return Head(
      2 * self.latent_channels, self.groups, self.mixes, name="project_out"
    )(x)


class Decoder(nn.Module):
  """Latents to images; the stages run from deep to shallow.

  Attributes:
    widths: of the stages, shallow to deep.
    image_channels: of the output.
    depth: blocks of an encoder's stage; the decoder's have one more.
    attending: indices of the stages whose blocks are followed by attention.
    groups: of the norms.
    middle_attention: attention between the latents and the deepest stage.
    mixes: a first 1x1 convolution over the latents.
    rematerialisation: recompute each block's activations in the backward pass.
    dtype: of the computation; softmax, norms and the head are float32.
  """

  widths: tuple[int, ...]
  image_channels: int = 3
  depth: int = 2
  attending: tuple[int, ...] = ()
  groups: int = 32
  middle_attention: bool = True
  mixes: bool = True
  rematerialisation: bool = False
  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    shared = (self.groups, self.rematerialisation, self.dtype)
    x = LatentProjection(
      self.widths[-1], self.mixes, self.dtype, name="project_in"
    )(z)
    x = Middle(self.middle_attention, *shared, name="middle")(x)
    for i, width in reversed(list(enumerate(self.widths))):
      resample, attends = "up" if i else None, i in self.attending
      x = Stage(
        width, self.depth + 1, attends, resample, *shared, name=f"stage_{i}"
      )(x)
    return Head(self.image_channels, self.groups, name="project_out")(x)


class SDVAE(nn.Module):
  """A variational autoencoder with the interface of `dcae.DCAE`.

  Images are float in [-1, 1], NHWC; latents are not scaled. Results are
  float32.

  Attributes:
    encoder: of images.
    decoder: of latents.
    space_to_channel: `p x p` latent positions are moved into channels, as in
      table 1's "f8 + p=8"; 1: none. It changes no parameter.
  """

  encoder: Encoder
  decoder: Decoder
  space_to_channel: int = 1

  @property
  def spatial_compression(self) -> int:
    return 2 ** (len(self.encoder.widths) - 1) * self.space_to_channel

  def posterior(
    self, images: Float[Array, "b h w c"]
  ) -> tuple[Float[Array, "b h2 w2 d"], Float[Array, "b h2 w2 d"]]:
    """Mean and log variance of the latents, before space goes to channels.

    Raises ValueError for sides that the compression does not divide.
    """
    for side in images.shape[1:3]:
      dcae.check_side(side, self.spatial_compression)
    moments = self.encoder(images).astype("float32")
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, *_LOG_VARIANCES)

  def encode(
    self, images: Float[Array, "b h w c"]
  ) -> Float[Array, "b h2 w2 d"]:
    """The mean; raises ValueError as `posterior` does."""
    mean, _ = self.posterior(images)
    return residual_autoencoding.space_to_channel(mean, self.space_to_channel)

  def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    z = residual_autoencoding.channel_to_space(z, self.space_to_channel)
    return self.decoder(z).astype("float32")

  def __call__(
    self, images: Float[Array, "b h w c"]
  ) -> Float[Array, "b h w c"]:
    return self.decode(self.encode(images))

  def reconstruct_sample(
    self, images: Float[Array, "b h w c"], key: PRNGKeyArray
  ) -> tuple[Float[Array, "b h w c"], Float[Array, " b"]]:
    """For training: images decoded from a sample, and `kl_divergence`."""
    mean, log_variance = self.posterior(images)
    noise = jax.random.normal(key, mean.shape, jnp.float32)
    z = mean + jnp.exp(0.5 * log_variance) * noise
    reconstructions = self.decoder(z).astype("float32")
    return reconstructions, kl_divergence(mean, log_variance)


def kl_divergence(
  mean: Float[Array, "b h w c"], log_variance: Float[Array, "b h w c"]
) -> Float[Array, " b"]:
  """Of each image's normal distributions from the standard one, summed."""
  terms = jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance
  return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


@dataclasses.dataclass(frozen=True)
class Variant:
  """An architecture; the fields are those of Encoder and Decoder."""

  latent_channels: int
  widths: tuple[int, ...]
  depth: int = 2
  groups: int = 32
  encoder_attending: tuple[int, ...] = ()
  decoder_attending: tuple[int, ...] = ()
  middle_attention: bool = True
  encoder_mixes: bool = True
  decoder_mixes: bool = True

  @property
  def spatial_compression(self) -> int:
    return 2 ** (len(self.widths) - 1)


def _deeper(latent_channels: int, stages: int) -> Variant:
  """Stable Diffusion's, with stages of its deepest width added.

  The paper adds stages, to the encoder and to the decoder (section 3.1); their
  widths are not published.
  """
  return Variant(latent_channels, (128, 256) + (512,) * (stages - 2))


# Figure 3a compares f8c4, f16c16, f32c64 and f64c256, whose latents are equally
# large; table 2 compares f32c32, f64c128 and f128c512 with DC-AE's.
VARIANTS: dict[str, Variant] = {
  "sd-vae-f8c4": _deeper(4, 4),
  "sd-vae-f16c16": _deeper(16, 5),
  "sd-vae-f32c32": _deeper(32, 6),
  "sd-vae-f32c64": _deeper(64, 6),
  "sd-vae-f64c128": _deeper(128, 7),
  "sd-vae-f64c256": _deeper(256, 7),
  "sd-vae-f128c512": _deeper(512, 8),
  "tiny-sd-vae-f8": Variant(4, (16, 32, 32, 32), depth=1, groups=4),
}


def check_architecture(variant: Variant) -> None:
  """Raises ValueError for widths that the norms cannot divide."""
  for width in variant.widths:
    if width % variant.groups:
      raise ValueError(
        f"stage width {width} is not divisible by {variant.groups}, the "
        "groups of its norms"
      )


def create(
  variant: Variant,
  *,
  image_channels: int = 3,
  rematerialisation: bool = False,
  dtype: DTypeLike = "float32",
  space_to_channel: int = 1,
) -> SDVAE:
  """The module of a variant; the arguments are those of `dcae.create`.

  Raises:
    ValueError: an architecture, or a factor, that cannot be.
  """
  check_architecture(variant)
  dcae.check_space_to_channel(space_to_channel)
  shared = {
    "depth": variant.depth,
    "groups": variant.groups,
    "middle_attention": variant.middle_attention,
    "rematerialisation": rematerialisation,
    "dtype": dtype,
  }
  return SDVAE(
    encoder=Encoder(
      variant.widths,
      variant.latent_channels,
      attending=variant.encoder_attending,
      mixes=variant.encoder_mixes,
      **shared,
    ),
    decoder=Decoder(
      variant.widths,
      image_channels,
      attending=variant.decoder_attending,
      mixes=variant.decoder_mixes,
      **shared,
    ),
    space_to_channel=space_to_channel,
  )
