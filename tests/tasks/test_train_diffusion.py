"""Training of a latent diffusion model, on a store that is filled by hand."""

import importlib
import json
import os
import pathlib
import signal

import jax
import numpy as np
import pytest
from conftest import fill_store
from etils import epath
from jax.experimental import multihost_utils
from latents.test_store import make_store
from PIL import Image

import dcae_jax
from configs import base
from dcae_jax.diffusion import conditioning, objectives
from dcae_jax.diffusion import train_step as diffusion_train_step
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.evaluation.report import figures
from dcae_jax.latents import decode, reader
from dcae_jax.runs import host_memory, processes
from dcae_jax.setup import denoising, diffusion_training, latent_reading
from dcae_jax.tasks import train_diffusion
from dcae_jax.training import checkpoint, learning, loop, optimizer

SHAPE, ROWS, CLASSES = (2, 2, 16), 48, 3


@pytest.fixture(scope="module")
def config(tiny_diffusion):
  return tiny_diffusion


def _losses(workdir):
  text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  return [x["train/loss/mse"] for x in lines if "train/loss/mse" in x]


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  assert train_diffusion.run(config(), epath.Path(workdir))
  return workdir


def _variables(workdir):
  """Step and tree of the last checkpoint: parameters, then averages."""
  settings = json.loads((workdir / "config.json").read_text())
  c = base.latent_diffusion()
  c.model.update(settings["model"])
  model = denoising.create(c.model, c.objective, c.sampler).denoiser
  abstract = {"batch_stats": {}} | denoisers.abstract_variables(model)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  placed = jax.tree.map(lambda _: device, abstract)
  found = checkpoint.restore_variables(str(workdir), "params", abstract, placed)
  return found, denoising.averages(str(workdir), model, device)


def test_interrupted_training_goes_on_bit_for_bit(whole, config, tmp_path):
  """And the numbers of the model are the store's."""
  workdir = tmp_path / "run"
  train_diffusion.run(config(steps=2), epath.Path(workdir))
  train_diffusion.run(config(steps=4), epath.Path(workdir))
  for one, two in zip(_variables(whole), _variables(workdir), strict=True):
    assert one[0] == two[0] == 4
    jax.tree.map(np.testing.assert_array_equal, one[1], two[1])
  losses = [_losses(w) for w in (whole, workdir)]
  assert losses[0] == losses[1] and len(losses[0]) == 4
  model = json.loads((whole / "config.json").read_text())["model"]
  found = model["latent_size"], model["latent_channels"], model["num_classes"]
  assert found == (2, 16, 3)
  result = json.loads((whole / "result.json").read_text())
  assert result["step"] == 4 and result["parameters"] > 100_000
  assert result["train/seconds"] > 0
  assert result["step_gib"] * 2**30 > 4 * result["parameters"]


def test_muon_learns_dense_layers(whole, config, tmp_path):
  """Faster than AdamW, from the same initial values."""
  changes = {"optimizer.kind": "muon", "optimizer.learning_rate": 0.02}
  c = config(**changes)
  train_diffusion.run(c, epath.Path(tmp_path))
  muon, adamw = _losses(tmp_path), _losses(whole)
  assert muon[0] == pytest.approx(adamw[0], rel=1e-5)
  assert muon[3] < adamw[3]


def test_another_mesh_has_the_same_losses(whole, config, tmp_path):
  """That splits both the rows and the parameters."""
  c = config(steps=2, **{"mesh.data": 2, "mesh.fsdp": 4})
  train_diffusion.run(c, epath.Path(tmp_path))
  assert _losses(tmp_path) == pytest.approx(_losses(whole)[:2], rel=1e-4)


