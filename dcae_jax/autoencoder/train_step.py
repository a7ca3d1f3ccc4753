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
from jaxtyping import Array, Float, UInt8

from dcae_jax.autoencoder import losses, phases
from dcae_jax.training import freezing
from dcae_jax.training import state as state_lib

Tree = Any
Metrics = dict[str, Array]
_SAMPLES = 2  # what the seed is for; 0 and 1 are initial values
LAST_LAYER = ("decoder", "project_out", "conv", "kernel")


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


@dataclasses.dataclass(frozen=True)
class Variational:
  """Latents sampled from a posterior, and the KL loss on it: SD-VAE.

  Attributes:
    reconstruct: `(variables, images, key, mutable=...)` to reconstructions of a
      sample and the KL divergence of each image; in place of `apply`.
    weight: of the KL loss.
    seed: of the samples; each step, and each part of a batch, has its own.
  """

  reconstruct: Callable[..., Any]
  weight: float
  seed: int


@dataclasses.dataclass(frozen=True)
class Ema:
  """Averages with the decay `decay * (1 - exp(-step / ramp_steps))`."""

  decay: float
  ramp_steps: int

  def at(self, step: Array) -> Array:
    if not self.ramp_steps:
      return jnp.float32(self.decay)
    return self.decay * (1 - jnp.exp(-step / self.ramp_steps))


