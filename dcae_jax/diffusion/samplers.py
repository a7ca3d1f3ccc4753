"""Samplers of latent diffusion: from noise to latents.

Each is a small value that can be used under `jax.jit`, with the objective, the
functions and the steps as constants; the network is compiled once or twice, not
once a step. Deterministic samplers leave the key alone.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dcae_jax import errors
from dcae_jax.diffusion import objectives

Latents = objectives.Latents
_MOST_STEPS = 10_000  # of flows, whose times are not counted: more is endless


class Process(NamedTuple):
  """What is reversed: an objective, the network that learned it, and a key."""

  objective: objectives.Objective
  model_fn: objectives.ModelFunction
  key: Array

  def predict(
    self, z: Latents, t: Float[Array, ""]
  ) -> tuple[Array, objectives.Prediction]:
    """The network's output at (z, t), and what it says about z."""
    t = jnp.full(len(z), t)
    output = objectives.network_output(self.objective, self.model_fn, z, t)
    return output, self.objective.predict(output, z, t)

  def velocity(self, z: Latents, t: Float[Array, ""]) -> Latents:
    return self.predict(z, t)[1].velocity

  def noise(self, index: Array, z: Latents) -> Latents:
    """That of a step, of z's shape."""
    return jax.random.normal(jax.random.fold_in(self.key, index), z.shape)


class Sampler(abc.ABC):
  """From noise to latents in a number of steps.

  Attributes:
    fits: the kind of objective whose networks it samples.
    least_steps: without which it cannot work.
    calls: of the network in a step.
  """

  fits: ClassVar[type]
  least_steps: ClassVar[int]
  calls: ClassVar[int] = 1

  def sample(
    self,
    objective: objectives.Objective,
    model_fn: objectives.ModelFunction,
    key: Array,
    z: Latents,
    steps: int,
  ) -> Latents:
    """z_0 in float32, from noise z at the last time.

    Raises UserError, before anything is compiled, for an objective or a number
    of steps that do not fit.
    """
    check(self, objective, steps)
    process = Process(objective, model_fn, key)
    return self._drawn(process, z.astype(jnp.float32), steps)

  @abc.abstractmethod
  def _drawn(self, process: Process, z: Latents, steps: int) -> Latents: ...


@dataclasses.dataclass(frozen=True)
class DDPM(Sampler):
  """Ancestral sampling (arXiv 2006.11239) through a respaced chain.

  DiT's 250 of 1000 steps. The variance is the learned one, or that of the
  forward chain's posterior. `steps` is 2 to the objective's `total_steps`.
  """

  fits, least_steps = objectives.NoisePrediction, 2

  def _drawn(self, process: Process, z: Latents, steps: int) -> Latents:
    chain = process.objective.chain(steps)
    tables = {
      "t": chain.times,
      "z_0": np.sqrt(chain.previous) * chain.betas / (1 - chain.alphas_cumprod),
      "z": np.sqrt(1 - chain.betas)
      * (1 - chain.previous)
      / (1 - chain.alphas_cumprod),
      "lower": chain.lower,
      "upper": chain.upper,
      "noisy": np.arange(steps) > 0,
    }

    def step(z, index, row):
      output, prediction = process.predict(z, row["t"])
      log_variance = row["lower"]
      if process.objective.learned_variance:
        log_variance = objectives.interpolate_log_variance(
          output[..., z.shape[-1] :], row["lower"], row["upper"]
        )
      noise = process.noise(index, z)
      mean = row["z_0"] * prediction.z_0 + row["z"] * z
      return mean + row["noisy"] * jnp.exp(log_variance / 2) * noise

    return _scan(step, z, tables, backwards=True)


@dataclasses.dataclass(frozen=True)
class DDIM(Sampler):
  """Implicit sampling (arXiv 2010.02502), equation 12, through the same chain.

  Attributes:
    eta: 0 is deterministic, 1 has the noise of ancestral sampling.
  """

  eta: float = 0.0
  fits, least_steps = objectives.NoisePrediction, 2

  def __post_init__(self):
    if not 0 <= self.eta <= 1:
      raise errors.UserError(
        f"eta {self.eta} is not 0 (deterministic) to 1 (ancestral)"
      )

  def _drawn(self, process: Process, z: Latents, steps: int) -> Latents:
    chain = process.objective.chain(steps)
    variance = chain.betas * (1 - chain.previous) / (1 - chain.alphas_cumprod)
    tables = {
      "t": chain.times,
      "z_0": np.sqrt(chain.previous),
      "epsilon": np.sqrt(1 - chain.previous - self.eta**2 * variance),
      "noise": self.eta * np.sqrt(variance),
    }

    def step(z, index, row):
      _, prediction = process.predict(z, row["t"])
      z = row["z_0"] * prediction.z_0 + row["epsilon"] * prediction.epsilon
      if self.eta == 0:
        return z
      return z + row["noise"] * process.noise(index, z)

    return _scan(step, z, tables, backwards=True)


