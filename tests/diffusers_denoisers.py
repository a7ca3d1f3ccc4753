"""Names of PixArt's and SANA's layers in diffusers' modules, for their tests.

Weights of both are random throughout: initial values are zero here and there.
"""

import numpy as np
import torch


def state_dict(p, patch_size):
  """Our parameters under their names; theirs have no null caption."""
  state = {}

  def put(name, parameters, parts=("",)):
    for ours, theirs in (
      ("kernel", "weight"),
      ("bias", "bias"),
      ("scale", "weight"),
      ("vectors", "scale_shift_table"),
    ):
      if ours in parameters:
        x = np.asarray(parameters[ours])
        if x.ndim == 4:
          x = x.transpose(3, 2, 0, 1)
        elif ours == "kernel":
          x = x.T
        if ours == "vectors":
          parts, theirs = ("",), theirs
        for part, values in zip(parts, np.split(x, len(parts)), strict=True):
          key = ".".join(filter(None, (name, part, theirs)))
          state[key] = torch.from_numpy(values.copy())

  is_sana = "caption_norm" in p
  patches = "patch_embed.proj" if is_sana else "pos_embed.proj"
  put(patches, p["project_in"])
  kernel = state[f"{patches}.weight"]
  kernel = kernel.reshape(len(kernel), patch_size, patch_size, -1)
  state[f"{patches}.weight"] = kernel.permute(0, 3, 1, 2)
  time = "time_embed" if is_sana else "adaln_single"
  inside = "" if "guidance_embedding" in p else ".emb"
  for ours, theirs in (
    ("time_embedding", f"{time}{inside}.timestep_embedder"),
    ("guidance_embedding", f"{time}.guidance_embedder"),
    ("resolution_embedding", f"{time}.emb.resolution_embedder"),
    ("aspect_ratio_embedding", f"{time}.emb.aspect_ratio_embedder"),
    ("caption_projection", "caption_projection"),
  ):
    if ours in p:
      put(f"{theirs}.linear_1", p[ours]["linear1"])
      put(f"{theirs}.linear_2", p[ours]["linear2"])
  put(f"{time}.linear", p["modulation"])
  if is_sana:
    put("caption_norm", p["caption_norm"])
  for i in range(sum(name.startswith("block_") for name in p)):
    name, block = f"transformer_blocks.{i}", p[f"block_{i}"]
    put(name, block["table"])
    put(f"{name}.attn1", block["attention"]["qkv"], ("to_q", "to_k", "to_v"))
    put(f"{name}.attn2.to_q", block["cross_attention"]["q"])
    put(f"{name}.attn2", block["cross_attention"]["kv"], ("to_k", "to_v"))
    for theirs, ours in (("attn1", "attention"), ("attn2", "cross_attention")):
      put(f"{name}.{theirs}.to_out.0", block[ours]["project"])
      if "q_norm" in block[ours]:
        put(f"{name}.{theirs}.norm_q", block[ours]["q_norm"])
        put(f"{name}.{theirs}.norm_k", block[ours]["k_norm"])
    for ours, theirs in (
      ("expand", "net.0.proj"),
      ("contract", "net.2"),
      ("inverted", "conv_inverted"),
      ("depthwise", "conv_depth"),
      ("point", "conv_point"),
    ):
      if ours in block["mlp"]:
        put(f"{name}.ff.{theirs}", block["mlp"][ours])
  put("proj_out", p["project_out"]["linear"])
  put("", p["project_out"]["table"])
  return state