def to_float(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
  """[0, 255] integers to [-1, 1] floats."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def create(
  *,
  apply: Callable[..., Any],
  phase: phases.Phase,
  mask: Tree,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  ema: Ema,
  perceptual: Callable[[Tree, Array, Array], Array] | None = None,
  perceptual_weight: float = 0.0,
  adversarial: Adversarial | None = None,
  variational: Variational | None = None,
  accumulation: int = 1,
  gather: Callable[[Tree], Tree] = lambda params: params,
) -> Callable[..., tuple[state_lib.TrainState, Metrics]]:
  """The step `(state, images, perceptual_parameters) -> (state, metrics)`.

  Args:
    apply: of the autoencoder: `(variables, images, mutable=...)`.
    phase: of the training.
    mask: which parameters learn.
    optimizer: of the autoencoder.
    schedule: its learning rate, for the metrics.
    ema: decay of the averages.
    perceptual: `(parameters, images, others) -> distances [b]`, or None.
    perceptual_weight: of its mean.
    adversarial: of phase 3, else None.
    variational: of an SD-VAE, else None.
    accumulation: parts of the batch whose gradients are averaged before the
      update; each normalises by its own batch statistics.
    gather: of parameters that are split over devices (`sharding.gather`).

  `images` are uint8 [b, h, w, c]; metrics are float32 scalars.
  """

  def forward(variables, images, key, **options):
    """Reconstructions, and the KL divergences or None."""
    if variational is not None:
      return variational.reconstruct(variables, images, key, **options)
    if not options:
      return apply(variables, images), None
    reconstructions, moved = apply(variables, images, **options)
    return (reconstructions, None), moved

  def reconstruct(trainable, frozen, batch_stats, images, key):
    params = gather(freezing.combine(trainable, frozen))
    variables = {"params": params, "batch_stats": batch_stats}
    if not phase.moves_batch_statistics:
      return forward(variables, images, key), batch_stats
    outputs, moved = forward(variables, images, key, mutable=["batch_stats"])
    # A model without batch norm moves nothing.
    return outputs, moved["batch_stats"] if moved else batch_stats

  def reconstruction_loss(outputs, images, perceptual_parameters):
    reconstructions, divergences = outputs
    metrics = {"loss/l1": losses.l1(reconstructions, images)}
    total = metrics["loss/l1"]
    if divergences is not None:
      metrics["loss/kl"] = losses.kl(divergences, images)
      total = total + variational.weight * metrics["loss/kl"]
    if perceptual is not None:
      distances = perceptual(perceptual_parameters, reconstructions, images)
      metrics["loss/lpips"] = jnp.mean(distances)
      total = total + perceptual_weight * metrics["loss/lpips"]
    return total, metrics

  def generator_loss(outputs, discriminator):
    reconstructions, _ = outputs
    logits = adversarial.discriminate(discriminator, reconstructions)
    return losses.hinge_generator(logits)

  def discriminator_loss(discriminator, reconstructions, images):
    return losses.hinge_discriminator(
      adversarial.discriminate(discriminator, images),
      adversarial.discriminate(discriminator, reconstructions),
    )

  def sampling_key(step, part):
    if variational is None:
      return None
    key = jax.random.fold_in(jax.random.key(variational.seed), _SAMPLES)
    return jax.random.fold_in(jax.random.fold_in(key, step), part)

  def gradients(state, batch_stats, images, part, perceptual_parameters):
    """Of one part of the batch: (gradients of both, batch_stats, metrics)."""
    images = to_float(images)
    key = sampling_key(state.step, part)
    trainable, frozen = freezing.partition(state.params, mask)
    outputs, pull_back, batch_stats = jax.vjp(
      lambda learns: reconstruct(learns, frozen, batch_stats, images, key),
      trainable,
      has_aux=True,
    )
    (total, metrics), cotangent = jax.value_and_grad(
      reconstruction_loss, has_aux=True
    )(outputs, images, perceptual_parameters)
    discriminator_gradient = None
    if adversarial is not None:
      loss, gan_cotangent = jax.value_and_grad(generator_loss)(
        outputs, state.discriminator
      )
      weight = jnp.float32(adversarial.weight)
      if adversarial.adaptive:
        ratio = losses.adaptive_weight(
          last_layer(pull_back(cotangent)[0]),
          last_layer(pull_back(gan_cotangent)[0]),
        )
        metrics["adaptive_weight"] = ratio
        weight = weight * ratio
      weight = jnp.where(state.step >= adversarial.start_step, weight, 0.0)
      metrics["loss/generator"] = loss
      total = total + weight * loss
      cotangent = jax.tree.map(
        lambda a, b: a + weight * b, cotangent, gan_cotangent
      )
      metrics["loss/discriminator"], discriminator_gradient = (
        jax.value_and_grad(discriminator_loss)(
          state.discriminator, jax.lax.stop_gradient(outputs[0]), images
        )
      )
    metrics["loss/total"] = total
    gradient = pull_back(cotangent)[0]
    return (gradient, discriminator_gradient), batch_stats, metrics

  def accumulated(state, images, perceptual_parameters):
    if accumulation == 1:
      return gradients(
        state, state.batch_stats, images, 0, perceptual_parameters
      )
    # Each part takes rows from every device: the batch axis stays split.
    parts = images.reshape(-1, accumulation, *images.shape[1:])
    parts = jnp.moveaxis(parts, 1, 0)

    def part(batch_stats, images, number):
      found, batch_stats, metrics = gradients(
        state, batch_stats, images, number, perceptual_parameters
      )
      return batch_stats, (found, metrics)

    def add(carry, next_part):
      batch_stats, sums = carry
      batch_stats, found = part(batch_stats, *next_part)
      return (batch_stats, jax.tree.map(jnp.add, sums, found)), None

    first = part(state.batch_stats, parts[0], 0)
    others = (parts[1:], jnp.arange(1, accumulation))
    (batch_stats, sums), _ = jax.lax.scan(add, first, others)
    found, metrics = jax.tree.map(lambda x: x / accumulation, sums)
    return found, batch_stats, metrics

  def step(state, images, perceptual_parameters):
    (gradient, discriminator_gradient), batch_stats, metrics = accumulated(
      state, images, perceptual_parameters
    )
    trainable, frozen = freezing.partition(state.params, mask)
    updates, optimizer_state = optimizer.update(
      gradient, state.optimizer, trainable
    )
    trainable = optax.apply_updates(trainable, updates)
    averages, frozen_averages = freezing.partition(state.ema["params"], mask)
    decay = ema.at(state.step + 1)
    average = lambda old, new: decay * old + (1 - decay) * new
    averages = jax.tree.map(average, averages, trainable)
    averaged_stats = state.ema["batch_stats"]
    if phase.moves_batch_statistics:
      averaged_stats = jax.tree.map(average, averaged_stats, batch_stats)
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    # Of what a checkpoint would hold: the losses are from before the update.
    metrics["parameter_norm"] = optax.tree.norm(trainable)
    metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
    state = state.replace(
      step=state.step + 1,
      params=freezing.combine(trainable, frozen),
      batch_stats=batch_stats,
      ema={
        "params": freezing.combine(averages, frozen_averages),
        "batch_stats": averaged_stats,
      },
      optimizer=optimizer_state,
    )
    if adversarial is not None:
      updates, optimizer_state = adversarial.optimizer.update(
        discriminator_gradient,
        state.discriminator_optimizer,
        state.discriminator,
      )
      discriminator = optax.apply_updates(state.discriminator, updates)
      metrics["discriminator_norm"] = optax.tree.norm(discriminator)
      state = state.replace(
        discriminator=discriminator, discriminator_optimizer=optimizer_state
      )
    return state, metrics

  return step


def last_layer(tree: Tree) -> Any:
  """The leaf of the decoder's last convolution."""
  for key in LAST_LAYER:
    tree = tree[key]
  return tree
