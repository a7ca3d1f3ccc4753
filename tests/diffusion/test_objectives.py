"""Losses and conversions against exact answers for mixtures of Gaussians."""

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest

from dcae_jax.diffusion import conditioning, guidance, objectives

KEY = jax.random.key(0)
DDPM = objectives.improved_ddpm()
SCALED = objectives.scaled_linear()
FLOW = objectives.FlowMatching()


def _with_variance(model_fn, interpolation=0.0):
  """Adds v to a network that gives noise alone."""

  def with_variance(z, t):
    epsilon = model_fn(z, t)
    return jnp.concatenate(
      [epsilon, jnp.full_like(epsilon, interpolation)], axis=-1
    )

  return with_variance


def _exact(objective, mixture):
  if objective is DDPM:
    return _with_variance(mixtures.noise_function(mixture, mixtures.LINEAR))
  if objective is SCALED:
    return mixtures.noise_function(mixture, mixtures.SCALED_LINEAR)
  return mixtures.velocity_function(mixture)


def _levels(objective, t):
  """alpha and sigma by the definitions; t is [b], as the objective counts."""
  if isinstance(objective, objectives.FlowMatching):
    return 1 - t, t
  table = mixtures.LINEAR if objective is DDPM else mixtures.SCALED_LINEAR
  return np.sqrt(table[t]), np.sqrt(1 - table[t])


def _predict(objective, mixture, z, t):
  """What the objective reads from the exact network."""
  model_fn = _exact(objective, mixture)

  def predict(z, t):
    return objective.predict(model_fn(z, objective.model_time(t)), z, t)

  return jax.jit(predict)(z, jnp.asarray(t))


OBJECTIVES = pytest.mark.parametrize(
  "objective", [DDPM, SCALED, FLOW], ids=["ddpm", "scaled", "flow"]
)


@OBJECTIVES
def test_alpha_and_sigma_are_those_of_the_process(objective):
  t = np.array([0, 1, 500, 998, 999])
  t = np.linspace(0, 1, 5, dtype=np.float32) if objective is FLOW else t
  for found, expected in zip(
    (objective.alpha(jnp.asarray(t)), objective.sigma(jnp.asarray(t))),
    _levels(objective, t),
    strict=True,
  ):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_between_times_log_alpha_is_linear():
  t = jnp.array([10.25])
  logs = np.log(mixtures.LINEAR[10:12]) / 2
  expected = 0.75 * logs[0] + 0.25 * logs[1]
  np.testing.assert_allclose(DDPM.alpha(t)[0], np.exp(expected), rtol=1e-6)


@pytest.mark.parametrize("steps", [2, 7, 250, 999, 1000])
@pytest.mark.parametrize(
  "objective, table",
  [(DDPM, mixtures.LINEAR), (SCALED, mixtures.SCALED_LINEAR)],
)
def test_respaced_betas_reproduce_alphas_cumprod(objective, table, steps):
  chain = objective.chain(steps)
  assert chain.times[0] == 0 and chain.times[-1] == 999
  assert len(chain.times) == steps and (np.diff(chain.times) > 0).all()
  found = np.cumprod(1 - chain.betas)
  np.testing.assert_allclose(found, table[chain.times], rtol=1e-9)


@OBJECTIVES
def test_conversions_equal_the_exact_quantities(objective):
  mixture = mixtures.two_components()
  t = np.array([3, 400, 999])
  if objective is FLOW:
    t = np.array([0.01, 0.4, 0.99], np.float32)
  alpha, sigma = (jnp.asarray(x, jnp.float32) for x in _levels(objective, t))
  z = mixture.sample(0, 3)
  found = _predict(objective, mixture, z, t)
  clean, noise = jax.jit(mixture.expectations)(z, alpha, sigma)
  np.testing.assert_allclose(found.z_0, clean, atol=2e-4)
  np.testing.assert_allclose(found.epsilon, noise, atol=2e-5)
  score = -noise / sigma[:, None, None, None]
  np.testing.assert_allclose(found.score, score, rtol=1e-4, atol=1e-4)


