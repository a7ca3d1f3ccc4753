"""What we save in diffusers' layout, its classes load, and the other way."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import numpy_denoisers
import pytest
import torch

from benchmarks import parity
from dcae_jax.diffusion import conditioning
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.diffusion.denoisers import released

FORMS = {
  "PixArt": (
    diffusers.PixArtTransformer2DModel,
    {"interpolation_scale": 2.0, "size_conditions": True},
  ),
  "SANA": (
    diffusers.SanaTransformer2DModel,
    {"qk_norm": True, "linear_head_dim": 16},
  ),
  "Sprint": (
    diffusers.SanaTransformer2DModel,
    {"qk_norm": True, "guidance_embedding": True, "interpolation_scale": 1.0},
  ),
}


@pytest.mark.parametrize("form", FORMS)
def test_diffusers_loads_what_we_save_and_we_what_it_saves(form, tmp_path):
  their_class, fields = FORMS[form]
  family = "PixArt" if form == "PixArt" else "SANA"
  fields = {"depth": 2, "hidden": 96, "heads": 3} | fields
  ours = denoisers.create(
    denoisers.Variant(family, fields),
    latent_size=8,
    latent_channels=5,
    conditioning=conditioning.Captions(7, 20),
    patch_size=2,
    learn_sigma=family == "PixArt",
  )
  variables = numpy_denoisers.random_variables(ours)
  released.save(tmp_path / "ours", variables, ours, "diffusers")
  theirs, report = their_class.from_pretrained(
    tmp_path / "ours", output_loading_info=True
  )
  for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not report[problem]

  z, t, condition = numpy_denoisers.random_inputs(ours)
  condition["is_null"] = jnp.zeros(len(z), bool)
  tensor = lambda x: torch.from_numpy(np.array(x))
  more = {}
  if form == "PixArt":
    sizes = jnp.array([[64.0, 64.0]] * len(z))
    condition |= {"resolution": sizes, "aspect_ratio": sizes[:, :1] / 64}
    keys = ("resolution", "aspect_ratio")
    more = {"added_cond_kwargs": {key: tensor(condition[key]) for key in keys}}
  if form == "Sprint":
    condition["guidance"] = jnp.array([0.1, 0.45, 1.0])
    more = {"guidance": tensor(condition["guidance"])}
  with torch.no_grad():
    expected = theirs(
      tensor(z).permute(0, 3, 1, 2),
      encoder_hidden_states=tensor(condition["states"]),
      timestep=tensor(t),
      encoder_attention_mask=tensor(condition["mask"]),
      **more,
    ).sample
  found = jax.jit(ours.apply)(variables, z, t, condition)
  expected = expected.permute(0, 2, 3, 1).numpy()
  assert parity.relative_error(found, expected) < 1e-4

  theirs.save_pretrained(tmp_path / "theirs")
  again = released.find(str(tmp_path / "theirs"))
  assert again.latent_size == 8 and again.patch_size == 2
  assert again.learn_sigma == (family == "PixArt")
  for key, value in fields.items():
    assert again.variant.fields[key] == value, key
  params = released.read(again)["params"]
  assert not jnp.any(params.pop("null_caption"))
  del variables["params"]["null_caption"]
  jax.tree.map(np.testing.assert_array_equal, params, variables["params"])
