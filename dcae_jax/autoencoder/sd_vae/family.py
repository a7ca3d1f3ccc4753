"""SD-VAE as one of the families of autoencoders."""

from dcae_jax.autoencoder import family
from dcae_jax.autoencoder.sd_vae import (
  hub_config,
  network,
  tensor_names,
  variants,
)

SD_VAE = family.Family(
  name="SD-VAE",
  class_name="AutoencoderKL",
  title="SD-VAE",
  tag="sd-vae",
  source="SD-VAE (AutoencoderKL), arXiv 2112.10752",
  latents=", the mean of a normal distribution",
  architecture=variants.Architecture,
  variants=variants.VARIANTS,
  create=network.create,
  config_defaults=hub_config.DEFAULTS,
  from_config=hub_config.from_config,
  to_config=hub_config.to_config,
  modules=tensor_names.modules,
  older_name=tensor_names.older_name,
  samples_latents=True,
)
