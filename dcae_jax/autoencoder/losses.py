"""The losses of the three phases (DC-AE, arXiv 2410.10733, section 3.2).

All are means: over pixels and channels (L1, SD-VAE's KL), over images (LPIPS,
whose network is handed in), over patches (GAN), so that weights mean the same
at every resolution and batch size. Everything is float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def l1(
  reconstructions: Float[Array, "b h w c"], images: Float[Array, "b h w c"]
) -> Float[Array, ""]:
  """Mean absolute difference; images in [-1, 1] give 0 to 2."""
  difference = reconstructions.astype(jnp.float32) - images.astype(jnp.float32)
  return jnp.mean(jnp.abs(difference))


def kl(
  divergences: Float[Array, " b"], images: Float[Array, "b h w c"]
) -> Float[Array, ""]:
  """Mean KL divergence of the latents, over the values of an image.

  Latent diffusion (arXiv 2112.10752) adds it to an L1 that is summed over those
  values; with the mean of `l1` this keeps the ratio, and so its weight.
  """
  return jnp.mean(divergences) / (images.size // len(images))


def hinge_discriminator(
  real_logits: Float[Array, "b h w 1"], fake_logits: Float[Array, "b h w 1"]
) -> Float[Array, ""]:
  """Half the sum of the two hinges (arXiv 1705.02894)."""
  real = jnp.mean(jax.nn.relu(1.0 - real_logits))
  fake = jnp.mean(jax.nn.relu(1.0 + fake_logits))
  return 0.5 * (real + fake)


def hinge_generator(fake_logits: Float[Array, "b h w 1"]) -> Float[Array, ""]:
  """Minus the mean logit of the reconstructions."""
  return -jnp.mean(fake_logits)


def adaptive_weight(
  reconstruction_gradient: Float[Array, "..."],
  generator_gradient: Float[Array, "..."],
) -> Float[Array, ""]:
  """Ratio of the two losses' gradient norms at the last layer, 0 to 1e4.

  VQGAN (arXiv 2012.09841), equation 7: it keeps the GAN loss as strong as the
  reconstruction loss. It carries no gradient.
  """
  norms = [
    jnp.linalg.norm(gradient.astype(jnp.float32).ravel())
    for gradient in (reconstruction_gradient, generator_gradient)
  ]
  ratio = jnp.clip(norms[0] / (norms[1] + 1e-4), 0.0, 1e4)
  return jax.lax.stop_gradient(ratio)
