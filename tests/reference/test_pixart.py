"""PixArt against diffusers' PixArtTransformer2DModel: outputs and gradients."""

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

FORMS = {  # patch size, latent, size conditions, scale of positions, base
  "one position a token": (1, (6, 6), False, 1.0, 6),
  "patches of 2x2, wide": (2, (4, 8), False, 1.0, 8),
  "size conditions": (2, (8, 4), True, 2.0, 16),
}


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_gradient_equal_those_of_diffusers(form):
  patch_size, size, size_conditions, scale, base = FORMS[form]
  fields = {
    "depth": 2, "hidden": 48, "heads": 3, "interpolation_scale": scale,
    "size_conditions": size_conditions,
  }  # fmt: skip
  ours = denoisers.create(
    denoisers.Variant("PixArt", fields),
    latent_size=base,
    latent_channels=5,
    conditioning=conditioning.Captions(7, 20),
    patch_size=patch_size,
    learn_sigma=True,
  )
  variables = numpy_denoisers.random_variables(ours)
  theirs = diffusers.PixArtTransformer2DModel(
    num_attention_heads=3,
    attention_head_dim=16,
    in_channels=5,
    out_channels=10,
    num_layers=2,
    cross_attention_dim=48,
    sample_size=base,
    patch_size=patch_size,
    caption_channels=20,
    interpolation_scale=scale,
    use_additional_conditions=size_conditions,
  ).eval()
  theirs.load_state_dict(
    diffusers_denoisers.state_dict(variables["params"], patch_size)
  )

  z, t, condition = numpy_denoisers.random_inputs(ours, latent_size=size)
  condition["is_null"] = jnp.zeros(len(z), bool)
  added = {"resolution": None, "aspect_ratio": None}
  if size_conditions:
    rng = np.random.default_rng(2)
    sizes = rng.uniform(64, 1024, (len(z), 2)).astype("float32")
    condition |= {"resolution": sizes, "aspect_ratio": sizes[:, :1] / 500}
    added = {key: torch.from_numpy(condition[key]) for key in added}
  tensor = lambda x: torch.from_numpy(np.array(x))
  their_z = tensor(z).permute(0, 3, 1, 2).requires_grad_()
  expected = theirs(
    their_z,
    encoder_hidden_states=tensor(condition["states"]),
    timestep=tensor(t),
    added_cond_kwargs=added,
    encoder_attention_mask=tensor(condition["mask"]),
  ).sample
  signs = np.random.default_rng(1).choice([-1.0, 1.0], (len(z), *size, 10))
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