@dataclasses.dataclass(frozen=True)
class DPMSolver(Sampler):
  """DPM-Solver++(2M) at equal steps of log(alpha / sigma), deterministic.

  The network is called from the last time to the first, both included, also at
  times between the discrete ones. The last call's z_0 is the result: the step
  from the first time to no noise. `steps` is the number of calls, 2 to the
  objective's `total_steps`.
  """

  fits, least_steps = objectives.NoisePrediction, 2

  def _drawn(self, process: Process, z: Latents, steps: int) -> Latents:
    table = np.log(process.objective.chain().alphas_cumprod) / 2
    ends = [a - np.log(-np.expm1(2 * a)) / 2 for a in (table[-1], table[0])]
    log_alpha = -np.log1p(np.exp(-2 * np.linspace(*ends, steps))) / 2
    alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    # np.interp wants ascending abscissae.
    t = np.interp(log_alpha, table[::-1], np.arange(len(table))[::-1])
    alpha, sigma = np.append(alpha, 1.0), np.append(sigma, 0.0)
    return _multistep(process, z, t, alpha, sigma, last_order=1)


@dataclasses.dataclass(frozen=True)
class TimeDPMSolver(Sampler):
  """DPM-Solver++(2M) at equal steps of time, PixArt's (arXiv 2310.00426).

  The result is z at the first time, with the little noise that is left there.
  `steps` is the number of calls, at most the objective's `total_steps`; of
  fewer than 15, the last is of first order.
  """

  fits, least_steps = objectives.NoisePrediction, 1

  def _drawn(self, process: Process, z: Latents, steps: int) -> Latents:
    table = np.log(process.objective.chain().alphas_cumprod) / 2
    t = np.linspace(len(table) - 1, 0, steps + 1)
    log_alpha = np.interp(t, np.arange(len(table)), table)
    alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    last_order = 1 if steps < 15 else 2
    return _multistep(process, z, t[:-1], alpha, sigma, last_order)


@dataclasses.dataclass(frozen=True)
class FlowDPMSolver(Sampler):
  """DPM-Solver++(2M) of a flow, SANA's (arXiv 2410.10629).

  The network is called at equal times from 0.999, shifted as in training, for
  log(alpha / sigma) is infinite at 1; the last step, to 0, is of first order.
  """

  fits, least_steps = objectives.FlowMatching, 1

  def _drawn(self, process: Process, z: Latents, steps: int) -> Latents:
    sigma = process.objective.shifted(np.linspace(0.999, 0, steps + 1))
    return _multistep(process, z, sigma[:-1], 1 - sigma, sigma, last_order=1)


def _multistep(
  process: Process,
  z: Latents,
  t: np.ndarray,
  alpha: np.ndarray,
  sigma: np.ndarray,
  last_order: int,
) -> Latents:
  """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), deterministic.

  Steps from each of the times t [n] are to the next of the levels [n + 1] of
  signal and noise. The first step is of first order.
  """
  decay = sigma[1:] / sigma[:-1] * alpha[:-1] / alpha[1:]
  # The last step may be to no noise: infinitely long, and of first order.
  second = len(t) if last_order == 2 else len(t) - 1
  lengths = -np.log(decay[:second])
  previous = np.zeros(len(t))
  previous[1:second] = lengths[1:] / lengths[:-1] / 2
  tables = {
    "t": t,
    "z": sigma[1:] / sigma[:-1],
    "z_0": alpha[1:] * (1 - decay),
    "previous": previous,
  }

  def step(carry, index, row):
    z, previous = carry
    _, prediction = process.predict(z, row["t"])
    z_0 = prediction.z_0
    extrapolated = z_0 + row["previous"] * (z_0 - previous)
    return row["z"] * z + row["z_0"] * extrapolated, z_0

  return _scan(step, (z, jnp.zeros_like(z)), tables)[0]


@dataclasses.dataclass(frozen=True)
class Euler(Sampler):
  """Euler's method on the velocity, at equal times, shifted as in training."""

  fits, least_steps = objectives.FlowMatching, 1

  def _drawn(self, process: Process, z: Latents, steps: int) -> Latents:
    def step(z, index, row):
      velocity = process.velocity(z, row["t"])
      return z + (row["next"] - row["t"]) * velocity

    return _scan(step, z, _times(process.objective, steps))


@dataclasses.dataclass(frozen=True)
class Heun(Sampler):
  """Heun's method (second order, two calls a step) at Euler's times."""

  fits, least_steps, calls = objectives.FlowMatching, 1, 2

  def _drawn(self, process: Process, z: Latents, steps: int) -> Latents:
    def step(z, index, row):
      size = row["next"] - row["t"]
      velocity = process.velocity(z, row["t"])
      guess = z + size * velocity
      velocity = velocity + process.velocity(guess, row["next"])
      return z + size / 2 * velocity

    return _scan(step, z, _times(process.objective, steps))


