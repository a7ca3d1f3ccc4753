"""Samplers, given exact networks of mixtures of Gaussians, reach the data."""

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest
from scipy import integrate

from dcae_jax.diffusion import guidance, objectives, samplers

KEY = jax.random.key(0)
DDPM = objectives.improved_ddpm()
SCALED = objectives.scaled_linear()
FLOW = objectives.FlowMatching()
DEVIATIONS = np.array([[1.3, -0.6], [-0.2, 0.9]])


def _sample(sampler, objective, model_fn, z, steps, key=KEY):
  run = jax.jit(
    lambda key, z: sampler.sample(objective, model_fn, key, z, steps)
  )
  return np.asarray(run(key, z), np.float64)


def _noise(mixture, objective, n):
  """Of the exact density at the last time, which is not quite white."""
  if objective is FLOW:
    return mixture.sample_noisy(5, n, 0.0, 1.0)
  table = mixtures.LINEAR if objective is DDPM else mixtures.SCALED_LINEAR
  return mixture.sample_noisy(5, n, table[-1] ** 0.5, (1 - table[-1]) ** 0.5)


def _with_variance(model_fn, interpolation):
  """A network that also gives interpolation(t)."""

  def with_variance(z, t):
    v = interpolation(t)[:, None, None] + jnp.zeros_like(z)
    return jnp.concatenate([model_fn(z, t), v], -1)

  return with_variance


MIXTURE = mixtures.two_components()
VELOCITY = mixtures.velocity_function(MIXTURE)
LINEAR_NOISE = _with_variance(
  mixtures.noise_function(MIXTURE, mixtures.LINEAR), lambda t: 0 * t[:, None]
)
SCALED_NOISE = mixtures.noise_function(MIXTURE, mixtures.SCALED_LINEAR)


@pytest.mark.parametrize(
  "sampler, objective, model_fn, steps",
  [
    (samplers.DDPM(), DDPM, LINEAR_NOISE, 250),
    (samplers.DDIM(), DDPM, LINEAR_NOISE, 250),
    (samplers.DDIM(eta=0.5), SCALED, SCALED_NOISE, 250),
    (samplers.DPMSolver(), SCALED, SCALED_NOISE, 30),
    (samplers.DPMSolver(), DDPM, LINEAR_NOISE, 30),
    (samplers.TimeDPMSolver(), DDPM, LINEAR_NOISE, 60),
    (samplers.Euler(), FLOW, VELOCITY, 250),
    (samplers.Heun(), FLOW, VELOCITY, 40),
    (samplers.Dopri5(), FLOW, VELOCITY, 200),
    (samplers.FlowDPMSolver(), FLOW, VELOCITY, 60),
  ],
  ids=lambda x: type(x).__name__ if hasattr(x, "sample") else None,
)
def test_samples_have_the_mean_and_covariance_of_the_data(
  sampler, objective, model_fn, steps
):
  n = 5_000
  z = _sample(
    sampler, objective, model_fn, _noise(MIXTURE, objective, n), steps
  )
  z = z[:, 0, 0]
  centred = z - z.mean(0)
  products = centred[:, :, None] * centred[:, None]
  # Four standard errors, and 0.01 for the steps.
  error = z.std(0) / n**0.5
  np.testing.assert_array_less(
    np.abs(z.mean(0) - MIXTURE.mean), 4 * error + 0.01
  )
  error = products.std(0) / n**0.5
  np.testing.assert_array_less(
    np.abs(products.mean(0) - MIXTURE.covariance), 4 * error + 0.01
  )


def _deterministic(objective, alpha, sigma):
  """Points of the probability flow of one Gaussian at alpha and sigma."""
  mean, variance = np.array([0.5, -0.3]), np.array([0.25, 0.6])
  deviation = np.sqrt(alpha**2 * variance + sigma**2)
  return (alpha * mean + deviation * DEVIATIONS)[:, None, None]


def _errors(sampler, objective, model_fn, steps, start, end):
  start = jnp.asarray(start, jnp.float32)
  return np.array(
    [
      np.abs(_sample(sampler, objective, model_fn, start, n) - end).max()
      for n in steps
    ]
  )


