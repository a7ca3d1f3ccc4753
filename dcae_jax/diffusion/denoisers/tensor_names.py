"""Names of the denoisers' parameters in the layouts of released weights.

"original" is that of the authors of each, "diffusers" that of the library,
which has classes for PixArt and SANA alone.
"""

import re
from collections.abc import Iterator

import jax

from dcae_jax import errors
from dcae_jax.autoencoder.weights import conversion
from dcae_jax.diffusion.denoisers import families
from dcae_jax.training import freezing

Names = tuple[str, ...]
NULL_CAPTION = "null_caption"
POSITIONS = "pos_embed"
# Of a layer's array: its name in both layouts, and the order of the axes there
# and here.
_LEAVES = {
  "kernel": (".weight", "o i", "i o"),
  "bias": (".bias", "c", "c"),
  "scale": (".weight", "c", "c"),
  "embedding": (".weight", "n d", "n d"),
  "vectors": ("", "n d", "n d"),
  "positions": ("", "1 n d", "n d"),
  NULL_CAPTION: ("", "n d", "n d"),
}
_CONVOLUTION = ("o i h w", "h w i o")
_PATCHES = ("o c p q", "(p q c) o")

# Our layer or array, with {} for the number of its block, and theirs. Several
# names are of parts, one after the other.
_UVIT_BLOCK = {
  "norm1": "norm1",
  "norm2": "norm2",
  "attention/qkv": "attn.qkv",
  "attention/project": "attn.proj",
  "mlp/expand": "mlp.fc1",
  "mlp/contract": "mlp.fc2",
  "merge": "skip_linear",
}
_UVIT = {
  "project_in": "patch_embed.proj",
  "positions": "pos_embed",
  "label_embedding": "label_emb.embedding_table",
  "norm": "norm",
  "project_out": "decoder_pred",
} | {
  f"{ours}/{layer}": f"{theirs}.{name}"
  for ours, theirs in (
    ("in_block_{}", "in_blocks.{}"),
    ("middle_block", "mid_block"),
    ("out_block_{}", "out_blocks.{}"),
  )
  for layer, name in _UVIT_BLOCK.items()
}  # fmt: skip
_DIT = {
  "project_in": "x_embedder.proj",
  "time_embedding/linear1": "t_embedder.mlp.0",
  "time_embedding/linear2": "t_embedder.mlp.2",
  "label_embedding": "y_embedder.embedding_table",
  "block_{}/attention/qkv": "blocks.{}.attn.qkv",
  "block_{}/attention/project": "blocks.{}.attn.proj",
  "block_{}/mlp/expand": "blocks.{}.mlp.fc1",
  "block_{}/mlp/contract": "blocks.{}.mlp.fc2",
  "block_{}/modulation/linear": "blocks.{}.adaLN_modulation.1",
  "project_out/modulation/linear": "final_layer.adaLN_modulation.1",
  "project_out/linear": "final_layer.linear",
}
# What PixArt and SANA share.
_CAPTIONED = {
  "project_in": "x_embedder.proj",
  "time_embedding/linear1": "t_embedder.mlp.0",
  "time_embedding/linear2": "t_embedder.mlp.2",
  "modulation": "t_block.1",
  NULL_CAPTION: "y_embedder.y_embedding",
  "caption_projection/linear1": "y_embedder.y_proj.fc1",
  "caption_projection/linear2": "y_embedder.y_proj.fc2",
  "block_{}/table/vectors": "blocks.{}.scale_shift_table",
  "block_{}/attention/qkv": "blocks.{}.attn.qkv",
  "block_{}/attention/project": "blocks.{}.attn.proj",
  "block_{}/cross_attention/q": "blocks.{}.cross_attn.q_linear",
  "block_{}/cross_attention/kv": "blocks.{}.cross_attn.kv_linear",
  "block_{}/cross_attention/project": "blocks.{}.cross_attn.proj",
  "project_out/linear": "final_layer.linear",
  "project_out/table/vectors": "final_layer.scale_shift_table",
}
_PIXART = _CAPTIONED | {
  "resolution_embedding/linear1": "csize_embedder.mlp.0",
  "resolution_embedding/linear2": "csize_embedder.mlp.2",
  "aspect_ratio_embedding/linear1": "ar_embedder.mlp.0",
  "aspect_ratio_embedding/linear2": "ar_embedder.mlp.2",
  "block_{}/mlp/expand": "blocks.{}.mlp.fc1",
  "block_{}/mlp/contract": "blocks.{}.mlp.fc2",
}
_SANA = _CAPTIONED | {
  "guidance_embedding/linear1": "cfg_embedder.mlp.0",
  "guidance_embedding/linear2": "cfg_embedder.mlp.2",
  "caption_norm": "attention_y_norm",
  "block_{}/attention/q_norm": "blocks.{}.attn.q_norm",
  "block_{}/attention/k_norm": "blocks.{}.attn.k_norm",
  "block_{}/cross_attention/q_norm": "blocks.{}.cross_attn.q_norm",
  "block_{}/cross_attention/k_norm": "blocks.{}.cross_attn.k_norm",
  "block_{}/mlp/inverted": "blocks.{}.mlp.inverted_conv.conv",
  "block_{}/mlp/depthwise": "blocks.{}.mlp.depth_conv.conv",
  "block_{}/mlp/point": "blocks.{}.mlp.point_conv.conv",
}
_IN_BLOCK = "transformer_blocks.{}."
_CAPTIONED_IN_DIFFUSERS = {
  "caption_projection/linear1": "caption_projection.linear_1",
  "caption_projection/linear2": "caption_projection.linear_2",
  "block_{}/table/vectors": f"{_IN_BLOCK}scale_shift_table",
  "block_{}/attention/qkv": tuple(
    f"{_IN_BLOCK}attn1.to_{part}" for part in "qkv"
  ),
  "block_{}/attention/project": f"{_IN_BLOCK}attn1.to_out.0",
  "block_{}/cross_attention/q": f"{_IN_BLOCK}attn2.to_q",
  "block_{}/cross_attention/kv": tuple(
    f"{_IN_BLOCK}attn2.to_{part}" for part in "kv"
  ),
  "block_{}/cross_attention/project": f"{_IN_BLOCK}attn2.to_out.0",
  "project_out/linear": "proj_out",
  "project_out/table/vectors": "scale_shift_table",
}
_PIXART_IN_DIFFUSERS = _CAPTIONED_IN_DIFFUSERS | {
  "project_in": "pos_embed.proj",
  "modulation": "adaln_single.linear",
  "block_{}/mlp/expand": f"{_IN_BLOCK}ff.net.0.proj",
  "block_{}/mlp/contract": f"{_IN_BLOCK}ff.net.2",
} | {
  f"{ours}/linear{i}": f"adaln_single.emb.{theirs}.linear_{i}"
  for ours, theirs in (
    ("time_embedding", "timestep_embedder"),
    ("resolution_embedding", "resolution_embedder"),
    ("aspect_ratio_embedding", "aspect_ratio_embedder"),
  )
  for i in (1, 2)
}  # fmt: skip
_SANA_IN_DIFFUSERS = _CAPTIONED_IN_DIFFUSERS | {
  "project_in": "patch_embed.proj",
  "modulation": "time_embed.linear",
  "caption_norm": "caption_norm",
  "block_{}/attention/q_norm": f"{_IN_BLOCK}attn1.norm_q",
  "block_{}/attention/k_norm": f"{_IN_BLOCK}attn1.norm_k",
  "block_{}/cross_attention/q_norm": f"{_IN_BLOCK}attn2.norm_q",
  "block_{}/cross_attention/k_norm": f"{_IN_BLOCK}attn2.norm_k",
  "block_{}/mlp/inverted": f"{_IN_BLOCK}ff.conv_inverted",
  "block_{}/mlp/depthwise": f"{_IN_BLOCK}ff.conv_depth",
  "block_{}/mlp/point": f"{_IN_BLOCK}ff.conv_point",
}  # fmt: skip
NAMES: dict[str, dict[str, dict[str, str | Names]]] = {
  "DiT": {"original": _DIT},
  "UViT": {"original": _UVIT},
  "PixArt": {"original": _PIXART, "diffusers": _PIXART_IN_DIFFUSERS},
  "SANA": {"original": _SANA, "diffusers": _SANA_IN_DIFFUSERS},
}


