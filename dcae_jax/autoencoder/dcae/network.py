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

from dcae_jax.autoencoder.dcae import (
  efficientvit,
  residual_autoencoding,
  variants,
)
from dcae_jax.nn import convolution, normalization

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
  scan: bool,
  rematerialisation: bool,
  dtype: DTypeLike,
  x: Float[Array, "b h w c"],
) -> Float[Array, "b h w c"]:
  """The blocks of a stage, one after the other, inside the stage's `module`.

  Their variables are apart, `block_0`, `block_1` and so on. With `scan` they
  are stacked for the length of the call, and the compiler sees one block in a
  loop, not each of them: it is faster, and the program is smaller.
  """
  wrap = nn.remat if rematerialisation else lambda block: block

  def create(**options):
    if stage.block == "res":
      return wrap(ResBlock)(stage.norm, stage.activation, dtype, **options)
    return wrap(efficientvit.EfficientViTBlock)(
      stage.scales, stage.norm, stage.head_dim, dtype, **options
    )

  names = [f"block_{i}" for i in range(stage.depth)]
  if not scan or stage.depth < 2 or module.is_initializing():
    for name in names:
      x = create(name=name)(x)
    return x
  block = create(parent=None)
  mutable = [
    collection
    for collection in module.variables
    if module.is_mutable_collection(collection)
  ]
  stacked = {
    collection: jax.tree.map(
      lambda *leaves: jnp.stack(leaves), *(found[name] for name in names)
    )
    for collection, found in module.variables.items()
  }
  x, moved = jax.lax.scan(
    lambda x, variables: block.apply(variables, x, mutable=mutable), x, stacked
  )
  for collection, found in moved.items():
    for i, name in enumerate(names):
      one = jax.tree.map(lambda leaves, i=i: leaves[i], found)
      module.put_variable(collection, name, one)
  return x


class EncoderStage(nn.Module):
  """Blocks, then the downsampling to the next deeper stage, if there is one."""

  stage: variants.Stage
  deeper_width: int | None
  downsample: str
  residual_autoencoding: bool
  rematerialisation: bool
  scan: bool
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    x = _apply_blocks(
      self, self.stage, self.scan, self.rematerialisation, self.dtype, x
    )
    if self.deeper_width is not None:
      x = residual_autoencoding.Downsample(
        self.deeper_width,
        self.downsample,
        self.residual_autoencoding,
        self.dtype,
        name="downsample",
      )(x)
    return x


class DecoderStage(nn.Module):
  """The upsampling from the next deeper stage, if there is one, then blocks."""

  stage: variants.Stage
  is_deepest: bool
  upsample: str
  residual_autoencoding: bool
  rematerialisation: bool
  scan: bool
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    if not self.is_deepest:
      x = residual_autoencoding.Upsample(
        self.stage.width,
        self.upsample,
        self.residual_autoencoding,
        self.dtype,
        name="upsample",
      )(x)
    return _apply_blocks(
      self, self.stage, self.scan, self.rematerialisation, self.dtype, x
    )


