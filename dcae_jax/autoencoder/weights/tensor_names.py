"""Names of our modules in the layouts that released weights come in.

`conversion.py` reads and writes files by them. DC-AE has two layouts: that of
its authors ("original") and that of diffusers; SD-VAE's is diffusers' alone.
"""

from collections.abc import Iterator

from dcae_jax.autoencoder.dcae import tensor_names as dcae_tensor_names
from dcae_jax.autoencoder.dcae import variants as dcae_variants
from dcae_jax.autoencoder.sd_vae import network as sd_vae
from dcae_jax.autoencoder.sd_vae import tensor_names as sd_vae_tensor_names
from dcae_jax.autoencoder.weights import module_name


def modules(
  variant: dcae_variants.Variant | sd_vae.Variant,
) -> Iterator[module_name.Module]:
  """All modules of an autoencoder that have parameters."""
  if isinstance(variant, dcae_variants.Variant):
    yield from dcae_tensor_names.modules(variant)
  else:
    yield from sd_vae_tensor_names.modules(variant)


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