@OBJECTIVES
def test_score_is_the_gradient_of_the_density(objective):
  """Of one Gaussian, whose density needs no mixture."""
  mean, variance = np.array([0.5, -0.3]), np.array([0.25, 0.6])
  t = np.array([300], np.int32)
  t = np.array([0.3], np.float32) if objective is FLOW else t
  alpha, sigma = _levels(objective, t)
  z = jnp.array([0.2, 0.7])[None, None, None]
  mixture = mixtures.gaussian(mean, variance)
  found = _predict(objective, mixture, z, t).score[0, 0, 0]
  expected = (alpha * mean - z[0, 0, 0]) / (alpha**2 * variance + sigma**2)
  np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("objective", [DDPM, FLOW], ids=["ddpm", "flow"])
def test_velocity_is_the_derivative_of_the_probability_flow(objective):
  """Along it a Gaussian's z keeps its number of standard deviations."""
  variance = np.array([0.25, 0.6])
  times = np.array([400.25, 400.75])
  times = times / 1000 if objective is FLOW else times
  t = jnp.asarray(times, jnp.float32)
  alpha, sigma = (
    np.asarray(f(t), np.float64)[:, None]
    for f in (objective.alpha, objective.sigma)
  )
  deviation = np.sqrt(alpha**2 * variance + sigma**2)
  path = alpha * np.array([0.5, -0.3]) + deviation * np.array([1.3, -0.6])
  slope = (path[1] - path[0]) / (times[1] - times[0])
  middle = jnp.asarray(times.mean(keepdims=True), jnp.float32)
  z = jnp.asarray(path.mean(0, keepdims=True)[:, None, None], jnp.float32)
  found = _predict(objective, mixtures.gaussian(), z, middle).velocity[0, 0, 0]
  np.testing.assert_allclose(found, slope, rtol=2e-3)


def _squared_errors(objective, z, *model_fns):
  """Of each network at the same times and noise."""
  losses = jax.jit(
    lambda z: [
      objective.loss(model_fn, KEY, z)[1]["mse"] for model_fn in model_fns
    ]
  )(z)
  return [np.asarray(x, np.float64) for x in losses]


@OBJECTIVES
def test_expected_loss_of_the_exact_answer_is_the_closed_form(objective):
  """What remains is the variance of the target at known z: of one Gaussian."""
  variance = np.array([0.25, 0.6])
  t = np.arange(1000)
  t = (t + 0.5) / 1000 if objective is FLOW else t
  alpha, sigma = (x[:, None] for x in _levels(objective, t))
  total = alpha**2 * variance + sigma**2
  # Var(noise | z) = alpha^2 s^2 / total; the velocity is it over alpha.
  remaining = alpha**2 * variance / total
  if objective is FLOW:
    remaining = variance / total
  mixture = mixtures.gaussian()
  (losses,) = _squared_errors(
    objective, mixture.sample(0, 20_000), _exact(objective, mixture)
  )
  error = losses.std() / len(losses) ** 0.5
  assert abs(losses.mean() - remaining.mean()) < 4 * error
  assert error < 0.02 * remaining.mean()


@OBJECTIVES
def test_loss_is_minimal_at_the_exact_answer(objective):
  """A change of the answer costs its mean square, whatever it is."""
  mixture = mixtures.two_components()
  exact = _exact(objective, mixture)
  changes = (
    lambda z, t: jnp.full_like(z, 0.2),
    lambda z, t: 0.2 * z,
    lambda z, t: z * jnp.sin(t / 100)[:, None, None, None],
  )

  def changed(change):
    return lambda z, t: exact(z, t).at[..., :3].add(change(z, t))

  # The mean square of z_t's values and of the sine's, time by time.
  t = np.arange(1000)
  t = (t + 0.5) / 1000 if objective is FLOW else t
  alpha, sigma = _levels(objective, t)
  second = np.trace(mixture.covariance) + mixture.mean @ mixture.mean
  square = alpha**2 * second / 3 + sigma**2
  sine = np.sin(t * 10 if objective is FLOW else t / 100) ** 2
  expected = [0.04, 0.04 * square.mean(), (sine * square).mean()]

  z = mixture.sample(0, 20_000)
  base, *others = _squared_errors(
    objective, z, exact, *(changed(change) for change in changes)
  )
  for other, cost in zip(others, expected, strict=True):
    error = (other - base).std() / len(base) ** 0.5
    assert abs((other - base).mean() - cost) < 4 * error
    assert cost > 8 * error


