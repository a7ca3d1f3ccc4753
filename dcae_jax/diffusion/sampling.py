"""A latent diffusion model as a whole, and samples of it: noise to latents."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dcae_jax.diffusion import conditioning, guidance, objectives, samplers
from dcae_jax.diffusion.denoisers import families as denoisers


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
  """A denoiser, what it learns, and how it is sampled: in how many steps.

  `interval` is that of `guidance.guided`.
  """

  denoiser: denoisers.Module
  objective: objectives.Objective
  sampler: samplers.Sampler
  steps: int
  interval: tuple[float, float] | None = None

  @property
  def conditioning(self) -> conditioning.Conditioning:
    return self.denoiser.conditioning

  def guided(
    self, variables: Any, condition: Any, scale: float, null: Any = None
  ) -> objectives.ModelFunction:
    """The network, told a condition and led away from `null`.

    That is another condition of the same shapes, such as negative prompts, or
    None, the null one.
    """
    return guidance.guided(
      lambda *inputs: self.denoiser.apply(variables, *inputs),
      condition,
      self.conditioning.null(condition) if null is None else null,
      scale,
      self.interval,
    )

  def sample_function(
    self,
    scale: float,
    sharding: jax.sharding.Sharding,
    latent_size: tuple[int, int] | None = None,
  ) -> Callable[..., jax.Array]:
    """`(variables, key, condition, null=None) -> z_0 [b, h, w, c]`, scaled.

    It is not jitted. `scale` and `null` are those of `guided`. Values do not
    depend on the `sharding`, that of the latents while they are drawn. They
    have the denoiser's size, or another one that it takes.
    """
    size = latent_size or self.denoiser.latent_size
    shape = (*size, self.denoiser.latent_channels)

    def sample(
      variables: Any, key: jax.Array, condition: Any, null: Any = None
    ) -> jax.Array:
      noise_key, sampler_key = jax.random.split(key)
      rows = len(jax.tree.leaves(condition)[0])
      z = jax.random.normal(noise_key, (rows, *shape), jnp.float32)
      z = jax.lax.with_sharding_constraint(z, sharding)
      model_fn = self.guided(variables, condition, scale, null)
      return self.sampler.sample(
        self.objective, model_fn, sampler_key, z, self.steps
      )

    return sample
