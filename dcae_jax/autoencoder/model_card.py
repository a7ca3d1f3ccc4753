"""The README of saved weights, as model hubs read it."""

from typing import TYPE_CHECKING, NamedTuple

from dcae_jax.autoencoder import families

if TYPE_CHECKING:
  from dcae_jax.autoencoder import autoencoder


class Provenance(NamedTuple):
  """Where weights and scaling factor come from, in words.

  `released_name` is that of the released model, if the weights are one.
  """

  weights: str = "not stated"
  released_name: str = ""
  scaling_factor: str = "given"


def text(
  ae: "autoencoder.Autoencoder", provenance: Provenance, layout: str
) -> str:
  """The model card of an autoencoder that is saved in a layout."""
  f, family = ae.spatial_compression, families.of(ae.architecture)
  library = "dcae_jax"
  load_it = 'import dcae_jax\n\nae = dcae_jax.load("FOLDER")'
  if layout == "diffusers":
    library, name = "diffusers", family.class_name
    load_it = (
      f'from diffusers import {name}\n\nae = {name}.from_pretrained("FOLDER")'
    )
  scale = "Multiply latents by it before diffusion, and divide them by it"
  if ae.shift_factor:
    scale = (
      f"Subtract the shift factor, {ae.shift_factor:.6g}, from latents and "
      "multiply them by it before diffusion; divide them by it and add the "
      "shift factor"
    )
  return (
    f"---\nlibrary_name: {library}\ntags:\n- autoencoder\n- {family.tag}\n"
    f"---\n\n# {family.title}, {ae.variant}\n\n"
    f"Compresses each side {f} times: an image of {8 * f} x {8 * f} pixels "
    f"has 8 x 8 latents of {ae.latent_channels} channels{family.latents}. "
    "Images are in [-1, 1].\n\n"
    f"- Weights: {provenance.weights}.\n"
    f"- Scaling factor: {ae.scaling_factor:.6g} ({provenance.scaling_factor}). "
    f"{scale} before decoding.\n"
    f"- Architecture: {family.source}. Written by dcae_jax, layout "
    f"`{layout}`.\n\n"
    f"```python\n{load_it}\n```\n"
  )
