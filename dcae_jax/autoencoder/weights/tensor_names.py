"""Names of our modules in the layouts that released weights come in.

`conversion.py` reads and writes files by them. DC-AE has two layouts: that of
its authors ("original") and that of diffusers; SD-VAE's is diffusers' alone.
"""

from collections.abc import Iterator
from typing import NamedTuple

from dcae_jax.autoencoder.dcae import variants as dcae_variants
from dcae_jax.autoencoder.sd_vae import network as sd_vae


class Module(NamedTuple):
  """A module's path in our parameters and its name in the two layouts.

  Attributes:
    ours: such as "encoder/stage_3/block_0/context/qkv".
    original: the same with dots; "" where that layout lacks the model.
    diffusers: also; several names where it is divided along its outputs.
    matrix: in the diffusers layout its 1x1 kernel has two axes.
  """

  ours: str
  original: str
  diffusers: str | tuple[str, ...]
  matrix: bool = False


# Inside a block of DC-AE.
_BLOCKS = {
  "res": (
    Module("conv1", "main.conv1.conv", "conv1"),
    Module("conv2", "main.conv2.conv", "conv2"),
    Module("norm", "main.conv2.norm", "norm"),
  ),
  "efficientvit": (
    Module(
      "context/qkv",
      "context_module.main.qkv.conv",
      ("attn.to_q", "attn.to_k", "attn.to_v"),
      matrix=True,
    ),
    Module(
      "context/project",
      "context_module.main.proj.conv",
      "attn.to_out",
      matrix=True,
    ),
    Module("context/norm", "context_module.main.proj.norm", "attn.norm_out"),
    Module(
      "local/inverted",
      "local_module.main.inverted_conv.conv",
      "conv_out.conv_inverted",
    ),
    Module(
      "local/depthwise",
      "local_module.main.depth_conv.conv",
      "conv_out.conv_depth",
    ),
    Module(
      "local/point", "local_module.main.point_conv.conv", "conv_out.conv_point"
    ),
    Module("local/norm", "local_module.main.point_conv.norm", "conv_out.norm"),
  ),
}
# One such pair for each scale of the attention.
_SCALE = (
  Module(
    "context/aggregate_{}",
    "context_module.main.aggreg.{}.0",
    "attn.to_qkv_multiscale.{}.proj_in",
  ),
  Module(
    "context/aggregate_{}_mix",
    "context_module.main.aggreg.{}.1",
    "attn.to_qkv_multiscale.{}.proj_out",
  ),
)

_SD_VAE_ENDS = {
  "encoder/project_in": "encoder.conv_in",
  "encoder/project_out/norm": "encoder.conv_norm_out",
  "encoder/project_out/conv": "encoder.conv_out",
  "encoder/project_out/mix": "quant_conv",
  "decoder/project_in/mix": "post_quant_conv",
  "decoder/project_in/conv": "decoder.conv_in",
  "decoder/project_out/norm": "decoder.conv_norm_out",
  "decoder/project_out/conv": "decoder.conv_out",
}
_SD_VAE_BLOCK = {
  "norm1": "norm1",
  "conv1": "conv1",
  "norm2": "norm2",
  "conv2": "conv2",
  "shortcut": "conv_shortcut",
}
# Projections of SD-VAE's attention, now and before.
_OLDER = {
  "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"
}  # fmt: skip


def modules(
  variant: dcae_variants.Variant | sd_vae.Variant,
) -> Iterator[Module]:
  """All modules of an autoencoder that have parameters."""
  if isinstance(variant, dcae_variants.Variant):
    yield from _of_dcae(variant)
  else:
    yield from _of_sd_vae(variant)


def known(variant: dcae_variants.Variant | sd_vae.Variant) -> tuple[str, ...]:
  """The layouts that weights of a variant come in."""
  if isinstance(variant, dcae_variants.Variant):
    return ("original", "diffusers")
  return ("diffusers",)


def names(
  variant: dcae_variants.Variant | sd_vae.Variant, layout: str
) -> set[str]:
  """Of all modules in a layout that the variant comes in; see `modules`."""
  found = set()
  for module in modules(variant):
    theirs = getattr(module, layout)
    found.update((theirs,) if isinstance(theirs, str) else theirs)
  return found


def older_name(name: str) -> str:
  """What older files of diffusers' AutoencoderKL have instead of a name."""
  module, _, rest = name.partition(".attentions.")
  for now, before in _OLDER.items():
    rest = rest.replace(f".{now}.", f".{before}.")
  return f"{module}.attentions.{rest}" if rest else name


