import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from dcae_jax.autoencoder import (
  families,
  network,
  patchgan,
  phases,
  quantisation,
  train_step,
)
from dcae_jax.autoencoder.dcae import variants
from dcae_jax.training import freezing, learning, optimizer

PHASES = [
  phases.create(config.phase, config.trainable)
  for config in (
    base.phase1("tiny-f8"), base.phase2("tiny-f8"), base.phase3("tiny-f8")
  )
]  # fmt: skip
OPTIMIZER = dataclasses.replace(
  optimizer.Settings(**base.autoencoder().optimizer),
  learning_rate=1e-3,
  warmup_steps=0,
  clip_norm=0.0,
)
_DEEPEST = variants.Stage(32, 1, "efficientvit")
ARCHITECTURE = variants.Architecture(  # each kind of block and of norm, once
  2,
  encoder=(variants.Stage(16, 0), _DEEPEST),
  decoder=(
    variants.Stage(16, 1, norm="batch_norm", activation="relu"),
    _DEEPEST,
  ),
)


@pytest.fixture(scope="module")
def model():
  return families.create(ARCHITECTURE)


@pytest.fixture(scope="module")
def forward(model):
  return jax.jit(model.apply)


@pytest.fixture(scope="module")
def variables(model):
  """Random also where initial values are constant: statistics, norms."""
  images = jnp.zeros((1, 8, 8, 3))
  found = jax.jit(model.init)(jax.random.key(0), images)
  leaves, structure = jax.tree.flatten(found)
  rng = np.random.default_rng(0)
  noisy = [x * rng.uniform(0.9, 1.1, x.shape).astype("f4") for x in leaves]
  return jax.tree.unflatten(structure, noisy)


def _images(n=8, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (n, 16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def build(model, variables):
  """`_build` of a phase; the same options have the same jitted step."""
  steps = {}

  def build(phase, **options):
    step_fn, state, mask = _build(model, variables, phase, **options)
    key = f"{phase} {options}"
    return steps.setdefault(key, jax.jit(step_fn)), state, mask

  return build


def _build(model, variables, phase, **options):
  """(step, state, mask) of a phase."""
  mask = freezing.trainable_mask(variables["params"], phase.trainable)
  transformation, schedule = optimizer.create(
    dataclasses.replace(OPTIMIZER, **options.pop("optimizer", {})), steps=100
  )
  adversarial = discriminator = None
  with_gan = options.pop("with_gan", True)
  if phase.adversarial and with_gan:
    module = patchgan.PatchGAN(8, 2)
    init = jax.jit(module.init)
    discriminator = init(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))
    discriminator = discriminator["params"]
    gan = {"weight": 0.5, "adaptive": True, "start_step": 0}
    adversarial = train_step.Adversarial(
      lambda params, x: module.apply({"params": params}, x),
      optimizer.create(OPTIMIZER, steps=100)[0],
      **(gan | options.pop("gan", {})),
    )
  learns = learning.Learning(
    mask, transformation, schedule, learning.Ema(0.9, 0)
  )
  state = learns.init(jax.tree.map(jnp.copy, variables))
  if adversarial:
    state = state.replace(
      discriminator=discriminator,
      discriminator_optimizer=adversarial.optimizer.init(discriminator),
    )
  step_fn = train_step.TrainStep(
    reconstruct=train_step.reconstruct_with(model.apply),
    phase=phase,
    learning=learns,
    adversarial=adversarial,
    **options,
  )
  return step_fn, state, mask


def _moved(before, after):
  """Paths of the leaves that are not bit-identical."""
  paths = freezing.parameter_paths(before)
  pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
  return {
    path
    for path, (a, b) in zip(paths, pairs, strict=True)
    if np.asarray(a).tobytes() != np.asarray(b).tobytes()
  }


@pytest.mark.parametrize("phase", PHASES)
def test_frozen_parameters_do_not_move_and_trainable_ones_do(build, phase):
  step_fn, state, mask = build(phase)
  params = state.params
  first = params["encoder"]["project_in"]["conv"]
  first["bias"] = jnp.full_like(first["bias"], -0.0)
  state = state.replace(params=params)
  after = state
  for seed in range(3):
    after, _ = step_fn(after, _images(seed=seed), {})
  learns, _ = freezing.partition(state.params, mask)
  expected = set(freezing.parameter_paths(learns))
  assert _moved(state.params, after.params) == expected
  assert _moved(state.ema["params"], after.ema["params"]) - {
    "encoder/project_in/conv/bias"
  } == expected - {"encoder/project_in/conv/bias"}
  statistics = set(freezing.parameter_paths(state.batch_stats))
  expected = statistics if phase.moves_batch_statistics else set()
  assert _moved(state.batch_stats, after.batch_stats) == expected
  averaged = _moved(state.ema["batch_stats"], after.ema["batch_stats"])
  assert averaged == expected
  assert int(after.step) == 3


def test_muon_has_no_state_for_frozen_parameters_and_leaves_their_bits(build):
  """In phase 2, with a batch in two parts."""
  phase = PHASES[1]
  step_fn, state, mask = build(
    phase, grad_accum_steps=2, optimizer={"kind": "muon"}
  )
  learns, _ = freezing.partition(state.params, mask)
  kernels = {x for x in freezing.parameter_paths(learns) if "kernel" in x}
  leaves = jax.tree.leaves_with_path(state.optimizer)
  paths = {
    jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
    for keys, leaf in leaves
  }
  for name, leaf in paths.items():
    is_number = leaf.ndim == 0 or name.endswith("ns_coeffs")
    assert is_number or any(m in name for m in phase.trainable), name
  momenta = [x for x in paths if "/mu/" in x and x.endswith("kernel")]
  assert len(momenta) == len(kernels) == 2
  after, _ = step_fn(state, _images(), {})
  expected = set(freezing.parameter_paths(learns))
  assert _moved(state.params, after.params) == expected
  assert _moved(state.ema["params"], after.ema["params"]) == expected


def test_encode_is_bit_identical_after_phase_3(model, build):
  step_fn, state, _ = build(PHASES[2])
  encode = jax.jit(functools.partial(model.apply, method="encode"))
  x = quantisation.to_float(jnp.asarray(_images(2)))
  before = encode(state.variables, x)
  for seed in range(3):
    state, _ = step_fn(state, _images(seed=seed), {})
  np.testing.assert_array_equal(encode(state.variables, x), before)
  np.testing.assert_array_equal(encode(state.ema, x), before)


@pytest.mark.parametrize("phase", PHASES[1:])
def test_optimizer_has_moments_for_trainable_leaves_only(build, phase):
  _, state, mask = build(phase)
  learns, _ = freezing.partition(state.params, mask)
  adam = optax.tree.get(state.optimizer, "mu")
  assert freezing.parameter_paths(adam) == freezing.parameter_paths(learns)
  scalars = sum(1 for x in jax.tree.leaves(state.optimizer) if x.ndim == 0)
  assert freezing.count(state.optimizer) == 2 * freezing.count(learns) + scalars


def test_flops_of_frozen_phases_against_phase_1():
  model = families.create("tiny-f8")
  images = jax.ShapeDtypeStruct((4, 32, 32, 3), "uint8")
  variables = network.abstract_variables(model, 3)
  flops = []
  for phase in PHASES:
    build = lambda v, phase=phase: _build(model, v, phase, with_gan=False)[1]
    state = jax.eval_shape(build, variables)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables)
    step_fn, _, _ = _build(model, zeros, phase, with_gan=False)
    compiled = jax.jit(step_fn).lower(state, images, {}).compile()
    flops.append(compiled.cost_analysis()["flops"])
  assert flops[1] / flops[0] <= 0.55
  assert flops[2] / flops[0] <= 0.40


