"""What one family of autoencoders is to everything that serves them all."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from dcae_jax.autoencoder import network
from dcae_jax.autoencoder.weights import module_name

# Widths, depths and blocks: a frozen dataclass, whose class is its family's
# own, with `latent_channels` and `spatial_compression`.
Architecture = Any
Tree = Any


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of autoencoders, such as DC-AE.

  Its networks have the modules `encoder/project_out`, `decoder/project_in` and
  `decoder/project_out/conv`, which the phases of training name.

  Attributes:
    name: as people say it.
    class_name: of the class that diffusers has for it.
    title, tag, source, latents: words of a model card.
    architecture: the class of its architectures.
    variants: its architectures by name.
    create: the network of `(architecture, image_channels, options)`; UserError
      for an architecture that cannot be.
    config_defaults: what its class in diffusers takes for absent keys.
    from_config: a `config.json` to the architecture and image channels;
      UserError for one that cannot be.
    to_config: the inverse, of `(architecture, image_channels, scaling_factor,
      shift_factor)`; UserError if the class has no setting for it.
    modules: all modules of an architecture that have parameters; there may be
      more.
    layouts: that its weights come in, the first one where no name decides.
    plain: an architecture without settings that do nothing in it.
    older_name: what older files call a tensor of a name.
    orders_channels: whether the first latent channels of an architecture make
      do without the others.
    samples_latents: training decodes samples of a posterior. The network has
      `reconstruct_sample(images, key)`, with the reconstructions and the KL
      divergence of each image.
    with_branch_scale: initial parameters whose residual branches have a size.
  """

  name: str
  class_name: str
  title: str
  tag: str
  source: str
  architecture: type
  variants: dict[str, Architecture]
  create: Callable[[Architecture, int, network.Options], network.Network]
  config_defaults: dict[str, Any]
  from_config: Callable[[dict[str, Any]], tuple[Architecture, int]]
  to_config: Callable[[Architecture, int, float, float], dict[str, Any]]
  modules: Callable[[Architecture], Iterator[module_name.Module]]
  layouts: tuple[str, ...] = ("diffusers",)
  latents: str = ""
  plain: Callable[[Architecture], Architecture] = lambda a: a
  older_name: Callable[[str], str] = lambda name: name
  orders_channels: Callable[[Architecture], bool] = lambda a: False
  samples_latents: bool = False
  with_branch_scale: Callable[[Tree, float], Tree] = lambda params, _: params
