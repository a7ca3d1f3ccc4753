"""The architectures of DC-AE (arXiv 2410.10733) by name, as plain numbers.

Stages are listed from shallow (image) to deep (latent), for the decoder too.
Shallow stages hold ResBlocks, deep ones EfficientViT blocks (section 3.3).
"""

import dataclasses
from typing import Any, NamedTuple

from dcae_jax import errors
from dcae_jax.autoencoder.dcae import efficientvit


class Stage(NamedTuple):
  """The blocks at one resolution.

  Attributes:
    width: channels.
    depth: number of blocks. 0 in the shallowest stage: the projection to or
      from the image then resamples by 2 itself.
    block: "res" or "efficientvit".
    norm: a key of `normalization.NORMS`.
    activation: of a ResBlock, a key of `ACTIVATIONS`.
    scales: aggregation kernel sizes of EfficientViT's attention.
    head_dim: channels of a head of EfficientViT's attention.
  """

  width: int
  depth: int
  block: str = "res"
  norm: str = "rms_norm"
  activation: str = "silu"
  scales: tuple[int, ...] = ()
  head_dim: int = efficientvit.HEAD_DIM


def spatial_compression(stages: tuple[Stage, ...]) -> int:
  """How many times smaller than the image's the sides of the latents are.

  Each stage but the deepest halves them, if it has blocks; without blocks in
  the shallowest one, the projection from the image does.
  """
  return 2 ** sum(
    i == 0 or stage.depth > 0 for i, stage in enumerate(stages[:-1])
  )


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A DC-AE.

  Attributes:
    latent_channels: of the latents.
    encoder: its stages.
    decoder: its stages, of as many resolutions.
    downsample: kind of `residual_autoencoding.Downsample`.
    upsample: kind of `residual_autoencoding.Upsample`.
    encoder_shortcut: averaging shortcut around the projection to latents.
    decoder_shortcut: duplicating shortcut around the projection from latents.
    head_activation: before the last convolution, a key of `ACTIVATIONS`.
  """

  latent_channels: int
  encoder: tuple[Stage, ...]
  decoder: tuple[Stage, ...]
  downsample: str = "space_to_channel"
  upsample: str = "channel_to_space"
  encoder_shortcut: bool = True
  decoder_shortcut: bool = True
  head_activation: str = "relu"

  @property
  def spatial_compression(self) -> int:
    return spatial_compression(self.encoder)


def _stages(
  widths: tuple[int, ...],
  depths: tuple[int, ...],
  shallow: dict[str, Any] | None = None,
  deep: dict[str, Any] | None = None,
) -> tuple[Stage, ...]:
  """Stages 0 to 2 with the settings `shallow`, the others with `deep`."""
  return tuple(
    Stage(width, depth, **((shallow if i < 3 else deep) or {}))
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True))
  )


_EFFICIENTVIT = {"block": "efficientvit"}
_MULTI_SCALE = {"block": "efficientvit", "scales": (5,)}
_BATCH_NORM = {"norm": "batch_norm", "activation": "relu"}


def _paper(
  latent_channels: int,
  widths: tuple[int, ...],
  encoder_depths: tuple[int, int, int],
  decoder_depths: tuple[int, int, int],
  deep_depth: int = 2,
) -> Architecture:
  """Of stages 0 to 2 the depths differ; the others have `deep_depth`."""
  deep = (deep_depth,) * (len(widths) - 3)
  encoder_depths, decoder_depths = encoder_depths + deep, decoder_depths + deep
  return Architecture(
    latent_channels,
    encoder=_stages(widths, encoder_depths, deep=_EFFICIENTVIT),
    decoder=_stages(widths, decoder_depths, _BATCH_NORM, _EFFICIENTVIT),
  )


def _tiny(latent_channels: int, widths: tuple[int, ...]) -> Architecture:
  return _paper(latent_channels, widths, (0, 1, 1), (0, 1, 1), deep_depth=1)


def _v1_5(widths: tuple[int, ...]) -> Architecture:
  """DC-AE 1.5: ResBlocks alone, no shortcuts at the latents."""
  stages = _stages(widths, (0, 5, 10) + (4,) * (len(widths) - 3))
  return Architecture(
    128,
    encoder=stages,
    decoder=stages,
    encoder_shortcut=False,
    decoder_shortcut=False,
    head_activation="silu",
  )


def _with_rms_norm(architecture: Architecture) -> Architecture:
  """Without batch norm: what trains is what is evaluated."""
  decoder = tuple(
    stage._replace(norm="rms_norm") for stage in architecture.decoder
  )
  return dataclasses.replace(architecture, decoder=decoder)


def _small(latent_channels: int, stages: int) -> Architecture:
  """Of studies: latents of the size of f32c32's, at every compression."""
  widths = (16, 32, 64, 128, 128, 128, 128)[:stages]
  return _with_rms_norm(_tiny(latent_channels, widths))


