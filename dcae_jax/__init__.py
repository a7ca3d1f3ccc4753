"""Deep compression autoencoders (DC-AE), and diffusion on them, in JAX."""

import importlib

_HOMES = {
  "Autoencoder": ("autoencoder.autoencoder", "Autoencoder"),
  "Denoiser": ("diffusion.denoiser", "Denoiser"),
  "TextEncoder": ("diffusion.text.encoders", "TextEncoder"),
  "load": ("autoencoder.autoencoder", "load"),
  "load_denoiser": ("setup.denoiser", "load"),
  "load_text_encoder": ("diffusion.text.encoders", "load"),
}
__all__ = list(_HOMES)


def __getattr__(name: str):
  """Imports on first use: loader processes import this package without JAX."""
  if name in _HOMES:
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
  if name == "__version__":
    from importlib import metadata

    try:
      return metadata.version(__name__)
    except metadata.PackageNotFoundError:  # a clone as it is
      return "0+unknown"
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  """With what is imported on first use: `help` shows it."""
  return sorted({*globals(), *_HOMES, "__version__"})