def test_learned_variance_is_bounded_by_the_two_analytic_ones():
  lower, upper = jnp.float32(-7.0), jnp.float32(-5.0)
  v = jnp.array([-1.0, 0.0, 1.0])[:, None, None, None]
  found = objectives.interpolate_log_variance(v, lower, upper)[:, 0, 0, 0]
  np.testing.assert_allclose(found, [-7, -6, -5], rtol=1e-6)
  chain = DDPM.chain(250)
  before = np.append(1.0, mixtures.LINEAR[chain.times][:-1])
  betas = 1 - mixtures.LINEAR[chain.times] / before
  np.testing.assert_allclose(np.exp(chain.upper), betas, rtol=1e-9)
  posterior = betas * (1 - before) / (1 - mixtures.LINEAR[chain.times])
  np.testing.assert_allclose(np.exp(chain.lower[1:]), posterior[1:], rtol=1e-9)
  assert chain.lower[0] == chain.lower[1]


@pytest.mark.parametrize("v", [-1.0, 0.3, 1.0])
def test_variational_bound_is_the_divergence_of_two_gaussians(v):
  """Of the forward posterior and the reverse step, by numpy, in bits."""
  z = mixtures.two_components().sample(0, 64)
  seen = []

  def model_fn(z_t, t):
    seen.append((np.asarray(z_t), np.asarray(t)))
    return _with_variance(lambda z, t: 0.5 * z, v)(z_t, t)

  losses, metrics = DDPM.loss(model_fn, KEY, jnp.asarray(z))
  z_t, t = (np.float64(x) for x in seen[0])
  t = t.astype(int)
  table = np.append(1.0, mixtures.LINEAR)
  now, before = (table[i][:, None, None, None] for i in (t + 1, t))
  beta = 1 - now / before

  def mean(z_0):
    return (
      np.sqrt(before) * beta * z_0 + np.sqrt(1 - beta) * (1 - before) * z_t
    ) / (1 - now)

  guess = (z_t - np.sqrt(1 - now) * 0.5 * z_t) / np.sqrt(now)
  first = np.append(table, 0)[t + 2][:, None, None, None]  # at t = 0: of t = 1
  clipped = (1 - first / now) * (1 - now) / (1 - first)
  variance = np.where(
    t[:, None, None, None] == 0, clipped, beta * (1 - before) / (1 - now)
  )
  fraction = (v + 1) / 2
  other = np.exp(fraction * np.log(beta) + (1 - fraction) * np.log(variance))
  divergence = 0.5 * (
    np.log(other / variance)
    + (variance + (mean(z) - mean(guess)) ** 2) / other
    - 1
  )
  expected = divergence.mean((1, 2, 3)) / np.log(2)
  found = metrics["variational_bound"]
  np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5)
  np.testing.assert_allclose(losses, metrics["mse"] + found, rtol=1e-5)


def test_bound_of_the_first_time_is_finite_and_moves_the_variance():
  error, t = jnp.zeros((1, 1, 1, 2)), jnp.array([0])
  bound = lambda v: DDPM._step_divergence(error, v, t).sum()
  v = jnp.full((1, 1, 1, 2), -1.0)
  np.testing.assert_allclose(bound(v), 0, atol=1e-6)
  assert bound(v + 1) > 0.01
  assert jnp.all(jax.jit(jax.grad(bound))(v + 1) > 0)


