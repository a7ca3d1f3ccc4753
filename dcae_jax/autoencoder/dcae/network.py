"""DC-AE (arXiv 2410.10733): encoder and decoder.

A plain autoencoder: no quantisation, no KL term, latents unbounded. Stages are
listed from shallow (image) to deep (latent), for the decoder too. Shallow
stages hold ResBlocks, deep ones EfficientViT blocks (section 3.3).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dcae_jax.autoencoder import network
from dcae_jax.autoencoder.dcae import (
  efficientvit,
  residual_autoencoding,
  variants,
)
from dcae_jax.nn import convolution, normalization
from dcae_jax.training import freezing

ACTIVATIONS = {
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "mish": jax.nn.mish,
  "identity": lambda x: x,
}


class ResBlock(nn.Module):
  """conv, activation, conv, norm, added to the input (width constant)."""

  norm: str = "rms_norm"
  activation: str = "silu"
  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    channels = x.shape[-1]
    conv1 = convolution.Conv(channels, dtype=self.dtype, name="conv1")
    conv2 = convolution.Conv(
      channels, use_bias=False, dtype=self.dtype, name="conv2"
    )
    y = conv2(ACTIVATIONS[self.activation](conv1(x)))
    return x + normalization.NORMS[self.norm](name="norm")(y)


def _apply_blocks(
  module: nn.Module,
  stage: variants.Stage,
  options: network.Options,
  x: Float[Array, "b h w c"],
) -> Float[Array, "b h w c"]:
  """The blocks of a stage, one after the other, inside the stage's `module`.

  Their variables are apart, `block_0`, `block_1` and so on. With `scan` they
  are stacked for the length of the call, and the compiler sees one block in a
  loop, not each of them: it is faster, and the program is smaller.
  """

  def create(**place):
    if stage.block == "res":
      return options.wrap(ResBlock)(
        stage.norm, stage.activation, options.dtype, **place
      )
    return options.wrap(efficientvit.EfficientViTBlock)(
      stage.scales, stage.norm, stage.head_dim, options.dtype, **place
    )

  names = [f"block_{i}" for i in range(stage.depth)]
  if not options.scan or stage.depth < 2 or module.is_initializing():
    for name in names:
      x = create(name=name)(x)
    return x
  block = create(parent=None)
  mutable = list(filter(module.is_mutable_collection, module.variables))
  stacked = {
    collection: jax.tree.map(
      lambda *leaves: jnp.stack(leaves), *(blocks[name] for name in names)
    )
    for collection, blocks in module.variables.items()
  }
  x, moved = jax.lax.scan(
    lambda x, variables: block.apply(variables, x, mutable=mutable), x, stacked
  )
  for collection, blocks in moved.items():
    for i, name in enumerate(names):
      one = jax.tree.map(lambda leaves, i=i: leaves[i], blocks)
      module.put_variable(collection, name, one)
  return x


class EncoderStage(nn.Module):
  """Blocks, then the downsampling to the next deeper stage, if there is one."""

  stage: variants.Stage
  deeper_width: int | None
  downsample: str
  options: network.Options

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    x = _apply_blocks(self, self.stage, self.options, x)
    if self.deeper_width is not None:
      x = residual_autoencoding.Downsample(
        self.deeper_width,
        self.downsample,
        self.options.residual_autoencoding,
        self.options.dtype,
        name="downsample",
      )(x)
    return x


class DecoderStage(nn.Module):
  """The upsampling from the next deeper stage, if there is one, then blocks."""

  stage: variants.Stage
  is_deepest: bool
  upsample: str
  options: network.Options

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    if not self.is_deepest:
      x = residual_autoencoding.Upsample(
        self.stage.width,
        self.upsample,
        self.options.residual_autoencoding,
        self.options.dtype,
        name="upsample",
      )(x)
    return _apply_blocks(self, self.stage, self.options, x)


class LatentProjection(nn.Module):
  """3x3 convolution between the deepest width and the latent channels.

  `shortcut` averages (or duplicates) consecutive channels around it.
  """

  channels: int
  shortcut: bool
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    y = convolution.Conv(self.channels, dtype=self.dtype, name="conv")(x)
    if not self.shortcut:
      return y
    if self.channels < x.shape[-1]:
      return y + residual_autoencoding.channel_average(x, self.channels)
    return y + residual_autoencoding.channel_duplicate(x, self.channels)


class ImageProjection(nn.Module):
  """The decoder's head: norm, activation, convolution to the image.

  It may upsample by 2, by a kind of `residual_autoencoding.Upsample`. It
  computes in float32: rounding here would show in the image.
  """

  channels: int
  upsample: str | None
  activation: str

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    x = normalization.RMSNorm(name="norm")(x.astype("float32"))
    x = ACTIVATIONS[self.activation](x)
    to_space = self.upsample == "channel_to_space"
    if self.upsample == "nearest":
      x = residual_autoencoding.nearest(x)
    channels = self.channels * (4 if to_space else 1)
    x = convolution.Conv(channels, name="conv")(x)
    return residual_autoencoding.channel_to_space(x) if to_space else x


class Encoder(nn.Module):
  """Images to latents, `architecture.spatial_compression` times smaller."""

  architecture: variants.Architecture
  options: network.Options

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"]
  ) -> Float[Array, "b h2 w2 d"]:
    a, options = self.architecture, self.options
    first, *deeper = a.encoder
    if first.depth:
      project_in = convolution.Conv(
        first.width, dtype=options.dtype, name="project_in"
      )
    else:
      project_in = residual_autoencoding.Downsample(
        deeper[0].width,
        a.downsample,
        residual_autoencoding=False,
        dtype=options.dtype,
        name="project_in",
      )
    x = project_in(images.astype(options.dtype))
    widths = [stage.width for stage in deeper] + [None]
    for i, (stage, width) in enumerate(zip(a.encoder, widths, strict=True)):
      if stage.depth:
        name = f"stage_{i}"
        x = EncoderStage(stage, width, a.downsample, options, name=name)(x)
    return LatentProjection(
      a.latent_channels,
      a.encoder_shortcut and options.residual_autoencoding,
      options.dtype,
      name="project_out",
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
      a.decoder[-1].width,
      a.decoder_shortcut and options.residual_autoencoding,
      options.dtype,
      name="project_in",
    )(z.astype(options.dtype))
    for i, stage in reversed(list(enumerate(a.decoder))):
      if stage.depth:
        deepest, name = i + 1 == len(a.decoder), f"stage_{i}"
        x = DecoderStage(stage, deepest, a.upsample, options, name=name)(x)
    return ImageProjection(
      self.image_channels,
      None if a.decoder[0].depth else a.upsample,
      a.head_activation,
      name="project_out",
    )(x)


def create(
  architecture: variants.Architecture,
  image_channels: int,
  options: network.Options,
) -> network.Network:
  """The module; raises UserError for stages that do not fit together."""
  variants.check_architecture(architecture)
  return network.Network(
    architecture,
    Encoder(architecture, options),
    Decoder(architecture, image_channels, options),
    options,
  )


def with_branch_scale(parameters: Any, scale: float) -> Any:
  """Initial parameters whose blocks start with branches of that size.

  The norms that end branches get it in place of 1, from which the paper's
  models start: several times the size of what passes by. With 0, each block
  starts as the identity, and so the network as its resampling.
  """

  def scaled(keys, x):
    path = freezing.path_of(keys)
    ends_branch = "/block_" in path and path.endswith("/norm/scale")
    return jnp.full_like(x, scale) if ends_branch else x

  return jax.tree.map_with_path(scaled, parameters)
