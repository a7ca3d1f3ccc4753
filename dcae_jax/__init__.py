"""Deep compression autoencoders (DC-AE) in JAX: `load` and `Autoencoder`."""

__all__ = ["Autoencoder", "load"]


def __getattr__(name: str):
  """Imports on first use: loader processes import this package without JAX."""
  if name in __all__:
    from dcae_jax.autoencoder import autoencoder

    return getattr(autoencoder, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
