"""Samplers against diffusers' schedulers, with one noise function and noise."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm

from dcae_jax.diffusion import objectives, samplers

KEY = jax.random.key(0)
SHAPE = (2, 3, 3, 4)
Z = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def _epsilon(z, t):
  """Of both libraries: t is a number or [b, 1, 1, 1]."""
  return 0.4 * z + 0.3 * z / (1 + z * z) + 0.1 * (t / 1000)


def _model_fn(z, t):
  return _epsilon(z, t[:, None, None, None])


def _noise(index):
  """What our samplers draw at a step."""
  noise = jax.random.normal(jax.random.fold_in(KEY, index), SHAPE)
  return torch.from_numpy(np.array(noise))


def _betas(objective):
  return {
    "num_train_timesteps": 1000,
    "beta_start": objective.first_beta,
    "beta_end": objective.last_beta,
    "beta_schedule": objective.spacing,
  }


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim_equals_diffusers(eta):
  objective, steps = objectives.scaled_linear(), 10
  scheduler = diffusers.DDIMScheduler(
    **_betas(objective),
    clip_sample=False,
    set_alpha_to_one=True,
    timestep_spacing="linspace",
  )
  scheduler.set_timesteps(steps)
  # Its steps are 1000 // n long, its times 111 apart: 9 makes both equal.
  scheduler.num_inference_steps = 9
  expected = torch.from_numpy(Z)
  for index, t in enumerate(scheduler.timesteps):
    expected = scheduler.step(
      _epsilon(expected, float(t)),
      t,
      expected,
      eta=eta,
      variance_noise=_noise(index) if eta else None,
    ).prev_sample
  found = samplers.DDIM(eta).sample(
    objective, _model_fn, KEY, jnp.asarray(Z), steps
  )
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("steps", [25, 250])
@pytest.mark.parametrize("learned", [True, False])
def test_ddpm_equals_diffusers(steps, learned, monkeypatch):
  objective = objectives.NoisePrediction(learned_variance=learned)
  scheduler = diffusers.DDPMScheduler(
    **_betas(objective),
    variance_type="learned_range" if learned else "fixed_small",
    clip_sample=False,
    timestep_spacing="linspace",
  )
  scheduler.set_timesteps(steps)
  expected = torch.from_numpy(Z)
  for index, t in enumerate(scheduler.timesteps):
    monkeypatch.setattr(
      scheduling_ddpm, "randn_tensor", lambda *_, i=index, **__: _noise(i)
    )
    output = _epsilon(expected, float(t))
    if learned:
      # Torch's channels are the second axis, where it splits them.
      output = torch.cat([output, torch.sin(expected)], 1)
    expected = scheduler.step(output, t, expected).prev_sample

  def model_fn(z, t):
    output = _model_fn(z, t)
    return jnp.concatenate([output, jnp.sin(z)], -1) if learned else output

  found = samplers.DDPM().sample(
    objective, model_fn, KEY, jnp.asarray(Z), steps
  )
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers
@pytest.mark.parametrize("steps", [5, 30])
def test_dpm_solver_equals_diffusers(steps):
  objective = objectives.scaled_linear()
  scheduler = diffusers.DPMSolverMultistepScheduler(
    **_betas(objective),
    algorithm_type="dpmsolver++",
    solver_order=2,
    solver_type="midpoint",
    use_lu_lambdas=True,  # equal steps of log(alpha / sigma)
    final_sigmas_type="zero",
    lower_order_final=True,
    thresholding=False,
  )
  scheduler.set_timesteps(steps)
  times = []

  def model_fn(z, t):
    times.append(float(t[0]))
    return _model_fn(z, t)

  with jax.disable_jit():
    found = samplers.DPMSolver().sample(
      objective, model_fn, KEY, jnp.asarray(Z), steps
    )
  # It gives a network rounded times, found by log(sigma); its steps are exact.
  np.testing.assert_allclose(times, scheduler.timesteps, atol=0.6)
  expected = torch.from_numpy(Z)
  for t, ours in zip(scheduler.timesteps, times, strict=True):
    expected = scheduler.step(_epsilon(expected, ours), t, expected).prev_sample
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_equals_diffusers(shift):
  steps = 12
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
  times = np.linspace(1, 0, steps + 1)[:-1]
  times = shift * times / (1 + (shift - 1) * times)
  scheduler.set_timesteps(sigmas=list(times))
  expected = torch.from_numpy(Z)
  for t in scheduler.timesteps:
    output = _epsilon(expected, float(t))
    expected = scheduler.step(output, t, expected).prev_sample
  found = samplers.Euler().sample(
    objectives.FlowMatching(shift=shift), _model_fn, KEY, jnp.asarray(Z), steps
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers
@pytest.mark.parametrize("steps", [9, 27])  # both are even steps of 0 to 999
def test_dpm_solver_at_equal_times_equals_diffusers(steps):
  objective = objectives.improved_ddpm()
  scheduler = diffusers.DPMSolverMultistepScheduler(
    **_betas(objective),
    algorithm_type="dpmsolver++",
    solver_order=2,
    solver_type="midpoint",
    timestep_spacing="linspace",
    final_sigmas_type="sigma_min",  # the first time
    lower_order_final=True,
  )
  scheduler.set_timesteps(steps)
  expected = torch.from_numpy(Z)
  for t in scheduler.timesteps:
    expected = scheduler.step(
      _epsilon(expected, float(t)), t, expected
    ).prev_sample

  def with_variance(z, t):
    return jnp.concatenate([_model_fn(z, t), 100 + 0 * z], -1)

  found = samplers.TimeDPMSolver().sample(
    objective, with_variance, KEY, jnp.asarray(Z), steps
  )
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers
@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_dpm_solver_equals_diffusers(steps, shift):
  """At every step: the network is called with the same latents."""
  scheduler = diffusers.DPMSolverMultistepScheduler(
    prediction_type="flow_prediction",
    use_flow_sigmas=True,
    flow_shift=shift,
    algorithm_type="dpmsolver++",
    solver_order=2,
  )
  scheduler.set_timesteps(steps)
  inputs, times = [], []

  def model_fn(z, t):
    inputs.append(np.asarray(z))
    times.append(float(t[0]))
    return _model_fn(z, t)

  with jax.disable_jit():
    found = samplers.FlowDPMSolver().sample(
      objectives.FlowMatching(shift=shift),
      model_fn,
      KEY,
      jnp.asarray(Z),
      steps,
    )
  # It gives a network whole times, rounded down; its steps are exact.
  np.testing.assert_array_equal(np.floor(times), scheduler.timesteps)
  expected = torch.from_numpy(Z)
  for t, ours, z in zip(scheduler.timesteps, times, inputs, strict=True):
    np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-4)
    expected = scheduler.step(_epsilon(expected, ours), t, expected).prev_sample
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