def test_it_learns_the_classes_and_shows_samples(
  config, tiny_latents, tmp_path
):
  """Samples of a class come out nearer to its latents than to others'."""
  c = config(
    steps=130,
    batch_size=32,
    log_every=50,
    **{
      "samples.count": 3, "sampler.steps": 12, "ema.decay": 0.95,
      "optimizer.learning_rate": 2e-3, "samples.guidance": (1.0,),
      "model.variant": "DiT-tiny",
      "objective.kind": "flow", "sampler.kind": "euler",
    },
  )  # fmt: skip
  train_diffusion.run(c, epath.Path(tmp_path))
  assert _losses(tmp_path)[-1] < 0.6
  (picture,) = (tmp_path / "samples").glob("samples_*.png")  # none of step 0
  assert picture.stat().st_size > 500
  c = denoising.with_store(c, reader.Latents(tiny_latents))
  model = denoising.create(c.model, c.objective, c.sampler)
  whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  sample = model.sample_function(1.0, whole)
  _, ema = _variables(tmp_path)[1]
  labels = np.arange(12, dtype=np.int32) % CLASSES
  z = np.asarray(jax.jit(sample)(ema, jax.random.key(5), labels))
  found = reader.Latents(tiny_latents).read(np.arange(ROWS))
  means = np.stack(
    [found["latents"][found["labels"] == i].mean(0) for i in range(CLASSES)]
  )
  distance = np.square(z[:, None] - means[None]).mean((2, 3, 4))
  assert (distance.argmin(1) == labels).all()
  assert np.median(distance.min(1)) < 0.5


def test_the_learning_step_uses_labels_as_it_should(config, tiny_latents):
  """All dropped: labels do not matter. None: they do."""
  c = denoising.with_store(config(), reader.Latents(tiny_latents))
  model = denoising.create(c.model, c.objective, c.sampler).denoiser
  initial = jax.jit(lambda key: denoisers.init(model, key))
  variables = initial(jax.random.key(0))
  adamw, schedule = optimizer.create(optimizer.Settings(**c.optimizer), c.steps)
  mask = jax.tree.map(lambda _: True, variables["params"])
  learns = learning.Learning(mask, adamw, schedule, learning.Ema(0.5, 0))
  batch = reader.Latents(tiny_latents).read(np.arange(16))
  others = batch | {"labels": (batch["labels"] + 1) % CLASSES}
  totals = {}
  for dropout, candidates in ((0.0, ()), (1.0, ()), (0.0, (4, 16))):
    step = jax.jit(
      diffusion_train_step.create(
        denoiser=model,
        objective=objectives.scaled_linear(),
        dropout=dropout,
        channel_candidates=candidates,
        learning=learns,
        loaded=conditioning.as_it_is(model.conditioning),
        seed=0,
      )
    )
    state = learns.init({"batch_stats": {}} | variables)
    after, metrics = step(state, batch)
    _, changed = step(state, others)
    equal = metrics["loss/total"] == changed["loss/total"]
    assert bool(equal) == (dropout == 1.0)
    totals[dropout, candidates] = float(metrics["loss/total"])
    half = jax.tree.map(lambda a, b: (a + b) / 2, state.params, after.params)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
      after.ema["params"], half,
    )  # fmt: skip
  assert len(set(totals.values())) == 3


def test_it_starts_from_the_averages_of_another_run(whole, config, tmp_path):
  c = config(init_from=str(whole), steps=1, **{"optimizer.learning_rate": 0.0})
  train_diffusion.run(c, epath.Path(tmp_path / "run"))
  (_, parameters), (_, before) = _variables(whole)
  same = jax.tree.map(np.array_equal, parameters["params"], before["params"])
  assert not all(jax.tree.leaves(same))
  (_, after), _ = _variables(tmp_path / "run")
  jax.tree.map(np.testing.assert_array_equal, before["params"], after["params"])
  other = config(init_from=str(whole), **{"model.patch_size": 2})
  with pytest.raises(ValueError, match=r"is another one \(patch_size: 1 there"):
    train_diffusion.run(other, epath.Path(tmp_path / "other"))


def test_samples_that_are_not_finite_do_not_stop_training(
  config, tmp_path, caplog
):
  """As those of dopri5, where the steps do not suffice."""
  c = config(
    steps=2,
    **{
      "objective.kind": "flow", "sampler.kind": "dopri5", "sampler.steps": 8,
      "samples.count": 2,
    },
  )  # fmt: skip
  assert train_diffusion.run(c, epath.Path(tmp_path))
  assert "samples at guidance 3 are not finite, and left out" in caplog.text
  assert (tmp_path / "checkpoints" / "2").exists()


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(
  whole, config, tmp_path, monkeypatch
):
  saved = loop.run

  def interrupted(program, *arguments):
    def step(*inputs):
      os.kill(os.getpid(), signal.SIGTERM)
      return program.step(*inputs)

    return saved(program._replace(step=step), *arguments)

  monkeypatch.setattr(loop, "run", interrupted)
  assert not train_diffusion.run(config(), epath.Path(tmp_path))
  monkeypatch.undo()
  assert (tmp_path / "checkpoints" / "1").exists()
  assert train_diffusion.run(config(), epath.Path(tmp_path))
  for one, two in zip(_variables(whole), _variables(tmp_path), strict=True):
    jax.tree.map(np.testing.assert_array_equal, one[1], two[1])


