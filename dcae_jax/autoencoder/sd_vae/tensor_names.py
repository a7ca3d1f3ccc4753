"""Names of SD-VAE's modules in diffusers' layout, the only one it comes in."""

from collections.abc import Iterator

from dcae_jax.autoencoder.sd_vae import variants
from dcae_jax.autoencoder.weights import module_name

_ENDS = {
  "encoder/project_in": "encoder.conv_in",
  "encoder/project_out/norm": "encoder.conv_norm_out",
  "encoder/project_out/conv": "encoder.conv_out",
  "encoder/project_out/mix": "quant_conv",
  "decoder/project_in/mix": "post_quant_conv",
  "decoder/project_in/conv": "decoder.conv_in",
  "decoder/project_out/norm": "decoder.conv_norm_out",
  "decoder/project_out/conv": "decoder.conv_out",
}

_BLOCK = (
  *(module_name.Module(x, "", x) for x in ("norm1", "conv1", "norm2", "conv2")),
  module_name.Module("shortcut", "", "conv_shortcut"),
)
_ATTENTION = (
  module_name.Module("norm", "", "group_norm"),
  module_name.Module("qkv", "", ("to_q", "to_k", "to_v"), matrix=True),
  module_name.Module("project", "", "to_out.0", matrix=True),
)

# Projections of SD-VAE's attention, now and before.
_OLDER = {
  "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"
}  # fmt: skip


def older_name(name: str) -> str:
  """What older files of diffusers' AutoencoderKL have instead of a name."""
  module, _, rest = name.partition(".attentions.")
  for now, before in _OLDER.items():
    rest = rest.replace(f".{now}.", f".{before}.")
  return f"{module}.attentions.{rest}" if rest else name


def modules(
  architecture: variants.Architecture,
) -> Iterator[module_name.Module]:
  """All modules, and those that only other variants have."""
  for ours, diffusers in _ENDS.items():
    yield module_name.Module(ours, "", diffusers)
  stages = range(len(architecture.widths))
  # Theirs go from the input to the output.
  for part, way, depth, order in (
    ("encoder", "down", architecture.depth, stages),
    ("decoder", "up", architecture.depth + 1, stages[::-1]),
  ):
    yield from _unit(f"{part}/middle", f"{part}.mid_block", 2)
    for place, i in enumerate(order):
      ours, diffusers = f"{part}/stage_{i}", f"{part}.{way}_blocks.{place}"
      yield from _unit(ours, diffusers, depth)
      yield module_name.Module(
        f"{ours}/{way}sample/conv", "", f"{diffusers}.{way}samplers.0.conv"
      )


def _unit(
  ours: str, diffusers: str, depth: int
) -> Iterator[module_name.Module]:
  """Blocks of SD-VAE and their attention."""
  for i in range(depth):
    for module in _BLOCK:
      yield module.inside(f"{ours}/block_{i}/", "", f"{diffusers}.resnets.{i}.")
    for module in _ATTENTION:
      yield module.inside(
        f"{ours}/attention_{i}/", "", f"{diffusers}.attentions.{i}."
      )