def test_step_is_adamw_with_decay_on_kernels_only(model, build):
  """Against the update written out, for the first step of phase 3."""
  phase = PHASES[2]
  options = {"weight_decay": 0.5, "clip_norm": 1e-3}
  step_fn, state, _ = build(phase, with_gan=False, optimizer=options)
  x = quantisation.to_float(jnp.asarray(_images()))

  def loss(head):
    params = {**state.params, "decoder": {**state.params["decoder"]}}
    params["decoder"]["project_out"] = head
    y = model.apply({**state.variables, "params": params}, x)
    return jnp.mean(jnp.abs(y - x))

  head = state.params["decoder"]["project_out"]
  l1, gradient = jax.jit(jax.value_and_grad(loss))(head)
  norm = optax.tree.norm(gradient)
  after, metrics = step_fn(state, _images(), {})
  np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)
  np.testing.assert_allclose(metrics["loss/l1"], l1, rtol=1e-5)
  clipped = jax.tree.map(lambda g: g * min(1.0, 1e-3 / norm), gradient)
  for (path, p), g, new in zip(
    jax.tree.leaves_with_path(head),
    jax.tree.leaves(clipped),
    jax.tree.leaves(after.params["decoder"]["project_out"]),
    strict=True,
  ):
    decay = 0.5 * p if path[-1].key == "kernel" else 0.0
    expected = p - 1e-3 * (g / (jnp.abs(g) + 1e-8) + decay)
    np.testing.assert_allclose(new, expected, rtol=1e-4, atol=2e-5)


def test_ema_ramps_up_and_covers_parameters_and_statistics(build):
  ema = learning.Ema(0.99, 10)
  expected = 0.99 * (1 - np.exp(-np.array([1, 10, 100]) / 10))
  np.testing.assert_allclose(ema.at(jnp.array([1, 10, 100])), expected, 1e-5)
  step_fn, state, _ = build(PHASES[0])
  after, _ = step_fn(state, _images(), {})
  for name in ("params", "batch_stats"):
    jax.tree.map(
      lambda average, old, new: np.testing.assert_allclose(
        average, 0.9 * old + 0.1 * new, rtol=1e-5, atol=1e-7
      ),
      after.ema[name],
      state.variables[name],
      after.variables[name],
    )


