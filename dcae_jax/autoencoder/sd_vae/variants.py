"""The architectures of SD-VAE (arXiv 2112.10752) by name, as plain numbers."""

import dataclasses

from dcae_jax import errors


@dataclasses.dataclass(frozen=True)
class Architecture:
  """An SD-VAE.

  Attributes:
    latent_channels: of the latents.
    widths: of the stages, shallow to deep.
    depth: blocks of a stage of the encoder; the decoder's have one more.
    groups: of the norms.
    encoder_attending: indices of the stages whose blocks are followed by
      attention.
    decoder_attending: the same of the decoder.
    middle_attention: attention between the deepest stage and the latents.
    encoder_mixes: a last 1x1 convolution over means and log variances.
    decoder_mixes: a first 1x1 convolution over the latents.
  """

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


def _deeper(latent_channels: int, stages: int) -> Architecture:
  """Stable Diffusion's, with stages of its deepest width added.

  The paper adds stages to both sides (section 3.1); it does not publish widths.
  """
  return Architecture(latent_channels, (128, 256) + (512,) * (stages - 2))


# Figure 3a compares f8c4, f16c16, f32c64 and f64c256, whose latents are equally
# large; table 2 compares f32c32, f64c128 and f128c512 with DC-AE's.
VARIANTS: dict[str, Architecture] = {
  "sd-vae-f8c4": _deeper(4, 4),
  "sd-vae-f16c16": _deeper(16, 5),
  "sd-vae-f32c32": _deeper(32, 6),
  "sd-vae-f32c64": _deeper(64, 6),
  "sd-vae-f64c128": _deeper(128, 7),
  "sd-vae-f64c256": _deeper(256, 7),
  "sd-vae-f128c512": _deeper(512, 8),
  "tiny-sd-vae-f8": Architecture(4, (16, 32, 32, 32), depth=1, groups=4),
}


def check_architecture(architecture: Architecture) -> None:
  """Raises UserError for widths that the norms cannot divide."""
  for width in architecture.widths:
    if width % architecture.groups:
      raise errors.UserError(
        f"stage width {width} is not divisible by {architecture.groups}, the "
        "groups of its norms"
      )