def _check_layout(family: str, layout: str) -> None:
  """Raises UserError for a layout that a family of denoisers is not in."""
  if family not in NAMES:
    raise errors.UserError(
      f"no other library has a {family}; released weights are of "
      f"{', '.join(NAMES)}"
    )
  if layout not in NAMES[family]:
    raise errors.UserError(
      f"a {family} has no layout {layout!r}; use "
      f"{' or '.join(map(repr, NAMES[family]))}"
    )


def table(
  family: str, model: families.Module, layout: str
) -> list[conversion.Entry]:
  """Where each parameter of a model is in a file of that layout.

  Raises UserError for a layout that the family is not in.
  """
  _check_layout(family, layout)
  return list(_entries(model, _layer_names(family, model, layout)))


def _layer_names(
  family: str, model: families.Module, layout: str
) -> dict[str, str | Names]:
  names = dict(NAMES[family][layout])
  if (family, layout) == ("SANA", "diffusers"):
    # Where there is guidance, another class embeds both.
    with_guidance = model.guidance_embedding
    inside = "time_embed" if with_guidance else "time_embed.emb"
    for i in (1, 2):
      names[f"time_embedding/linear{i}"] = (
        f"{inside}.timestep_embedder.linear_{i}"
      )
      names[f"guidance_embedding/linear{i}"] = (
        f"{inside}.guidance_embedder.linear_{i}"
      )
  return names


def _entries(
  model: families.Module, layer_names: dict[str, str | Names]
) -> Iterator[conversion.Entry]:
  for path, shape in shapes(model).items():
    layer, _, leaf = path.removeprefix("params/").rpartition("/")
    block = re.search(r"block_(\d+)", layer)
    if leaf in ("vectors", "positions", NULL_CAPTION):
      layer = f"{layer}/{leaf}".removeprefix("/")
    names = layer_names.get(re.sub(r"block_\d+", "block_{}", layer))
    if names is None:  # diffusers has no null caption
      continue
    suffix, *axes = _LEAVES[leaf]
    sizes = ()
    if path == "params/project_in/kernel":
      axes, sizes = _PATCHES, (("p", model.patch_size), ("q", model.patch_size))
    elif leaf == "kernel" and len(shape) == 4:
      axes = _CONVOLUTION
    names = (names,) if isinstance(names, str) else names
    number = block[1] if block else ""
    names = tuple(f"{name.format(number)}{suffix}" for name in names)
    yield conversion.Entry(path, shape, names, *axes, sizes)


def shapes(model: families.Module) -> dict[str, tuple[int, ...]]:
  """Of all parameters, by their paths."""
  variables = families.abstract_variables(model)
  leaves = [leaf.shape for leaf in jax.tree.leaves(variables)]
  return dict(zip(freezing.parameter_paths(variables), leaves, strict=True))
