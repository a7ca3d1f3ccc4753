"""Latent diffusion: forward processes and training targets.

Everything acts on scaled latents z and on functions model_fn(z, t) of noisy
latents and of the number that the network sees as time. Both processes are
z_t = alpha(t) z_0 + sigma(t) noise. Networks are elsewhere, and so are
samplers and guidance. Arithmetic outside the network is float32.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from dcae_jax import errors

Latents = Float[Array, "b h w c"]
Output = Float[Array, "b h w outputs"]
Mask = Float[Array, "b 1 1 c"]
ModelFunction = Callable[[Latents, Float[Array, " b"]], Output]


class Prediction(NamedTuple):
  """What a network's output says about z, each of z's shape.

  Attributes:
    z_0: the expected clean latents.
    epsilon: the expected noise.
    velocity: dz/dt of the probability flow, t as the objective counts it.
    score: the gradient of the log-density of z; infinite where sigma is 0.
  """

  z_0: Latents
  epsilon: Latents
  velocity: Latents
  score: Latents


class Chain(NamedTuple):
  """A Markov chain through some times of a discrete process, as numpy tables.

  Attributes:
    times: the times kept, ascending, in 0..999.
    alphas_cumprod: alpha^2 at these times.
    previous: alpha^2 one step closer to the data; 1 at the first.
    betas: the noise added by each step of the chain.
    lower, upper: logarithms of the reverse step's variance, for data that are a
      point and data that are white noise. The first `lower` would be minus
      infinity; it is that of the second step.
  """

  times: np.ndarray
  alphas_cumprod: np.ndarray
  previous: np.ndarray
  betas: np.ndarray
  lower: np.ndarray
  upper: np.ndarray


class Objective:
  """A forward process, and what a network learns of it.

  Each has alpha(t) and sigma(t), random times, what the network sees of them,
  how its output is read, and the terms of the loss for each value.
  """

  def output_channels(self, channels: int) -> int:
    """Channels of the network's output for latents of so many."""
    return channels

  def loss(
    self,
    model_fn: ModelFunction,
    key: Array,
    z: Latents,
    mask: Mask | None = None,
  ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """The loss of each example at a random time, and the terms that add to it.

    Args:
      z: clean latents.
      mask: see `random_channel_mask`.

    Returns:
      losses, and {"mse"} or {"mse", "variational_bound"}, the latter in bits
      per value.

    Raises:
      UserError: the network's output has the wrong shape.
    """
    time_key, noise_key = jax.random.split(key)
    t = self.sample_times(time_key, len(z))
    noise = jax.random.normal(noise_key, z.shape)
    alpha, sigma = _spread(self.alpha(t)), _spread(self.sigma(t))
    noisy = alpha * z + sigma * noise
    noisy = noisy if mask is None else noisy * mask
    output = network_output(self, model_fn, noisy, t)
    terms = {
      name: _mean(values, mask)
      for name, values in self._terms(output, z, noise, t).items()
    }
    return functools.reduce(operator.add, terms.values()), terms


@dataclasses.dataclass(frozen=True)
class NoisePrediction(Objective):
  """Variance preserving diffusion in discrete steps; noise is predicted.

  The loss is the mean squared error of the noise (arXiv 2006.11239, equation
  14). With `learned_variance` the output has twice the channels. Its second
  half, v, sets the variance of the reverse step between the chain's two bounds
  (v = -1 and 1), and the loss gains that step's divergence from the true
  posterior, in bits per value. This is L_hybrid of improved DDPM
  (arXiv 2102.09672), whose bound is a sum over T steps, weighted by 0.001: here
  one step is drawn from T. The second term moves the variance only; no gradient
  reaches the noise through it. At t = 0 the published code scores 8-bit pixels,
  which latents are not: here the posterior of t = 0 has the mean z_0 and the
  variance of t = 1. No sampler uses the variance at t = 0.

  Attributes:
    first_beta, last_beta: the noise added by the first and the last step.
    spacing: "linear" in beta, or "scaled_linear": linear in its square root.
    learned_variance: the network gives the variance of the reverse steps.
    first_time: the number that the network sees at t = 0 (released UViTs: 1).
    total_steps: T. Times t are 0..T-1; samplers may ask for values between,
      where log(alpha) is linear.
  """

  first_beta: float = 1e-4
  last_beta: float = 0.02
  spacing: str = "linear"
  learned_variance: bool = False
  first_time: int = 0
  total_steps: ClassVar[int] = 1000

  def __post_init__(self):
    if self.spacing not in ("linear", "scaled_linear"):
      raise errors.UserError(
        f"unknown spacing {self.spacing!r} of betas; known are linear, "
        "scaled_linear"
      )
    if not 0 < self.first_beta <= self.last_beta < 1:
      raise errors.UserError(
        f"betas from {self.first_beta} to {self.last_beta} are not ascending "
        "between 0 and 1"
      )

  def chain(self, steps: int | None = None) -> Chain:
    """The chain of `steps` evenly spaced times, both ends kept; all if None.

    Respacing keeps alpha at the times that are kept (arXiv 2102.09672, section
    4): beta is 1 - alpha^2 / previous alpha^2. `steps` is 2 to `total_steps`.
    """
    steps = self.total_steps if steps is None else steps
    times = np.round(np.linspace(0, self.total_steps - 1, steps)).astype(int)
    if self.spacing == "linear":
      betas = np.linspace(self.first_beta, self.last_beta, self.total_steps)
    else:
      ends = np.sqrt([self.first_beta, self.last_beta])
      betas = np.linspace(*ends, self.total_steps) ** 2
    alphas_cumprod = np.cumprod(1 - betas)[times]
    previous = np.append(1.0, alphas_cumprod[:-1])
    betas = 1 - alphas_cumprod / previous
    lower = betas * (1 - previous) / (1 - alphas_cumprod)
    lower[0] = lower[1]
    return Chain(
      times, alphas_cumprod, previous, betas, np.log(lower), np.log(betas)
    )

  def _log_alpha(
    self, t: Num[Array, " b"]
  ) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """The logarithm of alpha, and its derivative by t."""
    table = np.log(self.chain().alphas_cumprod) / 2
    table, slopes = (
      jnp.asarray(x, jnp.float32) for x in (table[:-1], np.diff(table))
    )
    index = jnp.clip(jnp.floor(t), 0, self.total_steps - 2).astype(int)
    return table[index] + (t - index) * slopes[index], slopes[index]

  def alpha(self, t: Num[Array, " b"]) -> Float[Array, " b"]:
    return jnp.exp(self._log_alpha(t)[0])

  def sigma(self, t: Num[Array, " b"]) -> Float[Array, " b"]:
    return jnp.sqrt(-jnp.expm1(2 * self._log_alpha(t)[0]))

  def model_time(self, t: Num[Array, " b"]) -> Float[Array, " b"]:
    """What the network sees: t, 0..999, counted from `first_time`."""
    return t.astype(jnp.float32) + self.first_time

  def output_channels(self, channels: int) -> int:
    return 2 * channels if self.learned_variance else channels

  def sample_times(self, key: Array, b: int) -> Int[Array, " b"]:
    """Uniform over 0..999."""
    return jax.random.randint(key, (b,), 0, self.total_steps)

  def predict(
    self, output: Output, z: Latents, t: Num[Array, " b"]
  ) -> Prediction:
    """Reads the network's output at (z, t)."""
    epsilon = output[..., : z.shape[-1]]
    alpha, sigma = _spread(self.alpha(t)), _spread(self.sigma(t))
    _, slope = self._log_alpha(t)
    return Prediction(
      z_0=(z - sigma * epsilon) / alpha,
      epsilon=epsilon,
      velocity=_spread(slope) * (z - epsilon / sigma),
      score=-epsilon / sigma,
    )

  def _terms(self, output, z, noise, t):
    epsilon = output[..., : z.shape[-1]]
    terms = {"mse": jnp.square(epsilon - noise)}
    if self.learned_variance:
      error = jax.lax.stop_gradient(epsilon) - noise
      interpolation = output[..., z.shape[-1] :]
      bound = self._step_divergence(error, interpolation, t)
      terms["variational_bound"] = bound
    return terms

  def _step_divergence(
    self, error: Latents, interpolation: Latents, t: Int[Array, " b"]
  ) -> Latents:
    """KL(q(z_{t-1} | z_t, z_0), p(z_{t-1} | z_t)) of each value, in bits."""
    chain = self.chain()
    # The means differ by this much for each unit of difference in the noise.
    shift = chain.betas / np.sqrt(
      (1 - chain.betas) * (1 - chain.alphas_cumprod)
    )
    shift, lower, upper = (
      _spread(jnp.asarray(table, jnp.float32)[t])
      for table in (shift, chain.lower, chain.upper)
    )
    log_variance = interpolate_log_variance(interpolation, lower, upper)
    difference = lower - log_variance
    mean_term = jnp.square(shift * error) * jnp.exp(-log_variance)
    divergence = jnp.expm1(difference) - difference + mean_term
    return divergence / (2 * np.log(2))


@dataclasses.dataclass(frozen=True)
class FlowMatching(Objective):
  """Straight paths z_t = (1 - t) z_0 + t noise; velocity is predicted.

  t = 0 is data and t = 1 is noise, as in the text of SiT (arXiv 2401.08740; its
  code counts the other way). The target is dz/dt = noise - z_0, the loss its
  mean squared error.

  Attributes:
    logit_normal: mean and standard deviation of logit(t) in training (SANA: 0
      and 1); None draws t uniformly from (0, 1), as SiT does.
    shift: moves the times of training and of the fixed-step samplers towards
      noise: t becomes shift t / (1 + (shift - 1) t) (arXiv 2403.03206, section
      5.3.2; SANA: 3).
    convention: of the network: "flow", which sees 1000 t and gives dz/dt, or
      that of SiT's code, "sit", which sees 1 - t and gives -dz/dt (released
      USiTs).
  """

  logit_normal: tuple[float, float] | None = None
  shift: float = 1.0
  convention: str = "flow"

  def __post_init__(self):
    if self.convention not in ("flow", "sit"):
      raise errors.UserError(
        f"unknown convention {self.convention!r} of a flow; known are flow, sit"
      )
    if not 0 < self.shift <= 1000:
      raise errors.UserError(
        f"shift {self.shift} is not above 0 and at most 1000; 1 shifts nothing"
      )
    if self.logit_normal is not None and not self.logit_normal[1] > 0:
      raise errors.UserError(
        f"logit_normal {self.logit_normal} is no mean and positive standard "
        "deviation; None draws times uniformly"
      )

  def alpha(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
    return 1 - t

  def sigma(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
    return t

  def model_time(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
    """What the network sees: 1000 t, or 1 - t by SiT's convention."""
    t = t.astype(jnp.float32)
    return 1 - t if self.convention == "sit" else 1000 * t

  def _velocity(self, output: Output) -> Output:
    """dz/dt."""
    return -output if self.convention == "sit" else output

  def shifted(self, t: Array | np.ndarray) -> Array | np.ndarray:
    """t in [0, 1] moved by `shift`; the ends stay."""
    return self.shift * t / (1 + (self.shift - 1) * t)

  def sample_times(self, key: Array, b: int) -> Float[Array, " b"]:
    """Random times in (0, 1)."""
    if self.logit_normal is None:
      tiny = jnp.finfo(jnp.float32).tiny
      return self.shifted(jax.random.uniform(key, (b,), minval=tiny))
    mean, deviation = self.logit_normal
    logits = mean + deviation * jax.random.normal(key, (b,))
    return self.shifted(jax.nn.sigmoid(logits))

  def predict(
    self, output: Output, z: Latents, t: Float[Array, " b"]
  ) -> Prediction:
    velocity = self._velocity(output)
    epsilon = z + _spread(1 - t) * velocity
    return Prediction(
      z_0=z - _spread(t) * velocity,
      epsilon=epsilon,
      velocity=velocity,
      score=-epsilon / _spread(t),
    )

  def _terms(self, output, z, noise, t):
    return {"mse": jnp.square(self._velocity(output) - (noise - z))}


def improved_ddpm() -> NoisePrediction:
  """DiT's objective: linear betas, learned variance (arXiv 2212.09748)."""
  return NoisePrediction(learned_variance=True)


def scaled_linear() -> NoisePrediction:
  """The objective of DC-AE's UViT: latent diffusion's betas."""
  return NoisePrediction(0.00085, 0.012, "scaled_linear")


def interpolate_log_variance(
  interpolation: Float[Array, "b h w c"],
  lower: Float[Array, "..."],
  upper: Float[Array, "..."],
) -> Float[Array, "b h w c"]:
  """Between `lower` at -1 and `upper` at 1 (arXiv 2102.09672, equation 15)."""
  fraction = (interpolation + 1) / 2
  return fraction * upper + (1 - fraction) * lower


def network_output(
  objective: Objective, model_fn: ModelFunction, z: Latents, t: Num[Array, " b"]
) -> Output:
  """The network's output at (z, t) as float32.

  Raises:
    UserError: it has the wrong shape.
  """
  output = model_fn(z, objective.model_time(t))
  channels = z.shape[-1]
  expected = (*z.shape[:-1], objective.output_channels(channels))
  if output.shape != expected:
    raise errors.UserError(
      f"the network's output has shape {output.shape} at latents of {z.shape}; "
      f"{objective} needs {expected}: give the network {expected[-1]} output "
      "channels"
    )
  return output.astype(jnp.float32)


def _spread(values: Float[Array, " b"]) -> Float[Array, "b 1 1 1"]:
  return values[:, None, None, None]


def _mean(values: Latents, mask: Mask | None) -> Float[Array, " b"]:
  """The mean of each example, over the channels that the mask keeps."""
  values = jnp.mean(values, (1, 2))
  if mask is None:
    return jnp.mean(values, 1)
  mask = mask[:, 0, 0]
  return jnp.sum(values * mask, 1) / jnp.sum(mask, 1)


def random_channel_mask(
  key: Array, b: int, channels: int, candidates: Sequence[int]
) -> Mask:
  """Masks for augmented training (DC-AE 1.5, arXiv 2508.00413).

  Each example keeps its leading c' channels, c' drawn uniformly from the
  candidates. In `loss`, the mask zeroes the trailing channels of the noisy
  latents and leaves those of the target out, in a mean over c' channels: what
  the released networks do by cutting their first and last layer to c' channels.

  Raises:
    UserError: no candidates, or one that is not 1 to `channels`.
  """
  if not candidates or not all(
    type(c) is int and 1 <= c <= channels for c in candidates
  ):
    raise errors.UserError(
      f"candidate channel numbers {tuple(candidates)} are not whole numbers "
      f"from 1 to {channels}, at least one of them"
    )
  kept = jax.random.choice(key, jnp.asarray(tuple(candidates)), (b, 1, 1, 1))
  return (jnp.arange(channels)[None, None, None] < kept).astype(jnp.float32)