def test_bound_gives_the_noise_no_gradient():
  z = jnp.asarray(mixtures.two_components().sample(0, 8))

  def terms(scale, name):
    model_fn = _with_variance(lambda z, t: scale * z, 0.1)
    return DDPM.loss(model_fn, KEY, z)[1][name].mean()

  gradient = jax.jit(jax.grad(terms), static_argnums=1)
  assert gradient(0.7, "variational_bound") == 0
  assert gradient(0.7, "mse") != 0


def test_times_cover_the_chain_uniformly():
  t = np.asarray(DDPM.sample_times(KEY, 100_000))
  assert t.min() == 0 and t.max() == 999
  assert abs(t.mean() - 499.5) < 4 * 288.7 / len(t) ** 0.5
  np.testing.assert_array_equal(DDPM.model_time(jnp.array([0, 999])), [0, 999])


def test_flow_times_follow_their_laws():
  t = np.asarray(FLOW.sample_times(KEY, 100_000))
  assert 0 < t.min() < 1e-3 and 0.999 < t.max() < 1
  grid = np.linspace(0.05, 0.95, 19)
  np.testing.assert_allclose(np.quantile(t, grid), grid, atol=0.01)
  sana = objectives.FlowMatching(logit_normal=(0.0, 1.0), shift=3.0)
  t = np.asarray(sana.sample_times(KEY, 100_000), np.float64)
  assert t.min() > 0 and t.max() < 1
  # A shift of the logit by log(3) is the shift by 3.
  logits = np.log(t / (1 - t)) - np.log(3)
  assert abs(logits.mean()) < 0.02 and abs(logits.std() - 1) < 0.02
  np.testing.assert_allclose(
    sana.shifted(np.array([0.0, 0.5, 1.0])), [0, 0.75, 1]
  )
  np.testing.assert_allclose(FLOW.model_time(jnp.array([0.5])), [500])


def test_mask_keeps_leading_channels_drawn_from_the_candidates():
  mask = objectives.random_channel_mask(KEY, 3000, 8, (2, 4, 8))
  assert mask.shape == (3000, 1, 1, 8)
  kept = np.asarray(mask.sum(-1)).ravel()
  for c in (2, 4, 8):
    assert abs((kept == c).mean() - 1 / 3) < 0.04
  assert (np.diff(np.asarray(mask), axis=-1) <= 0).all()


@OBJECTIVES
def test_masked_loss_is_that_of_the_leading_channels(objective):
  z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 3, 5)))
  z = z.astype(jnp.float32)
  mask = (jnp.arange(5) < 2).astype(jnp.float32)
  mask = jnp.broadcast_to(mask, (4, 1, 1, 5))
  inputs = []

  def model_fn(z_t, t):
    inputs.append(np.asarray(z_t))
    trailing = 100 * (1 - mask)
    output = 0.3 * z_t + trailing
    return (
      jnp.concatenate([output, output], -1) if objective is DDPM else output
    )

  _, metrics = objective.loss(model_fn, KEY, z, mask)
  assert (inputs[0][..., 2:] == 0).all() and (inputs[0][..., :2] != 0).all()
  noise = jax.random.normal(jax.random.split(KEY)[1], z.shape)
  target = noise - z if objective is FLOW else noise
  expected = ((0.3 * inputs[0] - target)[..., :2] ** 2).mean((1, 2, 3))
  np.testing.assert_allclose(metrics["mse"], expected, rtol=1e-5)
  if objective is DDPM:  # v is 100 in the channels that do not count
    assert (np.abs(metrics["variational_bound"]) < 100).all()


def _linear_network(z, t, labels):
  """Twice the channels; a label moves both halves."""
  move = labels.astype(jnp.float32)[:, None, None, None]
  return jnp.concatenate([z + move, 10 * move + 0 * z], -1)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 2.0])