def test_other_latents_are_refused_on_resume(
  tiny_autoencoder, config, tmp_path
):
  labels = np.arange(48, dtype=np.int32) % 3
  paths = [
    fill_store(tmp_path / f"{rows}", tiny_autoencoder, labels[:rows], classes=3)
    for rows in (48, 32)
  ]
  run = epath.Path(tmp_path / "run")
  train_diffusion.run(config(latents=paths[0], steps=1), run)
  (tmp_path / "48").rename(tmp_path / "moved")  # a store may move
  moved = str(tmp_path / "moved")
  train_diffusion.run(config(latents=moved, steps=2), run)
  with pytest.raises(ValueError, match=r"began with other latents \(count: 48"):
    train_diffusion.run(config(latents=paths[1], steps=3), run)
  (run / "latents.json").write_text("{}")
  with pytest.raises(ValueError, match=r"latents\.json is damaged"):
    train_diffusion.run(config(latents=moved, steps=3), run)


def test_channels_are_normalised_in_training_and_back_in_its_samples(
  config, tiny_autoencoder, tiny_latents, tmp_path
):
  settings = {"data.normalisation": "channels", "samples.count": 2}
  settings |= {"samples.guidance": (1.0,)}
  run = epath.Path(tmp_path / "run")
  train_diffusion.run(config(steps=1, **settings), run)
  statistics = reader.Latents(tiny_latents).manifest["statistics"]["channels"]
  mean, std = (np.float32(statistics[key]) for key in ("mean", "std"))
  kept = json.loads((run / "latents.json").read_text())["normalisation"]
  np.testing.assert_allclose(kept["shift"], mean, rtol=1e-6)
  np.testing.assert_allclose(kept["scale"], 1 / std, rtol=1e-6)
  c = denoising.with_store(config(), reader.Latents(tiny_latents))
  model = denoising.create(c.model, c.objective, c.sampler)
  whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  key = jax.random.fold_in(jax.random.key(0), 2)
  sample = jax.jit(model.sample_function(1.0, whole))
  z = np.asarray(sample(_variables(tmp_path / "run")[1][1], key, np.arange(2)))
  pixels = decode.to_pixels(dcae_jax.load(tiny_autoencoder), z * std + mean)
  titles = ["0: class 0", "1: class 1"]
  expected = figures.grid(list(pixels[:, None]), titles, {0: "guidance 1"})
  (file,) = (tmp_path / "run/samples").glob("*.png")
  difference = np.asarray(Image.open(file)).astype(int) - expected
  assert abs(difference).max() <= 2 and expected.std() > 10
  with pytest.raises(ValueError, match="'channels' there, 'factor' now"):
    train_diffusion.run(config(steps=4, **{"samples.count": 0}), run)
  fine = config(init_from=str(run), steps=1)
  with pytest.raises(ValueError, match="normalisation: 'channels' there, 'fa"):
    train_diffusion.run(fine, epath.Path(tmp_path / "fine"))


def _shuffling(workdir):
  data = json.loads((workdir / "config.json").read_text())["data"]
  return data["shuffle_shards"], data["shuffle_streams"]


def test_a_run_goes_on_with_the_windows_that_it_began_with(
  whole, config, tmp_path, caplog
):
  """However much memory there is now; also where nothing was decided then."""
  caplog.set_level("INFO")
  assert _shuffling(whole) == (0, 1)
  run = epath.Path(tmp_path / "run")
  few, many = {"data.cache_megabytes": 0.01}, {"data.cache_megabytes": 1.0}
  train_diffusion.run(config(steps=1, **few), run)
  assert _shuffling(run) == (2, 1)
  (line,) = (x for x in caplog.messages if x.startswith("latents: "))
  assert line == (
    "latents: 0.01229 MB in 1 shards, of which a process keeps up to 0.01 MB "
    "in memory (config.data.cache_megabytes); shuffling 2 shards at a time, "
    "which do not fit: they are read repeatedly"
  )
  train_diffusion.run(config(steps=2, **many), run)
  assert _shuffling(run) == (2, 1)
  with pytest.raises(ValueError, match="shuffle_shards: 2 there, 0 now"):
    train_diffusion.run(config(steps=2, **{"data.shuffle_shards": 0}), run)
  before = json.loads((run / "config.json").read_text())
  del before["data"]["shuffle_streams"]
  before["data"]["shuffle_shards"] = 0
  (run / "config.json").write_text(json.dumps(before))
  train_diffusion.run(config(steps=3, **few), run)
  assert _shuffling(run) == (0, 1)


