"""SD-VAE's architectures to and from `config.json` of `AutoencoderKL`.

That is the class which diffusers has for them.
"""

from typing import Any

from dcae_jax import errors
from dcae_jax.autoencoder.sd_vae import variants
from dcae_jax.autoencoder.weights import settings

# By whether attention follows.
_DOWN_BLOCKS = {False: "DownEncoderBlock2D", True: "AttnDownEncoderBlock2D"}
_UP_BLOCKS = {False: "UpDecoderBlock2D", True: "AttnUpDecoderBlock2D"}
_ACTIVATIONS = {"silu": "silu", "swish": "swish"}
# What AutoencoderKL takes for keys that a config.json does not have.
DEFAULTS = {
  "in_channels": 3,
  "out_channels": 3,
  "down_block_types": ["DownEncoderBlock2D"],
  "up_block_types": ["UpDecoderBlock2D"],
  "block_out_channels": [64],
  "layers_per_block": 1,
  "act_fn": "silu",
  "latent_channels": 4,
  "norm_num_groups": 32,
  "sample_size": 32,
  "scaling_factor": 0.18215,
  "shift_factor": None,
  "use_quant_conv": True,
  "use_post_quant_conv": True,
  "mid_block_add_attention": True,
}


def from_config(config: dict[str, Any]) -> tuple[variants.Architecture, int]:
  """The architecture and image channels of an AutoencoderKL `config.json`.

  Raises UserError for unknown settings, or lists that do not fit.
  """
  c = DEFAULTS | config
  image_channels = settings.count(c, "in_channels")
  if settings.count(c, "out_channels") != image_channels:
    raise errors.UserError(
      f"in_channels={image_channels} and out_channels={c['out_channels']} "
      "differ; an autoencoder gives back what it takes"
    )
  settings.known(c["act_fn"], "act_fn", _ACTIVATIONS)
  key = "block_out_channels"
  widths = tuple(
    settings.whole(width, f"{key}[{i}]", 1)
    for i, width in enumerate(settings.listed(c[key], key, "widths", 1))
  )
  shallow_to_deep = range(len(widths))
  architecture = variants.Architecture(
    settings.count(c, "latent_channels"),
    widths,
    depth=settings.whole(c["layers_per_block"], "layers_per_block", 1, 100),
    groups=settings.count(c, "norm_num_groups"),
    encoder_attending=_attending(
      c, "down_block_types", _DOWN_BLOCKS, shallow_to_deep
    ),
    decoder_attending=_attending(
      c, "up_block_types", _UP_BLOCKS, shallow_to_deep[::-1]
    ),
    middle_attention=settings.flag(c, "mid_block_add_attention"),
    encoder_mixes=settings.flag(c, "use_quant_conv"),
    decoder_mixes=settings.flag(c, "use_post_quant_conv"),
  )
  variants.check_architecture(architecture)
  return architecture, image_channels


def to_config(
  architecture: variants.Architecture,
  image_channels: int,
  scaling_factor: float,
  shift_factor: float,
) -> dict[str, Any]:
  """The inverse of `from_config`."""
  stages = range(len(architecture.widths))
  return {
    "_class_name": "AutoencoderKL",
    "in_channels": image_channels,
    "out_channels": image_channels,
    "down_block_types": [
      _DOWN_BLOCKS[i in architecture.encoder_attending] for i in stages
    ],
    "up_block_types": [
      _UP_BLOCKS[i in architecture.decoder_attending] for i in stages[::-1]
    ],
    "block_out_channels": list(architecture.widths),
    "layers_per_block": architecture.depth,
    "act_fn": "silu",
    "latent_channels": architecture.latent_channels,
    "norm_num_groups": architecture.groups,
    # The side of its tiles, where somebody switches tiling on there.
    "sample_size": 32 * architecture.spatial_compression,
    "scaling_factor": scaling_factor,
    "shift_factor": shift_factor or None,
    "use_quant_conv": architecture.encoder_mixes,
    "use_post_quant_conv": architecture.decoder_mixes,
    "mid_block_add_attention": architecture.middle_attention,
  }


def _attending(
  c: dict[str, Any], key: str, names: dict[bool, str], stages: range
) -> tuple[int, ...]:
  """Indices of the stages with attention; `key` lists them as `stages` does."""
  count = len(stages)
  what = f"one block for each of the {count} stages of block_out_channels"
  blocks = settings.listed(c[key], key, what, count, count)
  attending = [
    stage
    for i, (stage, block) in enumerate(zip(stages, blocks, strict=True))
    if settings.known(block, f"{key}[{i}]", names)
  ]
  return tuple(sorted(attending))
