"""SD-VAE through the same training step and task as DC-AE."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

import dcae_jax
from configs import base
from dcae_jax.autoencoder import (
  families,
  phases,
  quantisation,
  train_step,
)
from dcae_jax.autoencoder.sd_vae import variants as sd_vae_variants
from dcae_jax.tasks import train_autoencoder
from dcae_jax.training import freezing, learning, optimizer
from tasks.test_train_autoencoder import _assert_same_bits, _lines, _saved

SEED = 3
PHASE_1 = phases.create("low_resolution_full_training", ("*",))


def _run(config, workdir):
  return train_autoencoder.run(config, epath.Path(workdir))


@pytest.fixture(scope="module")
def model():
  """As small as they get: what is tested with it are the steps."""
  return families.create(
    sd_vae_variants.Architecture(
      4, (8,), depth=1, groups=2, middle_attention=False
    )
  )


@pytest.fixture(scope="module")
def variables(model):
  images = jnp.zeros((1, 8, 8, 3))
  return {"batch_stats": {}} | jax.jit(model.init)(jax.random.key(0), images)


@pytest.fixture(scope="module")
def build(model, variables):
  """`_build` of a weight; the same again for the same one."""
  return functools.cache(
    lambda weight, **options: _build(model, variables, weight, **options)
  )


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  """A folder of weights of an architecture that has no name."""
  variant = sd_vae_variants.Architecture(
    3, (8, 8), depth=1, groups=2, encoder_attending=(1,), decoder_mixes=False
  )
  model = families.create(variant)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  ae = dcae_jax.Autoencoder(variant, variables, scaling_factor=1.0)
  folder = tmp_path_factory.mktemp("weights") / "own"
  ae.save(folder)
  return folder


@pytest.fixture(scope="module")
def config(tiny_config, own):
  """A function of the phase: a run of four steps from there."""
  start = {"init_from": str(own), "model.variant": ""}
  return lambda number=1, **changes: tiny_config(number, **(start | changes))


@pytest.fixture(scope="module")
def phase_1(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "phase1"
  assert _run(config(), workdir)
  return workdir


MUON = {"optimizer.kind": "muon", "log_every": 2}


@pytest.fixture(scope="module")
def phase_2(config, tmp_path_factory):
  """With Muon, and means over two steps."""
  workdir = tmp_path_factory.mktemp("runs") / "phase2"
  assert _run(config(2, **MUON), workdir)
  return workdir


def _images(n=8, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (n, 16, 16, 3)).astype(np.uint8)


def _build(model, variables, weight, **options):
  """(jitted step, state)."""
  mask = freezing.trainable_mask(variables["params"], PHASE_1.trainable)
  settings = dataclasses.replace(
    optimizer.Settings(**base.autoencoder().optimizer),
    learning_rate=1e-3,
    warmup_steps=0,
    clip_norm=0.0,
  )
  transformation, schedule = optimizer.create(settings, steps=100)

  learns = learning.Learning(
    mask, transformation, schedule, learning.Ema(0.9, 0)
  )
  step_fn = train_step.TrainStep(
    reconstruct=train_step.reconstruct_with(model.apply, samples_latents=True),
    phase=PHASE_1,
    learning=learns,
    kl_weight=weight,
    seed=SEED,
    **options,
  )
  return jax.jit(step_fn), learns.init(variables)


def _key(step_number, part):
  key = jax.random.key(SEED)
  for number in (2, step_number, part):
    key = jax.random.fold_in(key, number)
  return key


def test_gradient_is_that_of_l1_and_weighted_kl_of_a_sample(model, build):
  weight = 0.5
  step_fn, state = build(weight)
  x = quantisation.to_float(jnp.asarray(_images(4)))

  @jax.jit
  def losses(params):
    y, divergences = model.apply(
      {"params": params}, x, _key(0, 0), method="reconstruct_sample"
    )
    return jnp.mean(jnp.abs(y - x)), jnp.mean(divergences) / (16 * 16 * 3)

  def total(params):
    l1, kl = losses(params)
    return l1 + weight * kl

  after, metrics = step_fn(state, _images(4), {})
  l1, kl = losses(state.params)
  np.testing.assert_allclose(metrics["loss/l1"], l1, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss/kl"], kl, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss/total"], l1 + weight * kl, rtol=1e-5)
  expected = jax.jit(jax.grad(total))(state.params)
  moments = optax.tree.get(after.optimizer, "mu")
  for found, wanted in zip(
    jax.tree.leaves(moments), jax.tree.leaves(expected), strict=True
  ):
    scale = float(jnp.abs(wanted).max())
    np.testing.assert_allclose(
      found / 0.1, wanted, rtol=1e-3, atol=1e-3 * scale + 1e-8
    )


def test_each_step_and_part_has_samples_of_its_own(model, build):
  """Told by the L1 loss of the same images and parameters."""
  l1 = lambda metrics: float(metrics["loss/l1"])
  whole, state = build(1e-6)
  first = l1(whole(state, _images(4), {})[1])
  assert first == l1(whole(state, _images(4), {})[1])
  later = state.replace(step=jnp.int32(1))
  second = l1(whole(later, _images(4), {})[1])
  assert abs(second - first) > 1e-5
  # Two parts of the same images: the mean of two samplings.
  parts, state = build(1e-6, grad_accum_steps=2)
  twice = np.repeat(_images(4), 2, axis=0)
  both = l1(parts(state, twice, {})[1])
  x = quantisation.to_float(jnp.asarray(_images(4)))
  sample = jax.jit(
    lambda key: model.apply(
      state.variables, x, key, method="reconstruct_sample"
    )
  )
  expected = [
    jnp.mean(jnp.abs(sample(_key(0, part))[0] - x)) for part in (0, 1)
  ]
  assert abs(expected[0] - expected[1]) > 1e-5
  np.testing.assert_allclose(first, expected[0], rtol=1e-5)
  np.testing.assert_allclose(both, np.mean(expected), rtol=1e-5)


def test_more_steps_lower_the_loss(build):
  step_fn, state = build(1e-6)
  coarse = np.repeat(np.repeat(_images(4)[:, ::8, ::8], 8, 1), 8, 2)
  found = []
  for _ in range(60):
    state, metrics = step_fn(state, coarse, {})
    found.append(float(metrics["loss/total"]))
  assert np.mean(found[-5:]) < 0.7 * np.mean(found[:5])


def test_a_large_weight_pulls_the_posterior_to_the_normal(build):
  divergence = {}
  for weight in (1e-6, 0.5):
    step_fn, state = build(weight)
    for _ in range(15):
      state, metrics = step_fn(state, _images(4), {})
    divergence[weight] = float(metrics["loss/kl"])
  assert divergence[0.5] < 0.5 * divergence[1e-6]


def test_a_run_measures_the_kl_loss_and_evaluates_the_mean(own, phase_1):
  train = [x for x in _lines(phase_1) if "train/loss/l1" in x]
  assert [x["step"] for x in train] == [1, 2, 3, 4]
  for x in train:
    total = x["train/loss/l1"] + 1e-6 * x["train/loss/kl"]
    assert x["train/loss/kl"] > 0
    np.testing.assert_allclose(x["train/loss/total"], total, rtol=1e-6)
  result = json.loads((phase_1 / "result.json").read_text())
  count = freezing.count(dcae_jax.load(own).variables["params"])
  assert result["parameters"] == result["parameters_trained"] == count
  assert {"eval/psnr", "eval/ssim", "scaling_factor"} <= result.keys()


def test_muon_and_samples_resume_with_the_same_bits(config, phase_2, tmp_path):
  """The means end at the interruption."""
  assert _run(config(2, steps=2, **MUON), tmp_path)
  assert _run(config(2, **MUON), tmp_path)
  saved = _saved(phase_2)
  _assert_same_bits(saved, _saved(tmp_path))
  assert any("/muon/" in name and "/mu/" in name for name in saved)
  for key in ("train/loss/kl", "train/loss/l1"):
    runs = [
      {x["step"]: x[key] for x in _lines(workdir) if key in x}
      for workdir in (phase_2, tmp_path)
    ]
    assert list(runs[0]) == [2, 4] and runs[0] == runs[1]
    assert runs[0][4] != runs[0][2]


def test_samples_are_the_same_on_any_mesh(config, phase_1, tmp_path):
  changes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.spatial": 2, "steps": 2}
  assert _run(config(**changes), tmp_path)
  for key in ("train/loss/l1", "train/loss/kl"):
    losses = [
      [x[key] for x in _lines(d) if key in x][:2] for d in (phase_1, tmp_path)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_a_run_is_loaded_saved_and_trained_further(
  config, own, phase_1, phase_2, tmp_path
):
  ae = dcae_jax.load(phase_1)
  assert ae.shift_factor == 0.0
  result = json.loads((phase_1 / "result.json").read_text())
  np.testing.assert_allclose(ae.scaling_factor, result["scaling_factor"])
  ae.save(tmp_path / "saved")
  again = dcae_jax.load(tmp_path / "saved")
  images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), "uint8")
  np.testing.assert_array_equal(again.encode(images), ae.encode(images))
  moved = dcae_jax.load(phase_1, space_to_channel=2)
  assert moved.spatial_compression == 4 and moved.latent_channels == 12
  # A run from the saved folder takes its model, here through its config.
  changes = {"init_from": str(tmp_path / "saved"), "discriminator.layers": 1}
  assert _run(config(3, steps=1, **changes), tmp_path / "phase3")
  for before, workdir, frozen, learns in (
    (dcae_jax.load(own), phase_2, ("encoder", "stage_0"), "project_in"),
    (ae, tmp_path / "phase3", ("encoder",), "project_out"),
  ):
    params = [x.variables["params"] for x in (before, dcae_jax.load(workdir))]
    parts = params
    for name in frozen:
      parts = [part[name] for part in parts]
    jax.tree.map(np.testing.assert_array_equal, *parts)
    biases = [x["decoder"][learns]["conv"]["bias"] for x in params]
    assert np.any(biases[0] != biases[1])


def test_any_architecture_is_trained_from_its_weights(own, phase_1):
  before, found = dcae_jax.load(own), dcae_jax.load(phase_1)
  assert found.variant == "custom"
  assert found.architecture == before.architecture
  assert sorted({line["step"] for line in _lines(phase_1)})[:2] == [0, 1]
  for a, b in zip(
    jax.tree.leaves(before.variables["params"]),
    jax.tree.leaves(found.variables["params"]),
    strict=True,
  ):
    # Four steps of 1e-3 at most, if it began there.
    np.testing.assert_allclose(b, a, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {
        "model.variant": "tiny-sd-vae-f8",
        "model.residual_autoencoding": False,
      },
      "SD-VAE has no shortcuts",
    ),
    ({"kl.weight": -1.0}, r"kl\.weight=-1\.0 is below 0"),
    ({"model.variant": "sd-vae-f8"}, r"'sd-vae-f8'.*sd-vae-f8c4"),
  ],
)
def test_bad_input_is_refused(config, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    _run(config(1, **changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()