# Dormand and Prince, J. Comp. Appl. Math. 6 (1980). The last stage is at
# the new value, and is the first of the next step.
_STAGE_TIMES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_STAGES = (
  (0, 0, 0, 0, 0, 0, 0),
  (1 / 5, 0, 0, 0, 0, 0, 0),
  (3 / 40, 9 / 40, 0, 0, 0, 0, 0),
  (44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0),
  (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0),
  (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0),
  (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
)
_FOURTH_ORDER = (
  *(5179 / 57600, 0, 7571 / 16695, 393 / 640),
  *(-92097 / 339200, 187 / 2100, 1 / 40),
)
_FIRST_SIZE = 0.01


@dataclasses.dataclass(frozen=True)
class Dopri5(Sampler):
  """The adaptive method of Dormand and Prince, of order 5, on the velocity.

  One step size serves the whole batch. A step is accepted where the root mean
  square over all values of error / (atol + rtol |z|) is at most 1; the next is
  0.9 error^(-1/5) times as long, 0.2 to 10. `steps` is the most it may try,
  rejected ones included, six calls each; z_0 is all NaN where they do not
  suffice, or where the network gave NaN. Three are the least: the first step is
  0.01 long. The objective's shift has no part in it.
  """

  atol: float = 1e-6
  rtol: float = 1e-3
  fits, least_steps, calls = objectives.FlowMatching, 3, 6

  def __post_init__(self):
    if not (0 < self.atol < np.inf and 0 <= self.rtol < np.inf):
      raise errors.UserError(
        f"atol {self.atol} is not positive, rtol {self.rtol} negative, or one "
        "of them not finite"
      )

  def _drawn(self, process: Process, z: Latents, steps: int) -> Latents:
    stage_times, stages, fourth_order = (
      jnp.asarray(table, jnp.float32)
      for table in (_STAGE_TIMES, _STAGES, _FOURTH_ORDER)
    )
    combine = lambda weights, slopes: jnp.tensordot(
      weights, slopes, 1, precision="highest"
    )

    def unfinished(state):
      _, _, t, size, tried = state
      return (t > 0) & (tried < steps) & (size > 0)  # NaN ends it

    def step(state):
      z, slope, t, size, tried = state
      size = jnp.minimum(size, t)

      def stage(i, carry):
        slopes, _ = carry
        value = z - size * combine(stages[i], slopes)
        time = jnp.maximum(t - size * stage_times[i], 0)
        slope = process.velocity(value, time)
        return slopes.at[i].set(slope), value

      slopes = jnp.zeros((len(_STAGES), *z.shape)).at[0].set(slope)
      slopes, new = jax.lax.fori_loop(1, len(_STAGES), stage, (slopes, z))
      error = size * combine(stages[-1] - fourth_order, slopes)
      allowed = self.atol + self.rtol * jnp.maximum(jnp.abs(z), jnp.abs(new))
      error = jnp.sqrt(jnp.mean(jnp.square(error / allowed)))
      accepted = error <= 1
      left = jnp.where(size < t, t - size, 0.0)
      return (
        jnp.where(accepted, new, z),
        jnp.where(accepted, slopes[-1], slope),
        jnp.where(accepted, left, t),
        size * jnp.clip(0.9 * error**-0.2, 0.2, 10.0),
        tried + 1,
      )

    t = jnp.float32(1)
    slope = process.velocity(z, t)
    state = (z, slope, t, jnp.float32(_FIRST_SIZE), jnp.int32(0))
    z, _, t, _, _ = jax.lax.while_loop(unfinished, step, state)
    return jnp.where(t > 0, jnp.nan, z)


SAMPLERS = (
  *(DDPM, DDIM, DPMSolver, TimeDPMSolver),
  *(Euler, Heun, Dopri5, FlowDPMSolver),
)


def check(
  sampler: Sampler, objective: objectives.Objective, steps: int
) -> None:
  """Raises UserError for an objective or a number of steps that do not fit."""
  name = type(sampler).__name__
  if not isinstance(objective, sampler.fits):
    fitting = [
      other.__name__ for other in SAMPLERS if isinstance(objective, other.fits)
    ]
    raise errors.UserError(
      f"{name} does not sample {objective}; {', '.join(fitting)} do"
    )
  if steps < sampler.least_steps:
    raise errors.UserError(
      f"{steps} steps are too few for {name}; it needs at least "
      f"{sampler.least_steps}"
    )
  most = getattr(objective, "total_steps", _MOST_STEPS)
  if steps > most:
    raise errors.UserError(
      f"{steps} steps are more than the {most} of {objective}; {name} takes "
      f"{sampler.least_steps} to {most}"
    )


def _times(
  objective: objectives.FlowMatching, steps: int
) -> dict[str, np.ndarray]:
  times = objective.shifted(np.linspace(1, 0, steps + 1))
  return {"t": times[:-1], "next": times[1:]}


def _scan(
  step: Callable, carry, tables: dict[str, np.ndarray], backwards=False
):
  """step(carry, index, row) over the rows of the tables, in float32."""
  if backwards:
    tables = {name: table[::-1] for name, table in tables.items()}
  rows = {k: jnp.asarray(table, jnp.float32) for k, table in tables.items()}
  index = jnp.arange(len(next(iter(rows.values()))))
  carry, _ = jax.lax.scan(
    lambda carry, row: (step(carry, *row), None), carry, (index, rows)
  )
  return carry