@pytest.mark.parametrize(
  ("memory", "changes", "kept", "shuffling"),
  [
    # A shard is 131,072 bytes, and a quarter is for all processes of a machine.
    (4 * 8 * 131_072, {}, 8, (0, 1)),
    (4 * 7 * 131_072, {}, 7, (5, 1)),
    (4 * 7 * 131_072, {"workers": 2}, 3.5, (2, 1)),
    (4096, {}, 1 / 128, (2, 1)),
    (4096, {"shuffle_shards": 3}, 1 / 128, (3, 1)),
    (4096, {"shuffle_shards": 0}, 1 / 128, (0, 1)),
    (4 * 7 * 131_072, {"shuffle_streams": 2}, 7, (2, 2)),
    (4096, {"cache_megabytes": 1.1}, 1.1e6 / 131_072, (0, 1)),
    (4096, {"cache_megabytes": 0.5}, 0.5e6 / 131_072, (3, 1)),
  ],
)
def test_windows_are_of_as_many_shards_as_fit_a_quarter_of_the_memory(
  memory, changes, kept, shuffling, config, tmp_path, monkeypatch
):
  (tmp_path / "memory.max").write_text(f"{memory}")
  limits = (str(tmp_path / "memory.max"),)
  monkeypatch.setattr(host_memory, "_LIMITS", limits)
  make_store(tmp_path / "store", rows=128, shape=(8, 8, 32))
  c = config(latents=str(tmp_path / "store"))
  c.data.update(changes)
  store = denoising.open_store(c)
  run = epath.Path(tmp_path / "run")
  found = latent_reading.decided(c, store, run).data
  assert (found.shuffle_shards, found.shuffle_streams) == shuffling
  megabytes = latent_reading.cache_megabytes(c)
  assert megabytes == pytest.approx(kept * 131_072 / 1e6)