_F32_WIDTHS = (128, 256, 512, 512, 1024, 1024)

_SANA_ENCODER = _stages(_F32_WIDTHS, (2, 2, 2, 3, 3, 3), deep=_MULTI_SCALE)

VARIANTS: dict[str, Architecture] = {
  "f32c32": _paper(32, _F32_WIDTHS, (0, 4, 8), (0, 5, 10)),
  "f64c128": _paper(128, (*_F32_WIDTHS, 2048), (0, 4, 8), (0, 5, 10)),
  "f128c512": _paper(512, (*_F32_WIDTHS, 2048, 2048), (0, 4, 8), (0, 5, 10)),
  "f32c32-sana": Architecture(
    32,
    encoder=_SANA_ENCODER,
    decoder=_stages(_F32_WIDTHS, (3,) * 6, deep=_MULTI_SCALE),
    downsample="strided",
    upsample="nearest",
  ),
  "f32c32-lite": Architecture(
    32,
    encoder=_SANA_ENCODER,
    decoder=_stages(_F32_WIDTHS, (0, 3, 5, 4, 4, 4)),
    downsample="strided",
    head_activation="silu",
  ),
  "f32c128-1.5": _v1_5(_F32_WIDTHS),
  "f64c128-1.5": _v1_5((*_F32_WIDTHS, 1024)),
  "tiny-f8": _tiny(16, (16, 32, 64, 128)),
  "tiny-f8-rms": _with_rms_norm(_tiny(16, (16, 32, 64, 128))),
  "tiny-f32": _tiny(32, (16, 32, 64, 64, 128, 128)),
  "tiny-f64": _tiny(64, (16, 32, 64, 64, 128, 128, 256)),
  "small-f8c2": _small(2, 4),
  "small-f16c8": _small(8, 5),
  "small-f32c32": _small(32, 6),
  "small-f64c128": _small(128, 7),
}


def check_architecture(architecture: Architecture) -> None:
  """Raises UserError for stages that do not fit together."""
  down = spatial_compression(architecture.encoder)
  up = spatial_compression(architecture.decoder)
  if down != up:
    raise errors.UserError(
      f"the encoder divides image sides by {down}, and the decoder multiplies "
      f"them by {up}; give both as many stages"
    )
  for stage in architecture.encoder[1:]:
    if stage.width % 4 and architecture.downsample == "space_to_channel":
      raise errors.UserError(
        f"encoder stage width {stage.width} is not divisible by 4, as the "
        "rearrangement of 2x2 pixels to channels before it needs it"
      )
  for stage in (*architecture.encoder, *architecture.decoder):
    if stage.block == "efficientvit" and stage.width < stage.head_dim:
      raise errors.UserError(
        f"stage width {stage.width} is below {stage.head_dim}, the channels of "
        "one attention head"
      )
    if any(size % 2 == 0 for size in stage.scales):
      raise errors.UserError(f"attention scales {stage.scales} are not all odd")
