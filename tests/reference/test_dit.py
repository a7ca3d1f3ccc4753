"""DiT against diffusers' DiTTransformer2DModel: outputs and gradients.

Theirs holds an embedding of time and class in each block; all get the same
weights here. Its frequencies of time stop at 1/10000, those of the paper's code
one step before: theirs are set to those.
"""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import parity
from dcae_jax.diffusion import conditioning
from dcae_jax.diffusion.denoisers import families as denoisers

FORMS = {  # patch size, latent size, learned sigma
  "one position a token": (1, 6, True),
  "patches of 2x2": (2, 8, True),
  "patches of 4x4, no sigma": (4, 12, False),
}


def _random_variables(model):
  """All random: the initial values of the gates and of the head are zeros."""
  rng = np.random.default_rng(0)

  def random(path, x):
    gain = x.shape[0] ** -0.5 if path[-1].key == "kernel" else 0.3
    return jnp.asarray(gain * rng.normal(size=x.shape), "float32")

  return jax.tree.map_with_path(random, denoisers.abstract_variables(model))


def _state_dict(p, channels, patch_size):
  """Our parameters under their names."""
  state = {}

  def linear(name, parameters, columns=slice(None)):
    for theirs, ours in (("weight", "kernel"), ("bias", "bias")):
      x = np.asarray(parameters[ours])[..., columns]
      state[f"{name}.{theirs}"] = torch.from_numpy(x.T.copy())

  linear("pos_embed.proj", p["project_in"])
  kernel = state["pos_embed.proj.weight"]
  shape = (len(kernel), patch_size, patch_size, channels)
  state["pos_embed.proj.weight"] = kernel.reshape(shape).permute(0, 3, 1, 2)
  hidden = len(kernel)
  for i in range(sum(name.startswith("block_") for name in p)):
    name, block = f"transformer_blocks.{i}", p[f"block_{i}"]
    embedding = f"{name}.norm1.emb"
    for j in (1, 2):
      linear(
        f"{embedding}.timestep_embedder.linear_{j}",
        p["time_embedding"][f"linear{j}"],
      )
    table = np.asarray(p["label_embedding"]["embedding"])
    state[f"{embedding}.class_embedder.embedding_table.weight"] = (
      torch.from_numpy(table.copy())
    )
    linear(f"{name}.norm1.linear", block["modulation"]["linear"])
    for j, part in enumerate(("to_q", "to_k", "to_v")):
      columns = slice(j * hidden, (j + 1) * hidden)
      linear(f"{name}.attn1.{part}", block["attention"]["qkv"], columns)
    linear(f"{name}.attn1.to_out.0", block["attention"]["project"])
    linear(f"{name}.ff.net.0.proj", block["mlp"]["expand"])
    linear(f"{name}.ff.net.2", block["mlp"]["contract"])
  linear("proj_out_1", p["project_out"]["modulation"]["linear"])
  linear("proj_out_2", p["project_out"]["linear"])
  return state


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_gradient_equal_those_of_diffusers(form):
  patch_size, size, learn_sigma = FORMS[form]
  ours = denoisers.create(
    denoisers.Variant("DiT", {"depth": 3, "hidden": 48, "heads": 3}),
    latent_size=size,
    latent_channels=5,
    conditioning=conditioning.ClassLabels(11),
    patch_size=patch_size,
    learn_sigma=learn_sigma,
  )
  variables = _random_variables(ours)
  theirs = diffusers.DiTTransformer2DModel(
    num_attention_heads=3,
    attention_head_dim=16,
    in_channels=5,
    out_channels=ours.out_channels,
    num_layers=3,
    sample_size=size,
    patch_size=patch_size,
    num_embeds_ada_norm=11,
    norm_eps=1e-6,
  ).eval()
  theirs.load_state_dict(_state_dict(variables["params"], 5, patch_size))
  for block in theirs.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0

  rng = np.random.default_rng(1)
  z = rng.normal(size=(4, size, size, 5)).astype("float32")
  t = np.array([0.0, 3.25, 421.0, 999.0], "float32")
  labels = np.array([0, 4, 10, 11], "int32")  # the last is the null class
  their_z = torch.from_numpy(z.transpose(0, 3, 1, 2).copy()).requires_grad_()
  expected = theirs(
    their_z, torch.from_numpy(t), torch.from_numpy(labels).long()
  ).sample
  signs = rng.choice([-1.0, 1.0], (4, size, size, ours.out_channels))
  signs = signs.astype("float32")
  (expected * torch.from_numpy(signs.transpose(0, 3, 1, 2))).sum().backward()

  @jax.jit
  def forward_and_gradient(z, t, labels):
    y, pull = jax.vjp(lambda z: ours.apply(variables, z, t, labels), z)
    return y, pull(signs)[0]

  signs = jnp.asarray(signs)
  found, gradient = forward_and_gradient(z, t, labels)
  expected = expected.detach().numpy().transpose(0, 2, 3, 1)
  assert parity.relative_error(found, expected) < 1e-4
  expected = their_z.grad.numpy().transpose(0, 2, 3, 1)
  assert parity.relative_error(gradient, expected) < 1e-4