def test_processes_agree_on_the_windows(config, tmp_path, monkeypatch):
  """On those of the one with least memory; two of three share a machine."""
  (tmp_path / "memory.max").write_text(f"{10**6}")
  limits = (str(tmp_path / "memory.max"),)
  monkeypatch.setattr(host_memory, "_LIMITS", limits)

  def gathered(own):  # of this machine, of it again, and of another one
    machine, other = own.view(np.uint64)[0], 12345
    rows = [[machine, 10**6], [machine, 10**6], [other, 8 * 10**5]]
    return np.array(rows, np.uint64).view(np.uint32)

  make_store(tmp_path / "store", rows=128, shape=(8, 8, 8))
  store = reader.Latents(tmp_path / "store")
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
  assert processes.memory() == 5 * 10**5
  run = epath.Path(tmp_path / "run")
  found = latent_reading.decided(config(), store, run).data
  assert (found.shuffle_shards, found.shuffle_streams) == (3, 3)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"latents": ""}, "config.latents is empty"),
    ({"latents": "/nowhere"}, "is no latent store"),
    ({"model.variant": "UViT-G"}, "unknown denoiser 'UViT-G'"),
    ({"model.patch_size": 4}, "latent side 2 is not divisible"),
    ({"model.latent_channels": 8}, "config.model.latent_channels=8, but"),
    ({"model.latent_size": 4}, "config.model.latent_size=4, but"),
    ({"objective.kind": "ddpm"}, "unknown config.objective.kind='ddpm'"),
    ({"objective.kind": "flow"}, "Euler, Heun, Dopri5, FlowDPMSolver do"),
    ({"sampler.kind": "dpm"}, "unknown config.sampler.kind='dpm'"),
    ({"sampler.steps": 1}, "1 steps are too few for DPMSolver"),
    ({"samples.guidance": (1.0, -0.5)}, "guidance scale -0.5 is negative"),
    ({"sampler.interval": (500.0, 100.0)}, "interval"),
    ({"sampler.interval": (500.0,)}, "is not two numbers"),
    ({"objective.logit_normal": (0.0,), "objective.kind": "flow"}, "not two"),
    ({"init_from": "/nowhere"}, "not the work directory of a run, nor"),
    ({"channel_candidates": (32,)}, "candidate channel numbers"),
    ({"batch_size": 2**24, "model.variant": "UViT-H"}, "too little memory"),
    ({"data.workers": 1000}, "config.data.workers=1000 is above"),
    ({"sampler.steps": 10**6}, "config.sampler.steps=1000000 is above 10000"),
    ({"batch_size": 12}, "config.batch_size=12 is not divisible by 8"),
    ({"batch_size": 64}, "48 rows, and a batch of all processes 64"),
    ({"mesh.spatial": 2, "mesh.data": 4}, "splits images"),
    ({"optimizer.schedule": "step"}, "schedule='step'; known are constant"),
    ({"optimizer.final_rate": -1.0}, "final_rate=-1.0 is below 0"),
    ({"data.normalisation": "x"}, "unknown normalisation='x'; known are fact"),
    ({"label_dropout": 1.5}, "label_dropout=1.5 is above 1"),
    ({"autoencoder": "/nowhere", "samples.count": 1}, "cannot be loaded"),
  ],
)
def test_bad_input_is_refused_before_anything_is_written(
  changes, message, config, tmp_path
):
  with pytest.raises(ValueError, match=message):
    train_diffusion.run(config(**changes), epath.Path(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_labels_out_of_range_are_refused(tiny_autoencoder, config, tmp_path):
  labels = np.arange(ROWS, dtype=np.int32) % 5
  path = fill_store(tmp_path / "store", tiny_autoencoder, labels, classes=3)
  with pytest.raises(ValueError, match="labels from 0 to 4, and 3 classes"):
    train_diffusion.run(config(latents=path), epath.Path(tmp_path / "run"))


@pytest.mark.parametrize(
  ("name", "tokens", "macs"),
  [
    ("f32_dit_xl", 256, 118.68),
    ("f32_usit_2b", 256, 414.91),
    ("f32_uvit_h", 256, 133.25),
    ("f64_uvit_h", 64, 33.25),
    ("f128_uvit_h", 64, None),
    ("sd_vae_f8_uvit_h", 1024, None),
  ],
)
def test_recipes_are_the_papers(name, tokens, macs):
  """On latents of 512 px images, of f128 1024 px; GMACs where published."""
  c = importlib.import_module(f"configs.{name}").get_config()
  size, channels = {
    "f32": (16, 32), "f64": (8, 128), "f128": (8, 512), "sd": (64, 4),
  }[name.split("_")[0]]  # fmt: skip
  c.model.latent_size, c.model.latent_channels = size, channels
  c.model.num_classes = 1000
  diffusion_training.check(c)
  denoiser = denoising.create(c.model, c.objective, c.sampler).denoiser
  assert (size // c.model.patch_size) ** 2 == tokens
  if macs:
    assert denoiser.forward_macs == pytest.approx(macs * 1e9, rel=0.01)
  o, objective, sampler = c.optimizer, c.objective.kind, c.sampler
  found = (
    o.learning_rate, o.beta1, o.beta2, o.weight_decay, o.warmup_steps,
    c.batch_size, c.steps, objective, sampler.kind,
  )  # fmt: skip
  family = name.split("_")[-2]
  assert found == {
    "uvit": (
      2e-4, 0.99, 0.99, 0.03, 5000, 1024, 500_000, "scaled_linear",
      "dpm_solver",
    ),
    "usit": (1e-4, 0.99, 0.99, 0.0, 5000, 1024, 500_000, "flow", "dopri5"),
    "dit": (1e-4, 0.9, 0.999, 0.0, 0, 256, 3_000_000, "improved_ddpm", "ddpm"),
  }[family]  # fmt: skip
  assert c.ema.decay == 0.9999 and c.label_dropout == 0.1
  ramp, decay_all = (0, False) if family == "dit" else (2_000, True)
  assert c.ema.ramp_steps == ramp and o.decay_all == decay_all
  assert sampler.steps == {"uvit": 30, "usit": 1000, "dit": 250}[family]