def _orders(errors):
  return np.log2(errors[:-1] / errors[1:])


@pytest.mark.parametrize(
  "sampler, order, steps",
  [(samplers.Euler(), 1, (16, 32, 64)), (samplers.Heun(), 2, (16, 32, 64))],
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_samplers_converge_at_their_order(sampler, order, steps, shift):
  objective = objectives.FlowMatching(shift=shift)
  errors = _errors(
    sampler,
    objective,
    mixtures.velocity_function(mixtures.gaussian()),
    steps,
    _deterministic(objective, 0.0, 1.0),
    _deterministic(objective, 1.0, 0.0),
  )
  np.testing.assert_allclose(_orders(errors), order, atol=0.2)
  assert errors[-1] < 0.04 / order**4


def test_dopri5_is_within_its_tolerances():
  model_fn = mixtures.velocity_function(mixtures.gaussian())
  start, end = (
    _deterministic(FLOW, *levels) for levels in ((0.0, 1.0), (1.0, 0.0))
  )
  for rtol, steps in ((1e-3, 15), (1e-5, 30)):
    sampler = samplers.Dopri5(rtol=rtol)
    (error,) = _errors(sampler, FLOW, model_fn, (steps,), start, end)
    assert error < 3 * rtol


@pytest.mark.parametrize("rtol", [1e-2, 1e-3])
def test_dopri5_tries_as_many_steps_as_scipy(rtol):
  """Of the same pair, norm and control."""
  model_fn = jax.jit(VELOCITY)
  start = _noise(MIXTURE, FLOW, 16)

  def slope(t, z):
    z = jnp.asarray(z.reshape(start.shape), jnp.float32)
    return np.asarray(model_fn(z, jnp.full(16, 1000 * t))).ravel()

  theirs = integrate.solve_ivp(
    slope, (1, 0), np.ravel(start), first_step=0.01, rtol=rtol, atol=1e-6
  )
  tried = (theirs.nfev - 1) // 6
  sampler = samplers.Dopri5(rtol=rtol)
  found = _sample(sampler, FLOW, model_fn, start, tried)
  np.testing.assert_allclose(found.ravel(), theirs.y[:, -1], atol=rtol)
  found = _sample(sampler, FLOW, model_fn, start, tried - 1)
  assert np.isnan(found).all()


def test_dopri5_rejects_steps_that_are_too_long():
  """A bend that the first steps, ten times longer each, cannot foresee."""
  bend = lambda t: 8.0 * jnp.exp(-(((t / 1000 - 0.5) / 0.1) ** 2))
  model_fn = lambda z, t: bend(t)[:, None, None, None] + 0 * z
  z = jnp.zeros((1, 1, 1, 1))
  found = _sample(samplers.Dopri5(), FLOW, model_fn, z, 100)
  np.testing.assert_allclose(found.ravel(), -0.8 * np.pi**0.5, rtol=5e-3)


def test_dopri5_gives_nan_where_the_network_does():
  model_fn = lambda z, t: z * jnp.nan
  found = _sample(samplers.Dopri5(), FLOW, model_fn, jnp.ones((1, 1, 1, 1)), 9)
  assert np.isnan(found).all()


def test_ddim_converges_at_first_order():
  objective, table = SCALED, mixtures.SCALED_LINEAR
  alpha = table**0.5
  errors = _errors(
    samplers.DDIM(),
    objective,
    mixtures.noise_function(mixtures.gaussian(), table),
    (28, 55, 112),  # nearly even steps of 37, 18.5 and 9
    _deterministic(objective, alpha[-1], (1 - table[-1]) ** 0.5),
    _deterministic(objective, 1.0, 0.0),
  )
  np.testing.assert_allclose(_orders(errors), 1, atol=0.2)
  assert errors[-1] < 0.02


def test_dpm_solver_converges_at_second_order():
  """To the flow's value at the first time, of which z_0 is taken."""
  mixture, table = mixtures.gaussian(), mixtures.SCALED_LINEAR
  alpha, sigma = table**0.5, (1 - table) ** 0.5
  first = jnp.asarray(_deterministic(SCALED, alpha[0], sigma[0]), jnp.float32)
  levels = (jnp.full(2, x, jnp.float32) for x in (alpha[0], sigma[0]))
  end, _ = mixture.expectations(first, *levels)
  errors = _errors(
    samplers.DPMSolver(),
    SCALED,
    mixtures.noise_function(mixture, table),
    (11, 21, 41, 81),
    _deterministic(SCALED, alpha[-1], sigma[-1]),
    np.asarray(end, np.float64),
  )
  np.testing.assert_allclose(_orders(errors), 2, atol=0.3)
  # z_0 at the first time is the flow's end but for what noise is left there.
  np.testing.assert_allclose(end, _deterministic(SCALED, 1.0, 0.0), atol=3e-3)


def _check_second_order(errors):
  """But for a logarithm: the last steps are long in log(alpha / sigma)."""
  orders = _orders(errors)
  assert (orders > 1.5).all() and (orders < 2.2).all()
  assert errors[-1] < 1e-3


def test_dpm_solver_at_equal_times_converges_at_second_order():
  """To the flow's value at the first time, its result."""
  table = mixtures.SCALED_LINEAR
  alpha, sigma = table**0.5, (1 - table) ** 0.5
  errors = _errors(
    samplers.TimeDPMSolver(),
    SCALED,
    mixtures.noise_function(mixtures.gaussian(), table),
    (160, 320, 640),
    _deterministic(SCALED, alpha[-1], sigma[-1]),
    _deterministic(SCALED, alpha[0], sigma[0]),
  )
  _check_second_order(errors)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_dpm_solver_converges_at_second_order(shift):
  objective = objectives.FlowMatching(shift=shift)
  (first,) = objective.shifted(np.array([0.999]))
  errors = _errors(
    samplers.FlowDPMSolver(),
    objective,
    mixtures.velocity_function(mixtures.gaussian()),
    (160, 320, 640),
    _deterministic(objective, 1 - first, first),
    _deterministic(objective, 1.0, 0.0),
  )
  _check_second_order(errors)


@pytest.mark.parametrize("steps", [1, 5, 14, 15, 20])
def test_dpm_solver_at_equal_times_has_the_steps_of_pixart(steps):
  """Of its formulas, in float64: continuous times from 1 to 1/1000."""
  epsilon = lambda z, t: 0.4 * z + 0.3 * z / (1 + z * z) + 1e-4 * t
  log_alpha = np.log(1 - np.linspace(1e-4, 0.02, 1000)).cumsum() / 2
  times = np.linspace(1, 1 / 1000, steps + 1)
  alpha = np.exp(np.interp(times, np.arange(1, 1001) / 1000, log_alpha))
  sigma = np.sqrt(1 - alpha**2)
  half_log_snr = np.log(alpha / sigma)
  x, clean = np.random.default_rng(0).normal(size=(2, 3, 3, 4)), []
  start = jnp.asarray(x, jnp.float32)
  for i in range(steps):
    predicted = epsilon(x, (times[i] - 1 / 1000) * 1000)
    clean.append((x - sigma[i] * predicted) / alpha[i])
    h, d_0, d_1 = half_log_snr[i + 1] - half_log_snr[i], clean[-1], 0.0
    if i > 0 and (i < steps - 1 or steps >= 15):
      before = half_log_snr[i] - half_log_snr[i - 1]
      d_1 = (clean[-1] - clean[-2]) * h / before
    x = sigma[i + 1] / sigma[i] * x
    x = x - alpha[i + 1] * np.expm1(-h) * (d_0 + d_1 / 2)
  model_fn = _with_variance(
    lambda z, t: epsilon(z, t[:, None, None, None]), lambda t: 100 + t[:, None]
  )
  found = _sample(samplers.TimeDPMSolver(), DDPM, model_fn, start, steps)
  np.testing.assert_allclose(found, x, rtol=1e-3, atol=1e-4)


def test_ddpm_with_the_best_variance_is_exact_at_any_number_of_steps():
  """Of one Gaussian, whose reverse steps are Gaussian: of known variance."""
  variances, n = np.array([0.25, 0.6]), 20_000
  mixture = mixtures.gaussian((0.0, 0.0), variances)
  for steps in (5, 20):
    times = DDPM.chain(steps).times
    now = mixtures.LINEAR[times]
    before = np.append(1.0, now[:-1])
    beta = (1 - now / before)[:, None]
    now, before = now[:, None], before[:, None]
    lower = beta * (1 - before) / (1 - now)
    # Var(z_s | z_t) is that at known z_0, and what z_0 varies.
    unknown = variances * (1 - now) / (now * variances + 1 - now)
    best = lower + (np.sqrt(before) * beta / (1 - now)) ** 2 * unknown
    lower[0] = lower[1]  # the first time takes no noise
    fraction = np.log(best / lower) / np.log(beta / lower)
    table = np.zeros((1000, 2), np.float32)
    table[times] = 2 * fraction - 1
    assert (table[times[1:]] > -1).all() and (table[times[1:]] < 1).all()
    model_fn = _with_variance(
      mixtures.noise_function(mixture, mixtures.LINEAR),
      lambda t, table=table: jnp.asarray(table)[t.astype(int)],
    )
    z = _sample(
      samplers.DDPM(), DDPM, model_fn, _noise(mixture, DDPM, n), steps
    )[:, 0, 0]
    # All but the last step are exact; it gives E[z_0 | z].
    last = variances**2 * now[0] / (now[0] * variances + 1 - now[0])
    np.testing.assert_allclose(z.var(0), last, rtol=4 * (2 / n) ** 0.5)
    assert (np.abs(z.mean(0)) < 4 * (variances / n) ** 0.5).all()


def test_ddpm_variance_approaches_the_data_as_steps_grow():
  """With the posterior's variance it is too small, by a known amount."""
  variances, n = np.array([0.25, 0.6]), 10_000
  mixture = mixtures.gaussian((0.0, 0.0), variances)
  model_fn = mixtures.noise_function(mixture, mixtures.SCALED_LINEAR)

  def expected(steps):
    times = np.round(np.linspace(0, 999, steps)).astype(int)
    levels = np.append(1.0, mixtures.SCALED_LINEAR[times])
    variance = levels[-1] * variances + 1 - levels[-1]
    for now, before in zip(levels[:0:-1], levels[-2::-1], strict=True):
      # z_s at known z_t and z_0, and z_0 the expected one, linear in z_t.
      beta = 1 - now / before
      clean = np.sqrt(now) * variances / (now * variances + 1 - now)
      slope = np.sqrt(before) * beta / (1 - now) * clean
      slope += np.sqrt(1 - beta) * (1 - before) / (1 - now)
      variance = slope**2 * variance + beta * (1 - before) / (1 - now)
    return variance

  for steps in (20, 200):
    start = _noise(mixture, SCALED, n)
    z = _sample(samplers.DDPM(), SCALED, model_fn, start, steps)[:, 0, 0]
    np.testing.assert_allclose(
      z.var(0), expected(steps), rtol=4 * (2 / n) ** 0.5
    )
  assert (expected(20) < 0.8 * variances).all()
  np.testing.assert_allclose(expected(200), variances, rtol=0.08)
  np.testing.assert_allclose(expected(1000), variances, rtol=0.02)


def test_ddim_with_eta_one_is_ddpm_with_the_posterior_variance():
  z = _noise(MIXTURE, SCALED, 8)
  ddpm, ddim, half = (
    _sample(sampler, SCALED, SCALED_NOISE, z, 10)
    for sampler in (samplers.DDPM(), samplers.DDIM(1.0), samplers.DDIM(0.5))
  )
  # The same key and order of steps: the same noise.
  np.testing.assert_allclose(ddim, ddpm, atol=1e-4)
  assert np.abs(half - ddim).max() > 0.01


def test_noise_differs_by_key_step_and_place():
  """DDPM from a network that sees none leaves its noise to be compared."""
  z = jnp.zeros((3, 4, 4, 2))
  model_fn = lambda z, t: 0 * z
  first, again, other = (
    _sample(samplers.DDPM(), SCALED, model_fn, z, 3, jax.random.key(i))
    for i in (1, 1, 2)
  )
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).min() > 0
  assert len(np.unique(first)) == first.size