def _of_dcae(variant: dcae_variants.Variant) -> Iterator[Module]:
  """All modules; a convolution that also rearranges is one level deeper."""
  unshuffles = variant.downsample == "space_to_channel"
  resamples = not variant.encoder[0].depth
  yield Module(
    f"encoder/project_in{'/conv' if resamples else ''}",
    f"encoder.project_in.conv{'.conv' if resamples and unshuffles else ''}",
    f"encoder.conv_in{'.conv' if resamples else ''}",
  )
  for i, stage in enumerate(variant.encoder):
    names = (
      f"encoder/stage_{i}",
      f"encoder.stages.{i}.op_list",
      f"encoder.down_blocks.{i}",
    )
    yield from _stage(stage, names, first_block=0)
    if stage.depth and i + 1 < len(variant.encoder):
      ours, original, diffusers = names
      yield Module(
        f"{ours}/downsample/conv",
        f"{original}.{stage.depth}.main.conv{'.conv' if unshuffles else ''}",
        f"{diffusers}.{stage.depth}.conv",
      )
  inside = ".main" if variant.encoder_shortcut else ""
  yield Module(
    "encoder/project_out/conv",
    f"encoder.project_out{inside}.op_list.0.conv",
    "encoder.conv_out",
  )
  inside = ".main" if variant.decoder_shortcut else ""
  yield Module(
    "decoder/project_in/conv",
    f"decoder.project_in{inside}.conv",
    "decoder.conv_in",
  )
  for i, stage in enumerate(variant.decoder):
    ours, original, diffusers = names = (
      f"decoder/stage_{i}",
      f"decoder.stages.{i}.op_list",
      f"decoder.up_blocks.{i}",
    )
    upsamples = stage.depth > 0 and i + 1 < len(variant.decoder)
    if upsamples:
      yield Module(
        f"{ours}/upsample/conv",
        f"{original}.0.main.conv.conv",
        f"{diffusers}.0.conv",
      )
    yield from _stage(stage, names, first_block=int(upsamples))
  deeper = "" if variant.decoder[0].depth else ".conv"
  yield Module(
    "decoder/project_out/norm", "decoder.project_out.op_list.0",
    "decoder.norm_out",
  )  # fmt: skip
  yield Module(
    "decoder/project_out/conv",
    f"decoder.project_out.op_list.2.conv{deeper}",
    f"decoder.conv_out{deeper}",
  )


def _stage(
  stage: dcae_variants.Stage, names: tuple[str, str, str], first_block: int
) -> Iterator[Module]:
  ours, original, diffusers = names
  inside = list(_BLOCKS[stage.block])
  for i in range(len(stage.scales)):
    inside += [
      Module(*(name.format(i) for name in module[:3])) for module in _SCALE
    ]
  for i in range(stage.depth):
    prefix = f"{diffusers}.{first_block + i}."
    for module in inside:
      parts = module.diffusers
      yield Module(
        f"{ours}/block_{i}/{module.ours}",
        f"{original}.{first_block + i}.{module.original}",
        prefix + parts
        if isinstance(parts, str)
        else tuple(prefix + part for part in parts),
        module.matrix,
      )


def _of_sd_vae(variant: sd_vae.Variant) -> Iterator[Module]:
  """All modules, and those that only other variants have."""
  for ours, diffusers in _SD_VAE_ENDS.items():
    yield Module(ours, "", diffusers)
  deepest = len(variant.widths) - 1
  for part, depth, blocks, resampling in (
    (
      "encoder",
      variant.depth,
      "down_blocks.{}",
      ("downsample", "downsamplers"),
    ),
    ("decoder", variant.depth + 1, "up_blocks.{}", ("upsample", "upsamplers")),
  ):
    yield from _unit(f"{part}/middle", f"{part}.mid_block", 2)
    for i in range(deepest + 1):
      # Theirs go from the input to the output.
      place = i if part == "encoder" else deepest - i
      ours, diffusers = f"{part}/stage_{i}", f"{part}.{blocks.format(place)}"
      yield from _unit(ours, diffusers, depth)
      yield Module(
        f"{ours}/{resampling[0]}/conv",
        "",
        f"{diffusers}.{resampling[1]}.0.conv",
      )


def _unit(ours: str, diffusers: str, depth: int) -> Iterator[Module]:
  """Blocks of SD-VAE and their attention."""
  for i in range(depth):
    for name, theirs in _SD_VAE_BLOCK.items():
      yield Module(
        f"{ours}/block_{i}/{name}", "", f"{diffusers}.resnets.{i}.{theirs}"
      )
    attention = f"{ours}/attention_{i}", f"{diffusers}.attentions.{i}"
    yield Module(f"{attention[0]}/norm", "", f"{attention[1]}.group_norm")
    parts = tuple(f"{attention[1]}.to_{x}" for x in "qkv")
    yield Module(f"{attention[0]}/qkv", "", parts, matrix=True)
    yield Module(
      f"{attention[0]}/project", "", f"{attention[1]}.to_out.0", matrix=True
    )