class LatentProjection(nn.Module):
  """3x3 convolution between the deepest width and the latent channels.

  Attributes:
    channels: of the output.
    shortcut: average (or duplicate) consecutive channels around it.
    dtype: of the convolution.
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

  Attributes:
    channels: of the image.
    upsample: by 2 as `residual_autoencoding.Upsample` does, its kind, or None.
    activation: a key of `ACTIVATIONS`.

  It computes in float32: rounding here would show in the image.
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
  """Images to latents, `spatial_compression(stages)` times smaller.

  Attributes:
    stages: shallow to deep.
    latent_channels: of the output.
    downsample: kind of `residual_autoencoding.Downsample`.
    latent_shortcut: averaging shortcut around the projection to latents.
    residual_autoencoding: False removes every shortcut.
    rematerialisation: recompute each block's activations in the backward pass.
    scan: compile the blocks of a stage as a loop over one.
    dtype: of the computation; attention and norms are float32.
  """

  stages: tuple[variants.Stage, ...]
  latent_channels: int
  downsample: str = "space_to_channel"
  latent_shortcut: bool = True
  residual_autoencoding: bool = True
  rematerialisation: bool = False
  scan: bool = False
  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"]
  ) -> Float[Array, "b h2 w2 d"]:
    first, *deeper = self.stages
    if first.depth:
      project_in = convolution.Conv(
        first.width, dtype=self.dtype, name="project_in"
      )
    else:
      project_in = residual_autoencoding.Downsample(
        deeper[0].width,
        self.downsample,
        residual_autoencoding=False,
        dtype=self.dtype,
        name="project_in",
      )
    x = project_in(images.astype(self.dtype))
    widths = [stage.width for stage in deeper] + [None]
    for i, (stage, width) in enumerate(zip(self.stages, widths, strict=True)):
      if stage.depth:
        x = EncoderStage(
          stage,
          width,
          self.downsample,
          self.residual_autoencoding,
          self.rematerialisation,
          self.scan,
          self.dtype,
          name=f"stage_{i}",
        )(x)
    return LatentProjection(
      self.latent_channels,
      self.latent_shortcut and self.residual_autoencoding,
      self.dtype,
      name="project_out",
    )(x)


class Decoder(nn.Module):
  """Latents to images, `spatial_compression(stages)` times larger.

  Attributes:
    stages: shallow to deep; they run from deep to shallow.
    image_channels: of the output.
    upsample: kind of `residual_autoencoding.Upsample`.
    latent_shortcut: duplicating shortcut around the projection from latents.
    head_activation: before the last convolution, a key of `ACTIVATIONS`.
    residual_autoencoding: False removes every shortcut.
    rematerialisation: recompute each block's activations in the backward pass.
    scan: compile the blocks of a stage as a loop over one.
    dtype: of the computation; attention and norms are float32.
  """

  stages: tuple[variants.Stage, ...]
  image_channels: int = 3
  upsample: str = "channel_to_space"
  latent_shortcut: bool = True
  head_activation: str = "relu"
  residual_autoencoding: bool = True
  rematerialisation: bool = False
  scan: bool = False
  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    x = LatentProjection(
      self.stages[-1].width,
      self.latent_shortcut and self.residual_autoencoding,
      self.dtype,
      name="project_in",
    )(z.astype(self.dtype))
    for i, stage in reversed(list(enumerate(self.stages))):
      if stage.depth:
        x = DecoderStage(
          stage,
          i + 1 == len(self.stages),
          self.upsample,
          self.residual_autoencoding,
          self.rematerialisation,
          self.scan,
          self.dtype,
          name=f"stage_{i}",
        )(x)
    return ImageProjection(
      self.image_channels,
      None if self.stages[0].depth else self.upsample,
      self.head_activation,
      name="project_out",
    )(x)


class DCAE(nn.Module):
  """A deep compression autoencoder: `encode`, `decode`, or both by a call.

  Images are float in [-1, 1], NHWC; latents are not scaled. Both directions
  return float32.

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
    return (
      variants.spatial_compression(self.encoder.stages) * self.space_to_channel
    )

  def encode(
    self, images: Float[Array, "b h w c"]
  ) -> Float[Array, "b h2 w2 d"]:
    """Raises ValueError for sides that the compression does not divide."""
    for side in images.shape[1:3]:
      check_side(side, self.spatial_compression)
    z = self.encoder(images).astype("float32")
    return residual_autoencoding.space_to_channel(z, self.space_to_channel)

  def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    z = residual_autoencoding.channel_to_space(z, self.space_to_channel)
    return self.decoder(z).astype("float32")

  def __call__(
    self, images: Float[Array, "b h w c"]
  ) -> Float[Array, "b h w c"]:
    return self.decode(self.encode(images))