ALL = [
  (samplers.DDPM(), SCALED),
  (samplers.DDIM(), SCALED),
  (samplers.DPMSolver(), SCALED),
  (samplers.TimeDPMSolver(), SCALED),
  (samplers.Euler(), FLOW),
  (samplers.Heun(), FLOW),
  (samplers.Dopri5(), FLOW),
  (samplers.FlowDPMSolver(), FLOW),
]
NAMES = [type(sampler).__name__ for sampler, _ in ALL]


@pytest.mark.parametrize("sampler, objective", ALL, ids=NAMES)
def test_the_network_is_compiled_once_not_once_a_step(sampler, objective):
  calls = []

  def model_fn(z, t):
    calls.append((z.dtype, t.dtype))
    return (0.1 * z).astype(jnp.bfloat16)

  def run(key, z):
    return sampler.sample(objective, model_fn, key, z, 100)

  z = jax.eval_shape(run, KEY, jnp.zeros((2, 4, 4, 3), jnp.bfloat16))
  assert z.shape == (2, 4, 4, 3) and z.dtype == jnp.float32
  assert len(calls) <= 2
  assert set(calls) == {(jnp.dtype("float32"), jnp.dtype("float32"))}


@pytest.mark.parametrize("sampler, objective", ALL, ids=NAMES)
def test_the_least_steps_suffice_and_fewer_are_an_error(sampler, objective):
  def model_fn(z, t):
    return 0.1 * z

  z = jnp.ones((1, 2, 2, 1))
  found = _sample(sampler, objective, model_fn, z, sampler.least_steps)
  assert np.isfinite(found).all()

  def untouched(z, t):
    raise AssertionError("traced before the check")

  with pytest.raises(ValueError, match=f"at least {sampler.least_steps}"):
    sampler.sample(objective, untouched, KEY, z, sampler.least_steps - 1)
  other = FLOW if objective is SCALED else DDPM
  fitting = {
    FLOW: "Euler, Heun, Dopri5, FlowDPMSolver",
    DDPM: "DDPM, DDIM, DPMSolver, TimeDPMSolver",
  }[other]
  with pytest.raises(ValueError, match=f"{fitting} do"):
    sampler.sample(other, untouched, KEY, z, 100)
  if objective is SCALED:
    with pytest.raises(ValueError, match="more than the 1000"):
      sampler.sample(objective, untouched, KEY, z, 1001)


