"""Names of DC-AE's modules in its two layouts: the authors', and diffusers'."""

import itertools
from collections.abc import Iterator

from dcae_jax.autoencoder.dcae import variants
from dcae_jax.autoencoder.weights import module_name

# Inside a block of DC-AE; the fields of `module_name.Module`.
_BLOCKS = {
  "res": (
    ("conv1", "main.conv1.conv", "conv1"),
    ("conv2", "main.conv2.conv", "conv2"),
    ("norm", "main.conv2.norm", "norm"),
  ),
  "efficientvit": (
    (
      "context/qkv", "context_module.main.qkv.conv",
      ("attn.to_q", "attn.to_k", "attn.to_v"), True,
    ),
    ("context/project", "context_module.main.proj.conv", "attn.to_out", True),
    ("context/norm", "context_module.main.proj.norm", "attn.norm_out"),
    (
      "local/inverted", "local_module.main.inverted_conv.conv",
      "conv_out.conv_inverted",
    ),
    (
      "local/depthwise", "local_module.main.depth_conv.conv",
      "conv_out.conv_depth",
    ),
    (
      "local/point", "local_module.main.point_conv.conv",
      "conv_out.conv_point",
    ),
    ("local/norm", "local_module.main.point_conv.norm", "conv_out.norm"),
  ),
}  # fmt: skip

# One such pair for each scale of the attention.
_SCALE = (
  (
    "context/aggregate_{}", "context_module.main.aggreg.{}.0",
    "attn.to_qkv_multiscale.{}.proj_in",
  ),
  (
    "context/aggregate_{}_mix", "context_module.main.aggreg.{}.1",
    "attn.to_qkv_multiscale.{}.proj_out",
  ),
)  # fmt: skip


def modules(
  architecture: variants.Architecture,
) -> Iterator[module_name.Module]:
  """All modules; a convolution that also rearranges is one level deeper."""
  unshuffles = architecture.downsample == "space_to_channel"
  resamples = not architecture.encoder[0].depth
  yield module_name.Module(
    f"encoder/project_in{'/conv' if resamples else ''}",
    f"encoder.project_in.conv{'.conv' if resamples and unshuffles else ''}",
    f"encoder.conv_in{'.conv' if resamples else ''}",
  )
  for i, stage in enumerate(architecture.encoder):
    ours, original, diffusers = names = (
      f"encoder/stage_{i}",
      f"encoder.stages.{i}.op_list",
      f"encoder.down_blocks.{i}",
    )
    yield from _stage(stage, names, first_block=0)
    if stage.depth and i + 1 < len(architecture.encoder):
      yield module_name.Module(
        f"{ours}/downsample/conv",
        f"{original}.{stage.depth}.main.conv{'.conv' if unshuffles else ''}",
        f"{diffusers}.{stage.depth}.conv",
      )
  inside = ".main" if architecture.encoder_shortcut else ""
  yield module_name.Module(
    "encoder/project_out/conv",
    f"encoder.project_out{inside}.op_list.0.conv",
    "encoder.conv_out",
  )
  inside = ".main" if architecture.decoder_shortcut else ""
  original = f"decoder.project_in{inside}.conv"
  yield module_name.Module(
    "decoder/project_in/conv", original, "decoder.conv_in"
  )
  for i, stage in enumerate(architecture.decoder):
    ours, original, diffusers = names = (
      f"decoder/stage_{i}",
      f"decoder.stages.{i}.op_list",
      f"decoder.up_blocks.{i}",
    )
    upsamples = stage.depth > 0 and i + 1 < len(architecture.decoder)
    if upsamples:
      yield module_name.Module(
        f"{ours}/upsample/conv",
        f"{original}.0.main.conv.conv",
        f"{diffusers}.0.conv",
      )
    yield from _stage(stage, names, first_block=int(upsamples))
  deeper = "" if architecture.decoder[0].depth else ".conv"
  yield module_name.Module(
    "decoder/project_out/norm", "decoder.project_out.op_list.0",
    "decoder.norm_out",
  )  # fmt: skip
  yield module_name.Module(
    "decoder/project_out/conv",
    f"decoder.project_out.op_list.2.conv{deeper}",
    f"decoder.conv_out{deeper}",
  )


def _stage(
  stage: variants.Stage, names: tuple[str, str, str], first_block: int
) -> Iterator[module_name.Module]:
  ours, original, diffusers = names
  inside = list(_BLOCKS[stage.block])
  for i in range(len(stage.scales)):
    inside += [tuple(name.format(i) for name in row) for row in _SCALE]
  for i in range(stage.depth):
    place = first_block + i
    for module in itertools.starmap(module_name.Module, inside):
      yield module.inside(
        f"{ours}/block_{i}/", f"{original}.{place}.", f"{diffusers}.{place}."
      )
