"""DC-AE's architectures to and from `config.json` of `AutoencoderDC`.

That is the class which diffusers has for them.
"""

import dataclasses
from typing import Any

from dcae_jax import errors
from dcae_jax.autoencoder.dcae import network as dcae
from dcae_jax.autoencoder.dcae import variants
from dcae_jax.autoencoder.weights import settings
from dcae_jax.nn import normalization

_BLOCK_TYPES = {"res": "ResBlock", "efficientvit": "EfficientViTBlock"}
_DOWNSAMPLES = {"space_to_channel": "pixel_unshuffle", "strided": "Conv"}
_UPSAMPLES = {"channel_to_space": "pixel_shuffle", "nearest": "interpolate"}
_NORMS = {name: name for name in normalization.NORMS}
_ACTIVATIONS = {name: name for name in dcae.ACTIVATIONS if name != "identity"}
_SIX_WIDTHS = [128, 256, 512, 512, 1024, 1024]
_SIX_SCALES = [[], [], [], [5], [5], [5]]
# What AutoencoderDC takes for keys that a config.json does not have.
DEFAULTS = {
  "in_channels": 3,
  "latent_channels": 32,
  "attention_head_dim": 32,
  "encoder_block_types": "ResBlock",
  "decoder_block_types": "ResBlock",
  "encoder_block_out_channels": _SIX_WIDTHS,
  "decoder_block_out_channels": _SIX_WIDTHS,
  "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
  "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
  "encoder_qkv_multiscales": _SIX_SCALES,
  "decoder_qkv_multiscales": _SIX_SCALES,
  "upsample_block_type": "pixel_shuffle",
  "downsample_block_type": "pixel_unshuffle",
  "decoder_norm_types": "rms_norm",
  "decoder_act_fns": "silu",
  "encoder_out_shortcut": True,
  "decoder_in_shortcut": True,
  "decoder_conv_act_fn": "relu",
  "scaling_factor": 1.0,
}


def from_config(config: dict[str, Any]) -> tuple[variants.Architecture, int]:
  """The architecture and image channels of an AutoencoderDC `config.json`.

  Raises UserError for unknown settings, or lists that do not fit.
  """
  c = DEFAULTS | config
  architecture = variants.Architecture(
    settings.count(c, "latent_channels"),
    encoder=_stages(c | _ENCODER_ONLY, "encoder"),
    decoder=_stages(c, "decoder"),
    downsample=settings.known(
      c["downsample_block_type"], "downsample_block_type", _DOWNSAMPLES
    ),
    upsample=settings.known(
      c["upsample_block_type"], "upsample_block_type", _UPSAMPLES
    ),
    encoder_shortcut=settings.flag(c, "encoder_out_shortcut"),
    decoder_shortcut=settings.flag(c, "decoder_in_shortcut"),
    head_activation=_activation(
      c["decoder_conv_act_fn"], "decoder_conv_act_fn"
    ),
  )
  variants.check_architecture(architecture)
  return architecture, settings.count(c, "in_channels")


# Of the encoder these are fixed.
_ENCODER_ONLY = {"encoder_norm_types": "rms_norm", "encoder_act_fns": "silu"}


def to_config(
  architecture: variants.Architecture,
  image_channels: int,
  scaling_factor: float,
  shift_factor: float,
) -> dict[str, Any]:
  """The inverse; raises UserError if AutoencoderDC has no setting for it."""
  if shift_factor:
    raise errors.UserError(
      f"AutoencoderDC has no shift_factor, and this one is {shift_factor}; "
      "latents of a DC-AE are scaled alone"
    )
  stages = (*architecture.encoder, *architecture.decoder)
  attending = [stage for stage in stages if stage.block == "efficientvit"]
  c = {
    "_class_name": "AutoencoderDC",
    "in_channels": image_channels,
    "latent_channels": architecture.latent_channels,
    "attention_head_dim": (attending or stages)[0].head_dim,
    "upsample_block_type": _UPSAMPLES[architecture.upsample],
    "downsample_block_type": _DOWNSAMPLES[architecture.downsample],
    "encoder_out_shortcut": architecture.encoder_shortcut,
    "decoder_in_shortcut": architecture.decoder_shortcut,
    "decoder_conv_act_fn": architecture.head_activation,
    "scaling_factor": scaling_factor,
  }
  for part in ("encoder", "decoder"):
    stages = getattr(architecture, part)
    columns = {
      "block_types": [_BLOCK_TYPES[stage.block] for stage in stages],
      "block_out_channels": [stage.width for stage in stages],
      "layers_per_block": [stage.depth for stage in stages],
      "qkv_multiscales": [list(stage.scales) for stage in stages],
      "norm_types": [stage.norm for stage in stages],
      "act_fns": [_ACTIVATIONS.get(stage.activation) for stage in stages],
    }
    c |= {f"{part}_{name}": column for name, column in columns.items()}
  if plain(from_config(c)[0]) != plain(architecture):
    raise errors.UserError(
      "this architecture has no AutoencoderDC config: its encoder has RMS "
      "norms and SiLU, and all heads have the same number of channels"
    )
  return {key: c[key] for key in ("_class_name", *DEFAULTS)}


def plain(architecture: variants.Architecture) -> variants.Architecture:
  """The same architecture, without settings that do nothing in it."""
  return dataclasses.replace(
    architecture,
    encoder=tuple(map(_plain_stage, architecture.encoder)),
    decoder=tuple(map(_plain_stage, architecture.decoder)),
  )


def _plain_stage(stage: variants.Stage) -> variants.Stage:
  """Without settings that do nothing: of other blocks, or of none."""
  if not stage.depth:
    return variants.Stage(stage.width, 0)
  if stage.block == "res":
    return stage._replace(scales=(), head_dim=variants.Stage(1, 1).head_dim)
  return stage._replace(activation="silu")


def _stages(c: dict[str, Any], part: str) -> tuple[variants.Stage, ...]:
  key = f"{part}_block_out_channels"
  count = len(settings.listed(c[key], key, "two widths or more", 2))

  def of_stage(name: str, i: int) -> tuple[Any, str]:
    """The value, and what an error calls it."""
    values = c[f"{part}_{name}"]
    if isinstance(values, str) or values is None:
      values = [values] * count
    what = f"one value for each of the {count} stages of {key}"
    settings.listed(values, f"{part}_{name}", what, count, count)
    return values[i], f"{part}_{name}[{i}]"

  stages = []
  for i in range(count):
    activation, name = of_stage("act_fns", i)
    stage = variants.Stage(
      settings.whole(*of_stage("block_out_channels", i), 1),
      settings.whole(*of_stage("layers_per_block", i), 0, 100),
      settings.known(*of_stage("block_types", i), _BLOCK_TYPES),
      settings.known(*of_stage("norm_types", i), _NORMS),
      "identity" if activation is None else _activation(activation, name),
      _scales(*of_stage("qkv_multiscales", i)),
      settings.count(c, "attention_head_dim"),
    )
    stages.append(_plain_stage(stage))
  return tuple(stages)


def _scales(values: Any, name: str) -> tuple[int, ...]:
  values = settings.listed(values, name, "kernel sizes", 0)
  return tuple(settings.whole(value, name, 1, 31) for value in values)


def _activation(value: Any, name: str) -> str:
  if isinstance(value, str) and value.lower() == "swish":
    value = "silu"
  return settings.known(value, name, _ACTIVATIONS)