@pytest.mark.parametrize(
  "create, message",
  [
    (lambda: samplers.DDIM(eta=1.5), "eta 1.5 is not 0"),
    (lambda: samplers.Dopri5(atol=0.0), "atol 0.0 is not positive"),
    (lambda: samplers.Dopri5(rtol=-1.0), "rtol -1.0 negative"),
  ],
)
def test_settings_out_of_range_are_errors(create, message):
  with pytest.raises(ValueError, match=message):
    create()


def test_guided_sampling_reaches_the_sharpened_gaussian():
  """Guidance in a flow of two Gaussians with one covariance shifts means.

  The conditional mean is m, the other's -m; velocities of equal covariances
  are linear in the mean, so that scale s gives the flow of mean (2s - 1) m.
  """
  mean = np.array([0.5, -0.3])
  networks = [
    mixtures.velocity_function(mixtures.gaussian(sign * mean))
    for sign in (1, -1)
  ]

  def network(z, t, labels):
    which = (labels == 3)[:, None, None, None]
    return jnp.where(which, networks[0](z, t), networks[1](z, t))

  labels = jnp.full(2, 3)
  model_fn = guidance.guided(network, labels, jnp.full(2, 10), 1.5)
  start = jnp.asarray(_deterministic(FLOW, 0.0, 1.0), jnp.float32)
  found = _sample(samplers.Heun(), FLOW, model_fn, start, 60)
  expected = _deterministic(FLOW, 1.0, 0.0) + mean
  np.testing.assert_allclose(found, expected, atol=2e-3)
