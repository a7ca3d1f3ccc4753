"""DC-AE as one of the families of autoencoders."""

from dcae_jax.autoencoder import family
from dcae_jax.autoencoder.dcae import (
  hub_config,
  network,
  tensor_names,
  variants,
)

DC_AE = family.Family(
  name="DC-AE",
  class_name="AutoencoderDC",
  title="Deep compression autoencoder",
  tag="dc-ae",
  source="DC-AE, arXiv 2410.10733",
  architecture=variants.Architecture,
  variants=variants.VARIANTS,
  create=network.create,
  config_defaults=hub_config.DEFAULTS,
  from_config=hub_config.from_config,
  to_config=hub_config.to_config,
  modules=tensor_names.modules,
  layouts=("original", "diffusers"),
  plain=hub_config.plain,
  # DC-AE 1.5, whose projections to and from the latents have no shortcut.
  orders_channels=lambda a: not (a.encoder_shortcut or a.decoder_shortcut),
  with_branch_scale=network.with_branch_scale,
)
