"""SANA against diffusers' SanaTransformer2DModel: outputs and gradients."""

import diffusers
import diffusers_denoisers
import jax
import jax.numpy as jnp
import numpy as np
import numpy_denoisers
import pytest
import torch

from benchmarks import parity
from dcae_jax.diffusion import conditioning
from dcae_jax.diffusion.denoisers import families as denoisers

FORMS = {  # patch size, latent, further fields, base
  "few positions": (1, (4, 6), {}, 6),
  "many positions, wide": (1, (6, 10), {}, 8),
  "norms of queries and keys": (1, (7, 6), {"qk_norm": True}, 6),
  "Sprint": (
    1, (4, 4), {"qk_norm": True, "guidance_embedding": True}, 4,
  ),
  "positions, patches of 2x2": (
    2, (8, 4), {"interpolation_scale": 2.0}, 16,
  ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_gradient_equal_those_of_diffusers(form):
  patch_size, size, fields, base = FORMS[form]
  fields = {"depth": 2, "hidden": 64, "heads": 4} | fields
  ours = denoisers.create(
    denoisers.Variant("SANA", fields),
    latent_size=base,
    latent_channels=5,
    conditioning=conditioning.Captions(7, 20),
    patch_size=patch_size,
  )
  variables = numpy_denoisers.random_variables(ours)
  theirs = diffusers.SanaTransformer2DModel(
    in_channels=5,
    out_channels=5,
    num_attention_heads=2,
    attention_head_dim=32,
    num_layers=2,
    num_cross_attention_heads=4,
    cross_attention_head_dim=16,
    cross_attention_dim=64,
    caption_channels=20,
    sample_size=base,
    patch_size=patch_size,
    interpolation_scale=fields.get("interpolation_scale"),
    guidance_embeds="guidance_embedding" in fields,
    qk_norm="rms_norm_across_heads" if "qk_norm" in fields else None,
  ).eval()
  theirs.load_state_dict(
    diffusers_denoisers.state_dict(variables["params"], patch_size)
  )

  z, t, condition = numpy_denoisers.random_inputs(ours, latent_size=size)
  condition["is_null"] = jnp.zeros(len(z), bool)
  tensor = lambda x: torch.from_numpy(np.array(x))
  guidance = None
  if "guidance_embedding" in fields:
    condition["guidance"] = jnp.array([0.1, 0.45, 1.0])
    guidance = tensor(condition["guidance"])
  their_z = tensor(z).permute(0, 3, 1, 2).requires_grad_()
  expected = theirs(
    their_z,
    encoder_hidden_states=tensor(condition["states"]),
    timestep=tensor(t),
    guidance=guidance,
    encoder_attention_mask=tensor(condition["mask"]),
  ).sample
  signs = np.random.default_rng(1).choice([-1.0, 1.0], z.shape)
  signs = signs.astype("float32")
  (expected * tensor(signs).permute(0, 3, 1, 2)).sum().backward()

  @jax.jit
  def forward_and_gradient(z):
    y, pull = jax.vjp(lambda z: ours.apply(variables, z, t, condition), z)
    return y, pull(jnp.asarray(signs))[0]

  found, gradient = forward_and_gradient(z)
  expected = expected.detach().permute(0, 2, 3, 1).numpy()
  assert parity.relative_error(found, expected) < 1e-4
  expected = their_z.grad.permute(0, 2, 3, 1).numpy()
  assert parity.relative_error(gradient, expected) < 1e-4
