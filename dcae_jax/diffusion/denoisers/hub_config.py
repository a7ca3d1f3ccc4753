"""PixArt and SANA as diffusers describes them in `config.json`.

Its classes have settings that the released models all set alike. Those are not
ours, and other values are refused.
"""

from typing import Any, NamedTuple

from dcae_jax import errors
from dcae_jax.autoencoder.weights import settings
from dcae_jax.diffusion.denoisers import families, sana

CLASSES = {
  "PixArtTransformer2DModel": "PixArt",
  "SanaTransformer2DModel": "SANA",
}
_QK_NORM = "rms_norm_across_heads"
# What the classes take for absent keys, and a model of ours must have.
_FIXED = {
  "PixArt": {
    "attention_bias": True, "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
    "norm_eps": 1e-6, "num_embeds_ada_norm": 1000, "attention_type": "default",
  },
  "SANA": {
    "attention_bias": False, "mlp_ratio": sana.MLP_RATIO,
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "timestep_scale": 1.0,
  },
}  # fmt: skip
_DEFAULTS = {
  "PixArt": {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4,
    "out_channels": 8, "num_layers": 28, "cross_attention_dim": 1152,
    "sample_size": 128, "patch_size": 2, "interpolation_scale": None,
    "use_additional_conditions": None, "caption_channels": None,
  },
  "SANA": {
    "num_attention_heads": 70, "attention_head_dim": 32, "in_channels": 32,
    "out_channels": 32, "num_layers": 20, "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112, "cross_attention_dim": 2240,
    "caption_channels": 2304, "sample_size": 32, "patch_size": 1,
    "interpolation_scale": None, "guidance_embeds": False, "qk_norm": None,
  },
}  # fmt: skip


class Numbers(NamedTuple):
  """What makes a denoiser, besides its kind of condition."""

  variant: families.Variant
  latent_size: int
  latent_channels: int
  patch_size: int
  learn_sigma: bool


def from_config(config: dict[str, Any]) -> tuple[Numbers, int]:
  """The numbers of a `config.json`, and the width of its captions' states.

  Raises UserError for a class or a setting that is not known.
  """
  name = config["_class_name"]
  if name not in CLASSES:
    raise errors.UserError(
      f"_class_name={name!r} is not among {', '.join(CLASSES)}"
    )
  family = CLASSES[name]
  for key, value in _FIXED[family].items():
    if config.get(key, value) != value:
      raise errors.UserError(
        f"{key}={config[key]!r} is not {value!r}, as it is in all released "
        f"models of {family}"
      )
  c = _DEFAULTS[family] | config
  heads = settings.count(c, "num_attention_heads")
  head_dim = settings.count(c, "attention_head_dim")
  channels = settings.count(c, "in_channels")
  out_channels = c["out_channels"] or channels
  if out_channels not in (channels, 2 * channels):
    raise errors.UserError(
      f"out_channels={out_channels} is not in_channels={channels}, nor twice it"
    )
  hidden = heads * head_dim
  fields = {"depth": settings.count(c, "num_layers"), "hidden": hidden}
  read = {"PixArt": _pixart_fields, "SANA": _sana_fields}[family]
  fields |= read(c, heads)
  if c["cross_attention_dim"] != hidden:
    raise errors.UserError(
      f"cross_attention_dim={c['cross_attention_dim']!r} is not {hidden}, the "
      "channels of all heads"
    )
  numbers = Numbers(
    families.Variant(family, fields),
    settings.count(c, "sample_size"),
    channels,
    settings.count(c, "patch_size"),
    out_channels == 2 * channels,
  )
  return numbers, settings.count(c, "caption_channels")


def _pixart_fields(c: dict[str, Any], heads: int) -> dict[str, Any]:
  size = settings.count(c, "sample_size")
  conditions = c["use_additional_conditions"]
  scale = c["interpolation_scale"]
  return {
    "heads": heads,
    "interpolation_scale": float(
      max(size // 64, 1) if scale is None else scale
    ),
    "size_conditions": size == 128 if conditions is None else conditions,
  }


def _sana_fields(c: dict[str, Any], heads: int) -> dict[str, Any]:
  cross_heads = settings.count(c, "num_cross_attention_heads")
  if cross_heads * c["cross_attention_head_dim"] != c["cross_attention_dim"]:
    raise errors.UserError(
      f"num_cross_attention_heads={cross_heads} of cross_attention_head_dim="
      f"{c['cross_attention_head_dim']!r} do not make cross_attention_dim="
      f"{c['cross_attention_dim']!r}"
    )
  if c["qk_norm"] not in (None, _QK_NORM):
    raise errors.UserError(
      f"qk_norm={c['qk_norm']!r} is neither null nor {_QK_NORM!r}"
    )
  scale = c["interpolation_scale"]
  return {
    "heads": cross_heads,
    "linear_head_dim": settings.count(c, "attention_head_dim"),
    "qk_norm": c["qk_norm"] is not None,
    "guidance_embedding": settings.flag(c, "guidance_embeds"),
    "interpolation_scale": None if scale is None else float(scale),
  }


def to_config(family: str, model: families.Module) -> dict[str, Any]:
  """The inverse of `from_config`."""
  class_name = {family: name for name, family in CLASSES.items()}[family]
  d = model.hidden
  values = {
    "_class_name": class_name,
    "in_channels": model.latent_channels,
    "out_channels": model.out_channels,
    "num_layers": model.depth,
    "cross_attention_dim": d,
    "sample_size": model.latent_size[0],
    "patch_size": model.patch_size,
    "caption_channels": model.conditioning.caption_width,
    "interpolation_scale": model.interpolation_scale,
  }
  if family == "PixArt":
    values |= {
      "num_attention_heads": model.heads,
      "attention_head_dim": d // model.heads,
      "use_additional_conditions": model.size_conditions,
    }
  else:
    values |= {
      "num_attention_heads": d // model.linear_head_dim,
      "attention_head_dim": model.linear_head_dim,
      "num_cross_attention_heads": model.heads,
      "cross_attention_head_dim": d // model.heads,
      "qk_norm": _QK_NORM if model.qk_norm else None,
      "guidance_embeds": model.guidance_embedding,
    }
  return _DEFAULTS[family] | _FIXED[family] | values
