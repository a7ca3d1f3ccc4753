"""Deep compression autoencoders (DC-AE), and diffusion on them, in JAX."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names, for editors and type checkers
  from dcae_jax.autoencoder.autoencoder import Autoencoder, load
  from dcae_jax.autoencoder.families import list_variants
  from dcae_jax.diffusion.denoiser import Denoiser
  from dcae_jax.diffusion.denoisers.families import list_denoisers
  from dcae_jax.diffusion.text.encoders import TextEncoder
  from dcae_jax.diffusion.text.encoders import load as load_text_encoder
  from dcae_jax.setup.denoiser import load as load_denoiser

_HOMES = {
  "Autoencoder": ("autoencoder.autoencoder", "Autoencoder"),
  "Denoiser": ("diffusion.denoiser", "Denoiser"),
  "TextEncoder": ("diffusion.text.encoders", "TextEncoder"),
  "list_denoisers": ("diffusion.denoisers.families", "list_denoisers"),
  "list_variants": ("autoencoder.families", "list_variants"),
  "load": ("autoencoder.autoencoder", "load"),
  "load_denoiser": ("setup.denoiser", "load"),
  "load_text_encoder": ("diffusion.text.encoders", "load"),
}
__all__ = [
  "Autoencoder", "Denoiser", "TextEncoder", "list_denoisers", "list_variants",
  "load", "load_denoiser", "load_text_encoder",
]  # fmt: skip


def __getattr__(name: str):
  """Imports on first use: loader processes import this package without JAX."""
  if name in _HOMES:
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
  if name == "__version__":
    try:
      return importlib.metadata.version(__name__)
    except importlib.metadata.PackageNotFoundError:  # a clone as it is
      return "0+unknown"
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  """With what is imported on first use: `help` shows it."""
  return sorted({*globals(), *_HOMES, "__version__"})