def test_guidance_moves_all_latent_channels_away_from_null(scale):
  z = jnp.asarray(mixtures.two_components().sample(0, 4))
  labels, t = jnp.array([0, 1, 2, 3]), jnp.full(4, 500.0)
  calls = []

  def network(z, t, labels):
    calls.append(len(z))
    return _linear_network(z, t, labels)

  found = guidance.guided(network, labels, jnp.full(4, 7), scale)(z, t)
  move = 7 + scale * (np.arange(4) - 7)
  expected = z + move[:, None, None, None].astype(np.float32)
  np.testing.assert_allclose(found[..., :3], expected, rtol=1e-5, atol=1e-5)
  variance = np.broadcast_to(10 * np.arange(4)[:, None, None, None], z.shape)
  np.testing.assert_array_equal(found[..., 3:], variance)
  assert calls == ([4] if scale == 1 else [8])


def _caption_network(z, t, condition):
  """It adds the mean of the states that count, or -9 for the null caption."""
  mask = condition["mask"][..., None].astype(jnp.float32)
  mean = jnp.sum(condition["states"] * mask, 1) / jnp.sum(mask, 1)
  mean = jnp.where(condition["is_null"][:, None], -9.0, mean)
  return z + mean[:, None, None]


def _captions(seed):
  rng = np.random.default_rng(seed)
  states = jnp.asarray(rng.normal(size=(4, 5, 3)), jnp.float32)
  mask = jnp.asarray(np.arange(5) < rng.integers(1, 6, (4, 1)))
  return {"states": states, "mask": mask, "is_null": jnp.zeros(4, bool)}


def test_guidance_leads_from_the_null_caption_or_from_negative_prompts():
  z = jnp.asarray(mixtures.two_components().sample(0, 4))
  t, condition = jnp.full(4, 500.0), _captions(0)
  null = conditioning.Captions(5, 3).null(condition)
  for other in (null, _captions(1)):
    found = guidance.guided(_caption_network, condition, other, 4.5)(z, t)
    towards, away = (_caption_network(z, t, x) for x in (condition, other))
    expected = away + 4.5 * (towards - away)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_guidance_acts_within_its_interval_only():
  z = jnp.asarray(mixtures.two_components().sample(0, 5))
  labels, null = jnp.arange(5), jnp.full(5, 7)
  t = jnp.array([99.0, 100.0, 300.0, 700.0, 701.0])
  model_fn = guidance.guided(_linear_network, labels, null, 3.0, (100.0, 700.0))
  guided = guidance.guided(_linear_network, labels, null, 3.0)(z, t)
  conditional = _linear_network(z, t, labels)
  found = model_fn(z, t)
  np.testing.assert_array_equal(found[1:4], guided[1:4])
  for i in (0, 4):
    np.testing.assert_array_equal(found[i], conditional[i])
  assert not np.allclose(guided[0], conditional[0])


@pytest.mark.parametrize(
  "create, message",
  [
    (lambda: objectives.NoisePrediction(spacing="cosine"), "known are linear"),
    (lambda: objectives.NoisePrediction(0.02, 1e-4), "not ascending"),
    (lambda: objectives.FlowMatching(shift=0.0), "shift 0.0"),
    (lambda: objectives.FlowMatching((0.0, 0.0)), "positive standard"),
    (
      lambda: objectives.random_channel_mask(KEY, 2, 8, (4, 9)),
      r"\(4, 9\) are not whole numbers from 1 to 8",
    ),
    (lambda: objectives.random_channel_mask(KEY, 2, 8, ()), "at least one"),
    (
      lambda: guidance.guided(
        _linear_network, jnp.arange(2), jnp.arange(2), -0.5
      ),
      "-0.5 is negative",
    ),
    (
      lambda: guidance.guided(
        _linear_network, jnp.arange(2), jnp.arange(2), 2.0, (5, 5)
      ),
      r"interval \(5, 5\) is not \(low, high\)",
    ),
    (
      lambda: DDPM.loss(lambda z, t: z, KEY, jnp.zeros((2, 1, 1, 3))),
      "give the network 6 output",
    ),
    (
      lambda: SCALED.loss(
        _with_variance(lambda z, t: z), KEY, jnp.zeros((2, 1, 1, 3))
      ),
      "give the network 3 output",
    ),
  ],
)
def test_what_cannot_be_is_an_error_that_says_what_can(create, message):
  with pytest.raises(ValueError, match=message):
    create()