def abstract_variables(model: nn.Module, image_channels: int) -> Any:
  """Shapes of `{"params": ..., "batch_stats": ...}`; nothing is allocated.

  `model` is a `DCAE`, or another autoencoder with its interface.
  """
  side = model.spatial_compression
  image = jax.ShapeDtypeStruct((1, side, side, image_channels), "float32")
  found = jax.eval_shape(model.init, jax.random.key(0), image)
  return {"batch_stats": {}} | found


def with_branch_scale(parameters: Any, scale: float) -> Any:
  """Initial parameters whose blocks start with branches of that size.

  The norms that end the branches of blocks get it in place of 1, the size that
  the paper's models start from: several times that of what passes by. With 0,
  each block starts as the identity, and so the network as its resampling. Other
  parameters, and those of an `SDVAE`, stay as they are.
  """
  return jax.tree.map_with_path(
    lambda keys, x: jnp.full_like(x, scale) if _is_branch_scale(keys) else x,
    parameters,
  )


def _is_branch_scale(keys: tuple[Any, ...]) -> bool:
  path = jax.tree_util.keystr(keys, simple=True, separator="/")
  return "/block_" in path and path.endswith("/norm/scale")


def check_side(side: int, spatial_compression: int) -> None:
  """Raises ValueError unless `side` pixels make whole latent positions."""
  if side < 1 or side % spatial_compression:
    below = max(side // spatial_compression, 1) * spatial_compression
    raise ValueError(
      f"image side {side} is not divisible by {spatial_compression}, the "
      f"spatial compression of this autoencoder; use {below} or "
      f"{below + spatial_compression}"
    )


def check_dtype(dtype: DTypeLike) -> None:
  """Raises ValueError for numbers that layers do not compute with."""
  known = ("float32", "bfloat16")  # float16 would overflow in attention
  try:
    name = jnp.dtype(dtype).name
  except TypeError:
    name = str(dtype)
  if name not in known:
    raise ValueError(f"unknown dtype {name!r}; known are {', '.join(known)}")


def check_space_to_channel(factor: int) -> None:
  """Raises ValueError for a factor that latents cannot be rearranged by."""
  is_whole = isinstance(factor, int) and not isinstance(factor, bool)
  if not is_whole or not 1 <= factor <= 64:
    raise ValueError(
      f"space_to_channel={factor!r} is not a whole number from 1 to 64; 1 "
      "leaves latents as they are"
    )


def create(
  variant: str | variants.Variant,
  *,
  image_channels: int = 3,
  residual_autoencoding: bool = True,
  rematerialisation: bool = False,
  scan: bool = False,
  dtype: DTypeLike = "float32",
  space_to_channel: int = 1,
) -> DCAE:
  """The module of a variant.

  Args:
    variant: a key of `VARIANTS`, or an architecture of one's own.
    image_channels: 3, 1 for grey images, or any other number.
    residual_autoencoding: False removes every shortcut, the paper's ablation.
    rematerialisation: trade time for memory, block by block.
    scan: compile the blocks of a stage as a loop over one; no parameter
      changes.
    dtype: of the computation; attention and norms stay float32.
    space_to_channel: side of the squares of latent positions that are moved
      into channels.

  Raises:
    ValueError: unknown variant, or stages that do not fit together.
  """
  v = variants.check_variant(variant) if isinstance(variant, str) else variant
  variants.check_architecture(v)
  check_space_to_channel(space_to_channel)
  shared = {
    "residual_autoencoding": residual_autoencoding,
    "rematerialisation": rematerialisation,
    "scan": scan,
    "dtype": dtype,
  }
  return DCAE(
    encoder=Encoder(
      v.encoder, v.latent_channels, v.downsample, v.encoder_shortcut, **shared
    ),
    decoder=Decoder(
      v.decoder,
      image_channels,
      v.upsample,
      v.decoder_shortcut,
      v.head_activation,
      **shared,
    ),
    space_to_channel=space_to_channel,
  )
