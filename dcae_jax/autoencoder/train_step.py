"""One training step of the autoencoder, for all three phases.

Gradients exist for the trainable parameters alone: they are split off before
anything is differentiated. The loss is differentiated with respect to the
reconstruction first and pulled back once, so that the adaptive weight of the
GAN loss costs two gradients of the last layer and no second backward pass.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, UInt8

from dcae_jax.autoencoder import losses, phases, quantisation
from dcae_jax.training import freezing
from dcae_jax.training import learning as learning_lib
from dcae_jax.training import state as state_lib

Tree = Any
Metrics = dict[str, Array]
_SAMPLES = 2  # what the seed is for; 0 and 1 are initial values


@dataclasses.dataclass(frozen=True)
class Perceptual:
  """LPIPS, or another distance of images.

  The loss has the mean of `distance(parameters, images, others) -> [b]`.
  """

  distance: Callable[[Tree, Array, Array], Array]
  weight: float


@dataclasses.dataclass(frozen=True)
class Adversarial:
  """The GAN loss of phase 3.

  Attributes:
    discriminate: `(parameters, images) -> logits`.
    optimizer: of the discriminator.
    weight: of the generator's loss.
    adaptive: also weight it by the ratio of gradient norms.
    start_step: before it the generator does not feel the discriminator, which
      learns from step 0 on.
  """

  discriminate: Callable[[Tree, Array], Array]
  optimizer: optax.GradientTransformation
  weight: float
  adaptive: bool
  start_step: int


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by `jax.jit`
class TrainStep:
  """The step `(state, images, perceptual_parameters) -> (state, metrics)`.

  Metrics are float32 scalars.

  Attributes:
    reconstruct: `(variables, images, key)` to reconstructions and the KL
      divergence of each image, None where latents are not sampled; with
      `mutable=["batch_stats"]`, that and the variables that moved.
    perceptual: besides L1, or None.
    adversarial: of phase 3, else None.
    kl_weight: of the mean divergence.
    seed: of sampled latents; each step, and each part of a batch, has its own.
    grad_accum_steps: parts of the batch whose gradients are averaged before the
      update; each normalises by its own batch statistics.
  """

  reconstruct: Callable[..., Any]
  phase: phases.Phase
  learning: learning_lib.Learning
  perceptual: Perceptual | None = None
  adversarial: Adversarial | None = None
  kl_weight: float = 0.0
  seed: int = 0
  grad_accum_steps: int = 1

  def __call__(
    self,
    state: state_lib.TrainState,
    images: UInt8[Array, "b h w c"],
    perceptual_parameters: Tree,
  ) -> tuple[state_lib.TrainState, Metrics]:
    (gradient, discriminator_gradient), batch_stats, metrics = (
      self._accumulated(state, images, perceptual_parameters)
    )
    new_state, norms = self.learning.update(
      state,
      gradient,
      batch_stats if self.phase.moves_batch_statistics else None,
    )
    metrics |= norms
    if self.adversarial is not None:
      updates, optimizer_state = self.adversarial.optimizer.update(
        discriminator_gradient,
        state.discriminator_optimizer,
        state.discriminator,
      )
      discriminator = optax.apply_updates(state.discriminator, updates)
      metrics["discriminator_norm"] = optax.tree.norm(discriminator)
      new_state = new_state.replace(
        discriminator=discriminator, discriminator_optimizer=optimizer_state
      )
    return new_state, metrics

  def _accumulated(self, state, images, perceptual_parameters):
    """Means over the parts of the batch, one after the other."""
    if self.grad_accum_steps == 1:
      return self._gradients(
        state, state.batch_stats, images, 0, perceptual_parameters
      )
    # Each part takes rows from every device: the batch axis stays split.
    parts = images.reshape(-1, self.grad_accum_steps, *images.shape[1:])
    parts = jnp.moveaxis(parts, 1, 0)

    def part(batch_stats, images, number):
      gradients, batch_stats, metrics = self._gradients(
        state, batch_stats, images, number, perceptual_parameters
      )
      return batch_stats, (gradients, metrics)

    def add(carry, next_part):
      batch_stats, terms = part(carry[0], *next_part)
      return (batch_stats, jax.tree.map(jnp.add, carry[1], terms)), None

    first = part(state.batch_stats, parts[0], 0)
    others = (parts[1:], jnp.arange(1, self.grad_accum_steps))
    (batch_stats, sums), _ = jax.lax.scan(add, first, others)
    gradients, metrics = jax.tree.map(lambda x: x / self.grad_accum_steps, sums)
    return gradients, batch_stats, metrics

  def _gradients(self, state, batch_stats, images, part, perceptual_parameters):
    """Of one part of the batch: (gradients of both, batch_stats, metrics)."""
    images = quantisation.to_float(images)
    trainable, frozen = freezing.partition(state.params, self.learning.mask)
    forward = lambda learns: self._forward(
      {"params": freezing.combine(learns, frozen), "batch_stats": batch_stats},
      images,
      self._sampling_key(state.step, part),
    )
    outputs, pull_back, batch_stats = jax.vjp(forward, trainable, has_aux=True)
    (total, metrics), cotangent = jax.value_and_grad(
      self._reconstruction_loss, has_aux=True
    )(outputs, images, perceptual_parameters)
    discriminator_gradient = None
    if self.adversarial is not None:
      cotangent, weighted, of_gan, discriminator_gradient = self._adversarial(
        state, outputs, images, cotangent, pull_back
      )
      total, metrics = total + weighted, metrics | of_gan
    metrics["loss/total"] = total
    gradient = pull_back(cotangent)[0]
    return (gradient, discriminator_gradient), batch_stats, metrics

  def _sampling_key(self, step, part):
    key = jax.random.fold_in(jax.random.key(self.seed), _SAMPLES)
    return jax.random.fold_in(jax.random.fold_in(key, step), part)

  def _forward(self, variables, images, key):
    """((reconstructions, divergences), batch_stats)."""
    if not self.phase.moves_batch_statistics:
      outputs = self.reconstruct(variables, images, key)
      return outputs, variables["batch_stats"]
    outputs, moved = self.reconstruct(
      variables, images, key, mutable=["batch_stats"]
    )
    # A model without batch norm moves nothing.
    return outputs, moved["batch_stats"] if moved else variables["batch_stats"]

  def _reconstruction_loss(self, outputs, images, perceptual_parameters):
    reconstructions, divergences = outputs
    metrics = {"loss/l1": losses.l1(reconstructions, images)}
    total = metrics["loss/l1"]
    if divergences is not None:
      metrics["loss/kl"] = losses.kl(divergences, images)
      total = total + self.kl_weight * metrics["loss/kl"]
    if self.perceptual is not None:
      distances = self.perceptual.distance(
        perceptual_parameters, reconstructions, images
      )
      metrics["loss/lpips"] = jnp.mean(distances)
      total = total + self.perceptual.weight * metrics["loss/lpips"]
    return total, metrics

  def _adversarial(self, state, outputs, images, cotangent, pull_back):
    """Adds the GAN loss to what is pulled back.

    Returns:
      The cotangent of all losses, the weighted loss of the generator, metrics,
      and the discriminator's gradient.
    """
    gan = self.adversarial

    def generator_loss(outputs):
      logits = gan.discriminate(state.discriminator, outputs[0])
      return losses.hinge_generator(logits)

    def discriminator_loss(discriminator, reconstructions, images):
      real = gan.discriminate(discriminator, images)
      fake = gan.discriminate(discriminator, reconstructions)
      return losses.hinge_discriminator(real, fake)

    loss, gan_cotangent = jax.value_and_grad(generator_loss)(outputs)
    metrics = {"loss/generator": loss}
    weight = jnp.float32(gan.weight)
    if gan.adaptive:
      metrics["adaptive_weight"] = losses.adaptive_weight(
        last_layer(pull_back(cotangent)[0]),
        last_layer(pull_back(gan_cotangent)[0]),
      )
      weight = weight * metrics["adaptive_weight"]
    weight = jnp.where(state.step >= gan.start_step, weight, 0.0)
    cotangent = jax.tree.map(
      lambda a, b: a + weight * b, cotangent, gan_cotangent
    )
    metrics["loss/discriminator"], gradient = jax.value_and_grad(
      discriminator_loss
    )(state.discriminator, jax.lax.stop_gradient(outputs[0]), images)
    return cotangent, weight * loss, metrics, gradient


def reconstruct_with(
  apply: Callable[..., Any],
  samples_latents: bool = False,
  gather: Callable[[Tree], Tree] = lambda params: params,
) -> Callable[..., Any]:
  """`TrainStep.reconstruct` from a network's `apply`.

  With `samples_latents` it has the method `reconstruct_sample(images, key)`.
  `gather` is for parameters that are split over devices (`sharding.gather`).
  """

  def reconstruct(variables, images, key, **mutable):
    variables = variables | {"params": gather(variables["params"])}
    if samples_latents:
      return apply(
        variables, images, key, method="reconstruct_sample", **mutable
      )
    outputs = apply(variables, images, **mutable)
    if not mutable:
      return outputs, None
    reconstructions, moved = outputs
    return (reconstructions, None), moved

  return reconstruct


def last_layer(tree: Tree) -> Any:
  """The leaf of the decoder's last convolution."""
  return tree["decoder"]["project_out"]["conv"]["kernel"]
