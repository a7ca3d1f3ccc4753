"""SD-VAE, the autoencoder that the paper compares with (arXiv 2112.10752).

Stable Diffusion's variational autoencoder, diffusers' `AutoencoderKL`: residual
blocks with group norm, one softmax attention at the latents, no shortcut around
its resampling. The encoder gives the moments of a normal distribution; latents
are its mean, and samples of it in training alone. Stages are listed from
shallow (image) to deep (latent), for the decoder too.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from dcae_jax import errors
from dcae_jax.autoencoder import network
from dcae_jax.autoencoder.dcae import residual_autoencoding
from dcae_jax.autoencoder.sd_vae import variants
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

  A 1x1 convolution adapts an input that has not `width` channels.
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
  """Group norm and attention, added to the input."""

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
  """Blocks, then the resampling to the next stage, if there is one."""

  width: int
  depth: int
  attends: bool  # each block is followed by attention
  resample: str | None  # "down" or "up"
  groups: int
  options: network.Options

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    wrap = self.options.wrap
    settings = (self.groups, self.options.dtype)
    for i in range(self.depth):
      x = wrap(ResBlock)(self.width, *settings, name=f"block_{i}")(x)
      if self.attends:
        x = wrap(Attention)(*settings, name=f"attention_{i}")(x)
    if self.resample == "down":
      x = Downsample(self.options.dtype, name="downsample")(x)
    elif self.resample == "up":
      x = residual_autoencoding.Upsample(
        self.width,
        "nearest",
        residual_autoencoding=False,
        dtype=self.options.dtype,
        name="upsample",
      )(x)
    return x


class Middle(nn.Module):
  """A block, attention if it attends, a block; see `Stage`."""

  attends: bool
  groups: int
  options: network.Options

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    wrap = self.options.wrap
    width, settings = x.shape[-1], (self.groups, self.options.dtype)
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
  """Images to means and log variances, one after the other in the channels."""

  architecture: variants.Architecture
  options: network.Options

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"]
  ) -> Float[Array, "b h2 w2 d"]:
    a, options = self.architecture, self.options
    x = convolution.Conv(a.widths[0], dtype=options.dtype, name="project_in")(
      images
    )
    for i, width in enumerate(a.widths):
      x = Stage(
        width,
        a.depth,
        i in a.encoder_attending,
        "down" if i + 1 < len(a.widths) else None,
        a.groups,
        options,
        name=f"stage_{i}",
      )(x)
    x = Middle(a.middle_attention, a.groups, options, name="middle")(x)
    return Head(
      2 * a.latent_channels, a.groups, a.encoder_mixes, name="project_out"
    )(x)


class Decoder(nn.Module):
  """Latents to images; the stages run from deep to shallow."""

  architecture: variants.Architecture
  image_channels: int
  options: network.Options

  @nn.compact
  def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    a, options = self.architecture, self.options
    x = LatentProjection(
      a.widths[-1], a.decoder_mixes, options.dtype, name="project_in"
    )(z)
    x = Middle(a.middle_attention, a.groups, options, name="middle")(x)
    for i, width in reversed(list(enumerate(a.widths))):
      x = Stage(
        width,
        a.depth + 1,
        i in a.decoder_attending,
        "up" if i else None,
        a.groups,
        options,
        name=f"stage_{i}",
      )(x)
    return Head(self.image_channels, a.groups, name="project_out")(x)


class SDVAE(network.Network):
  """A variational autoencoder, whose latents are the means."""

  def posterior(
    self, images: Float[Array, "b h w c"]
  ) -> tuple[Float[Array, "b h2 w2 d"], Float[Array, "b h2 w2 d"]]:
    """Mean and log variance of the latents, before space goes to channels.

    Raises UserError for sides that the compression does not divide.
    """
    for side in images.shape[1:3]:
      network.check_side(side, self.spatial_compression)
    moments = self.encoder(images).astype("float32")
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, *_LOG_VARIANCES)

  def latents(
    self, images: Float[Array, "b h w c"]
  ) -> Float[Array, "b h2 w2 d"]:
    mean, _ = self.posterior(images)
    return mean

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


def create(
  architecture: variants.Architecture,
  image_channels: int,
  options: network.Options,
) -> SDVAE:
  """The module; raises UserError for what an SD-VAE cannot be."""
  variants.check_architecture(architecture)
  if not options.residual_autoencoding:
    raise errors.UserError(
      "residual_autoencoding=False is DC-AE's ablation, and SD-VAE has no "
      "shortcuts around its resampling; leave it True"
    )
  return SDVAE(
    architecture,
    Encoder(architecture, options),
    Decoder(architecture, image_channels, options),
    options,
  )