def test_accumulated_gradients_equal_those_of_the_whole_batch(build):
  phase = PHASES[1]  # statistics are fixed: parts do not depend on each other
  whole, state, _ = build(phase)
  parts, _, _ = build(phase, grad_accum_steps=4)
  a, metrics_a = whole(state, _images(), {})
  b, metrics_b = parts(state, _images(), {})
  for name in ("loss/l1", "gradient_norm"):
    np.testing.assert_allclose(metrics_a[name], metrics_b[name], rtol=1e-5)
  moments = [optax.tree.get(s.optimizer, "mu") for s in (a, b)]
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-7),
    *moments,
  )


def test_accumulation_moves_statistics_once_per_part(model, build):
  step_fn, state, _ = build(PHASES[0], grad_accum_steps=2)
  after, _ = step_fn(state, _images(), {})
  apply = jax.jit(functools.partial(model.apply, mutable=["batch_stats"]))
  expected = state.variables
  for part in (_images()[0::2], _images()[1::2]):
    _, moved = apply(expected, quantisation.to_float(jnp.asarray(part)))
    expected = {**expected, **moved}
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
    after.batch_stats,
    expected["batch_stats"],
  )


def test_perceptual_loss_is_added_with_its_weight(build, forward):
  perceptual = lambda p, x, y: p["scale"] * jnp.mean((x - y) ** 2, (1, 2, 3))
  step_fn, state, _ = build(
    PHASES[1], perceptual=train_step.Perceptual(perceptual, 0.25)
  )
  _, metrics = step_fn(state, _images(), {"scale": jnp.float32(3.0)})
  x = quantisation.to_float(jnp.asarray(_images()))
  y = forward(state.variables, x)
  distance = 3.0 * jnp.mean((x - y) ** 2)
  np.testing.assert_allclose(metrics["loss/lpips"], distance, rtol=1e-4)
  total = metrics["loss/l1"] + 0.25 * metrics["loss/lpips"]
  np.testing.assert_allclose(metrics["loss/total"], total, rtol=1e-6)


def _last_kernel_gradients(model, state, gan_weight):
  """Of L1, and of the generator's loss, for the decoder's last kernel."""
  x = quantisation.to_float(jnp.asarray(_images()))
  module = patchgan.PatchGAN(8, 2)

  def both(kernel):
    params = jax.tree.map(lambda leaf: leaf, state.params)
    params["decoder"]["project_out"]["conv"]["kernel"] = kernel
    y = model.apply({**state.variables, "params": params}, x)
    logits = module.apply({"params": state.discriminator}, y)
    return jnp.mean(jnp.abs(y - x)), -jnp.mean(logits)

  kernel = state.params["decoder"]["project_out"]["conv"]["kernel"]
  return jax.jit(jax.jacrev(both))(kernel)


@pytest.mark.parametrize("adaptive", [True, False])
def test_gan_gradient_has_its_weight(model, build, adaptive):
  options = {} if adaptive else {"gan": {"adaptive": False}}
  step_fn, state, _ = build(PHASES[2], **options)
  after, metrics = step_fn(state, _images(), {})
  l1, generator = _last_kernel_gradients(model, state, 0.5)
  weight = 0.5
  if adaptive:
    ratio = jnp.linalg.norm(l1.ravel())
    ratio = ratio / (jnp.linalg.norm(generator.ravel()) + 1e-4)
    np.testing.assert_allclose(metrics["adaptive_weight"], ratio, rtol=1e-3)
    weight = weight * ratio
  moment = optax.tree.get(after.optimizer, "mu")
  found = moment["decoder"]["project_out"]["conv"]["kernel"] / 0.1
  expected = l1 + weight * generator
  scale = float(jnp.abs(expected).max())
  np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3 * scale)


def test_generator_feels_the_discriminator_from_its_start_step(build):
  step_fn, state, _ = build(PHASES[2], gan={"start_step": 1})
  without, plain, _ = build(PHASES[2], with_gan=False)
  first, metrics = step_fn(state, _images(), {})
  expected, _ = without(plain, _images(), {})
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    first.params,
    expected.params,
  )
  assert metrics["loss/total"] == metrics["loss/l1"]
  assert _moved(state.discriminator, first.discriminator)
  _, metrics = step_fn(first, _images(), {})
  assert metrics["loss/total"] != metrics["loss/l1"]


def test_discriminator_learns_from_the_same_batch_before_the_update(
  build, forward
):
  step_fn, state, _ = build(PHASES[2])
  _, metrics = step_fn(state, _images(), {})
  x = quantisation.to_float(jnp.asarray(_images()))
  y = forward(state.variables, x)
  apply = jax.jit(patchgan.PatchGAN(8, 2).apply)
  real, fake = (apply({"params": state.discriminator}, v) for v in (x, y))
  hinge = 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())
  np.testing.assert_allclose(metrics["loss/discriminator"], hinge, rtol=1e-3)
  np.testing.assert_allclose(
    metrics["loss/generator"], -fake.mean(), rtol=1e-3, atol=1e-5
  )


def test_to_float_spans_minus_one_to_one():
  x = quantisation.to_float(jnp.array([0, 255], jnp.uint8).reshape(1, 1, 2, 1))
  np.testing.assert_array_equal(x.ravel(), [-1.0, 1.0])
