"""A run as a user has it: files, resuming, hand-over, kills, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import REPOSITORY, config_file, said_made
from etils import epath

import dcae_jax
from dcae_jax.autoencoder import families
from dcae_jax.autoencoder.dcae import variants
from dcae_jax.autoencoder.weights import conversion
from dcae_jax.data import batches, images
from dcae_jax.evaluation import reconstruction
from dcae_jax.runs import exclusive
from dcae_jax.setup import autoencoder_training, measuring
from dcae_jax.tasks import train_autoencoder
from dcae_jax.training import checkpoint, hardware


def _run(config, workdir):
  return train_autoencoder.run(config, epath.Path(workdir))


def _saved(workdir, step=None):
  """The arrays of a checkpoint, as numpy, by path."""
  directory = workdir / "checkpoints"
  steps = [int(p.name) for p in directory.iterdir() if p.name.isdigit()]
  directory = directory / str(step or max(steps))
  arrays = {}
  for item in ("params", "ema", "optimizer"):
    with ocp.StandardCheckpointer() as checkpointer:
      tree = checkpointer.restore(directory / item)
    for path, leaf in jax.tree.leaves_with_path(tree):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      arrays[f"{item}/{name}"] = np.asarray(leaf)
  return arrays


def _assert_same_bits(a, b):
  assert a.keys() == b.keys()
  for name, array in a.items():
    assert array.tobytes() == b[name].tobytes(), name


def _lines(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def _losses(workdir):
  key = "train/loss/total"
  return {x["step"]: x[key] for x in _lines(workdir) if key in x}


@pytest.fixture(scope="module")
def phase_1(tiny_config, tmp_path_factory):
  """A finished run of phase 1."""
  workdir = tmp_path_factory.mktemp("runs") / "phase1"
  assert _run(tiny_config(1), workdir)
  return workdir


@pytest.fixture(scope="module")
def config_2(tiny_config, phase_1):
  """From the parameters of phase 1, with Muon, where few kernels learn."""
  changes = {
    "init_from": str(phase_1), "optimizer.kind": "muon", "steps": 2,
    "resolution": 64, "evaluation.resolutions": (64, 32),
  }  # fmt: skip
  return tiny_config(2, **changes)


@pytest.fixture(scope="module")
def phase_2(config_2, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "phase2"
  assert _run(config_2, workdir)
  return workdir


@pytest.fixture(scope="module")
def phase_3(tiny_config, phase_1, tmp_path_factory):
  """From the averages of phase 1, on devices whose peak is known."""
  workdir = tmp_path_factory.mktemp("runs") / "phase3"
  changes = {
    "init_from": str(phase_1), "start_from_averages": True, "steps": 2
  }  # fmt: skip
  with pytest.MonkeyPatch.context() as patch:
    chip = hardware.Chip(1e12, 0, 0, 0)
    patch.setitem(hardware.CHIPS, jax.devices()[0].device_kind, chip)
    assert _run(tiny_config(3, **changes), workdir)
  return workdir


@pytest.fixture(scope="module")
def of_few_images(tiny_config, photographs, tmp_path_factory):
  """Two steps on three images and one that is broken; LPIPS is measured."""
  root = tmp_path_factory.mktemp("few")
  (root / "images").mkdir()
  for i, path in enumerate(sorted(photographs.rglob("*.png"))[:3]):
    shutil.copy(path, root / "images" / f"{i}.png")
  (root / "images" / "broken.jpg").write_bytes(b"broken")
  changes = {
    "steps": 2, "data.source.path": str(root / "images"),
    "evaluation.metrics": ("lpips",), "evaluation.max_images": 2,
  }  # fmt: skip
  assert _run(tiny_config(1, **changes), root / "run")
  return json.loads((root / "run" / "result.json").read_text())


@pytest.fixture(scope="module")
def resumed(tiny_config, tmp_path_factory):
  """The same, of two times two steps, killed while it wrote step 3."""
  workdir = tmp_path_factory.mktemp("runs") / "resumed"
  assert _run(tiny_config(1, steps=2), workdir)
  half = workdir / "checkpoints" / "3.orbax-checkpoint-tmp-99"
  (half / "params").mkdir(parents=True)
  (half / "params" / "junk").write_text("cut off")
  assert _run(tiny_config(1), workdir)
  return workdir


def test_work_directory_holds_what_the_contract_says(phase_1):
  config = json.loads((phase_1 / "config.json").read_text())
  assert config["model"]["variant"] == "tiny-f2" and config["steps"] == 4
  assert [p.name for p in (phase_1 / "checkpoints").iterdir()] == ["4"]
  train = [x for x in _lines(phase_1) if "train/loss/l1" in x]
  assert [x["step"] for x in train] == [1, 2, 3, 4]
  assert {
    "train/loss/total",
    "train/gradient_norm",
    "train/learning_rate",
    "train/images_per_second",
  } <= train[-1].keys()
  evaluated = [x for x in _lines(phase_1) if "eval/psnr" in x]
  assert [x["step"] for x in evaluated] == [0, 4]
  assert "eval/ssim" in evaluated[1]
  result = json.loads((phase_1 / "result.json").read_text())
  assert result["step"] == 4 and result["images_skipped"] == 0
  assert result["eval/psnr"] == evaluated[1]["eval/psnr"]
  assert result["parameters"] == result["parameters_trained"] == 64_839
  assert result["floor/psnr"] > result["eval/psnr"] and "floor/ssim" in result
  assert "latent_change" not in result  # it began with initial values
  samples = sorted(p.name for p in (phase_1 / "samples").iterdir())
  assert samples == [f"reconstructions_32px_0000000{i}.png" for i in (0, 4)]
  assert list(phase_1.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("phase", [2, 3])
def test_later_phases_start_from_the_earlier_run_and_leave_the_rest(
  phase_1, request, phase
):
  """Phase 2 of its parameters, phase 3 of its averages."""
  workdir = request.getfixturevalue(f"phase_{phase}")
  trainable = json.loads((workdir / "config.json").read_text())["trainable"]
  before, after = _saved(phase_1), _saved(workdir)
  if phase == 3:
    name = "params/encoder/project_in/conv/kernel"
    assert np.any(before[f"params/{name}"] != before[f"ema/{name}"])
    before |= {
      name.replace("ema/", "params/", 1): array
      for name, array in before.items()
      if name.startswith("ema/")
    }
  learning = tuple(
    f"{item}/params/{module}/"
    for item in ("params", "ema")
    for module in trainable
  )
  shared = [k for k in before if k.startswith(("params/", "ema/"))]
  assert len(shared) > 60
  for name in shared:
    same = before[name].tobytes() == after[name].tobytes()
    assert same != name.startswith(learning), name
  assert int(after["optimizer/step"]) == 2
  moments = [
    k for k in after if "/mu/" in k and not k.startswith("optimizer/d")
  ]
  assert moments and all(
    any(module in k for module in trainable) for k in moments
  )


def test_speed_is_compared_with_a_peak_that_is_known(phase_1, phase_3):
  key = "train/model_flops_utilization"
  of_both = [x for run in (phase_1, phase_3) for x in _lines(run)]
  of_known = [x[key] for x in _lines(phase_3) if "train/loss/l1" in x]
  assert of_known == [x[key] for x in of_both if key in x]
  assert all(0 < utilization < 1 for utilization in of_known)


def test_interrupted_and_resumed_ends_with_the_same_bits(phase_1, resumed):
  """Two steps, then the rest, against four in one go."""
  _assert_same_bits(_saved(phase_1), _saved(resumed))
  assert _losses(phase_1) == _losses(resumed)


def test_a_half_written_checkpoint_is_never_restored(phase_1, resumed):
  """Nor kept: it was of a later step than the whole ones."""
  steps = [path.name for path in (resumed / "checkpoints").iterdir()]
  assert sorted(steps) == ["2", "4"]
  assert _losses(phase_1)[3] == _losses(resumed)[3]


def test_fine_tuning_begins_with_the_evaluation_of_what_it_starts_from(
  phase_1, phase_2
):
  """At both resolutions of phase 2, of which phase 1 has the lower one."""
  before, after = [x for x in _lines(phase_2) if "eval/psnr" in x]
  result = json.loads((phase_1 / "result.json").read_text())
  assert before["eval/32px/psnr"] == pytest.approx(
    result["eval/psnr"], abs=1e-4
  )
  assert after["eval/32px/psnr"] != before["eval/32px/psnr"]
  result = json.loads((phase_2 / "result.json").read_text())
  assert {"eval/psnr", "eval/32px/psnr", "eval/32px/ssim"} <= result.keys()
  assert result["floor/psnr"] != result["floor/32px/psnr"]


def test_the_change_of_the_latents_is_that_of_the_averages(
  config_2, phase_1, phase_2
):
  inputs = train_autoencoder.open_inputs(config_2)
  (batch,) = images.evaluation_batches(
    inputs.held_out,
    inputs.held_out_decoding,
    64,
    batches.Reading(12),
    max_images=12,
    skipped=images.Skipped(),
  )
  before, after = (
    np.asarray(dcae_jax.load(run).encode(batch["images"] / 127.5 - 1))
    for run in (phase_1, phase_2)
  )
  change = np.linalg.norm(after - before) / np.linalg.norm(before)
  assert 1e-3 < change < 1
  result = json.loads((phase_2 / "result.json").read_text())
  assert result["latent_change"] == pytest.approx(change, rel=1e-4)


def test_phase_3_does_not_change_the_latents(phase_3):
  result = json.loads((phase_3 / "result.json").read_text())
  assert result["latent_change"] == 0.0


def test_a_result_that_was_lost_is_made_again(config_2, phase_2, tmp_path):
  """From what the run has written, without another step."""
  shutil.copytree(phase_2, tmp_path / "run")
  (tmp_path / "run" / "result.json").unlink()
  assert _run(config_2, tmp_path / "run")
  again, before = (
    json.loads((run / "result.json").read_text())
    for run in (tmp_path / "run", phase_2)
  )
  assert again == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(
  "changes", [{"step": "a"}, {"images_skipped": []}, {"eval/psnr": "a"}, None]
)
def test_a_result_with_other_types_is_named(
  changes, config_2, phase_2, tmp_path
):
  shutil.copytree(phase_2, tmp_path / "run")
  file = tmp_path / "run" / "result.json"
  found = changes and json.loads(file.read_text()) | changes
  file.write_text(json.dumps(found))
  with pytest.raises(ValueError, match=r"result\.json is damaged: .*; remove"):
    _run(config_2, tmp_path / "run")


def test_the_change_of_the_latents_is_left_out_where_its_origin_is_gone(
  tiny_config, phase_1, tmp_path, caplog
):
  """Or is another model by now."""
  origin = tmp_path / "origin"
  shutil.copytree(phase_1, origin)
  config = tiny_config(3, init_from=str(origin))
  training = autoencoder_training.build(config)
  inputs = train_autoencoder.open_inputs(config)
  held_out = measuring.EvaluationImages(
    inputs.held_out, inputs.held_out_decoding, training.mesh,
    config.evaluation, 2,
  )  # fmt: skip
  change = lambda: train_autoencoder._latent_change(training, None, held_out)
  config = json.loads((origin / "config.json").read_text())
  config["model"] |= {"variant": "tiny-f32", "architecture": {}}
  (origin / "config.json").write_text(json.dumps(config))
  assert change() == {}
  shutil.copy(phase_1 / "config.json", origin)
  shutil.rmtree(origin / "checkpoints")
  assert change() == {}
  shutil.rmtree(origin)
  assert change() == {}
  lines = [x for x in caplog.messages if "latents is not known" in x]
  assert len(lines) == 3 and "tiny-f32" in lines[0]


def test_the_seconds_of_a_run_are_those_before_and_after_it_was_resumed(
  resumed,
):
  result = json.loads((resumed / "result.json").read_text())
  rates = [
    x["train/steps_per_second"]
    for x in _lines(resumed)
    if "train/steps_per_second" in x
  ]
  seconds = sum(1 / rate for rate in rates)
  assert len(rates) == 4
  assert result["train/seconds"] == pytest.approx(seconds)
  assert result["train/steps_per_second"] == pytest.approx(4 / seconds)
  assert result["train/images_per_second"] == pytest.approx(8 * 4 / seconds)


def test_the_memory_of_a_step_is_more_than_its_state(phase_1, resumed):
  state = sum(x.nbytes for x in _saved(phase_1).values())
  for run in (phase_1, resumed):
    result = json.loads((run / "result.json").read_text())
    assert 1.2 * state < result["step_gib"] * 2**30 < 1e9


def test_the_discriminator_learns_at_its_own_rate(tiny_config):
  changes = {
    "optimizer.kind": "muon",
    "optimizer.warmup_steps": 0,
    "discriminator.learning_rate": 0.25,
  }
  training = autoencoder_training.build(
    tiny_config(3, **changes), predecessor_is_pending=True
  )
  adamw, params = training.adversarial.optimizer, {"bias": np.zeros(3, "f4")}
  updates, _ = adamw.update(
    {"bias": np.ones(3, "f4")}, adamw.init(params), params
  )
  np.testing.assert_allclose(updates["bias"], -0.25, rtol=1e-5)


def test_a_work_directory_of_another_phase_is_refused(tiny_config, phase_1):
  config = tiny_config(2, init_from=str(phase_1))
  with pytest.raises(ValueError, match=r"holds a run of another .*phase: 'low"):
    _run(config, phase_1)


def test_a_finished_run_does_nothing_when_started_again(tiny_config, phase_1):
  before = _saved(phase_1)
  result = (phase_1 / "result.json").read_text()
  assert _run(tiny_config(1), phase_1)
  _assert_same_bits(before, _saved(phase_1))
  assert (phase_1 / "result.json").read_text() == result


def test_a_run_ends_with_a_table_of_before_after_and_the_floor(
  tiny_config, phase_1, tmp_path, caplog
):
  shutil.copytree(phase_1, tmp_path / "run")
  with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 0, "eval/psnr": 1.234, "eval/ssim": 0.5}\n')
  caplog.set_level("INFO")
  assert _run(tiny_config(1), tmp_path / "run")
  *_, text, _ = caplog.messages
  rows = [line for line in text.splitlines() if " 32 " in line]
  names = [row.split("|")[1].strip() for row in rows]
  assert names == ["step 0", "step 4", "floor: block PCA"]
  assert "1.23 | 0.5000" in rows[0]
  assert said_made(caplog.text) == {
    "checkpoints",
    "metrics",
    "pictures",
    "result",
  }


def test_the_evaluation_of_a_run_measures_lpips(of_few_images):
  result = of_few_images
  assert 0 < result["floor/lpips"] < result["eval/lpips"] < 2


def test_skipped_images_are_counted(of_few_images):
  assert of_few_images["images_skipped"] == 1


def test_a_trained_run_is_loaded_saved_and_trained_further(
  tiny_config, phase_1, tmp_path
):
  """Run to folder, in both layouts, to fine-tuning run, keeping the weights."""
  ae = dcae_jax.load(phase_1)
  assert ae.variant == "tiny-f2"
  result = json.loads((phase_1 / "result.json").read_text())
  np.testing.assert_allclose(ae.scaling_factor, result["scaling_factor"])
  assert 1 / ae.scaling_factor == pytest.approx(result["eval/latent_rms"])
  for layout in conversion.LAYOUTS:
    folder = tmp_path / layout
    ae.save(folder, layout=layout)
    assert "step 4 of a training run" in (folder / "README.md").read_text()
    jax.tree.map(
      np.testing.assert_array_equal,
      dcae_jax.load(folder).variables,
      ae.variables,
    )
  changes = {"init_from": str(tmp_path / "original"), "model.variant": ""}
  assert _run(tiny_config(3, steps=1, **changes), tmp_path / "run")
  before = ae.variables["params"]
  after = dcae_jax.load(tmp_path / "run").variables["params"]
  jax.tree.map(
    np.testing.assert_array_equal, after["encoder"], before["encoder"]
  )
  heads = [x["decoder"]["project_out"]["conv"]["bias"] for x in (before, after)]
  assert np.any(heads[0] != heads[1])


def test_fine_tuning_takes_any_architecture_from_its_weights(
  tiny_config, tmp_path
):
  stages = tuple(
    variants.Stage(width, 1, **settings)
    for width, settings in (
      (16, {}),
      (32, {"block": "efficientvit", "scales": (5,)}),
    )
  )
  variant = variants.Architecture(
    8, stages, stages, downsample="strided", upsample="nearest"
  )
  variables = jax.jit(families.create(variant).init)(
    jax.random.key(0), np.zeros((1, 4, 4, 3), "float32")
  )
  own = dcae_jax.Autoencoder(variant, variables, scaling_factor=1.0)
  own.save(tmp_path / "own")
  changes = {"model.variant": "", "steps": 1}
  config = tiny_config(2, init_from=str(tmp_path / "own"), **changes)
  train_autoencoder.run(config, epath.Path(tmp_path / "run"))
  found = dcae_jax.load(tmp_path / "run")
  assert found.variant == "custom" and found.architecture == variant
  # The next phase takes it from that run; a named variant does not fit.
  changes["init_from"] = str(tmp_path / "run")
  config = tiny_config(3, **changes)
  train_autoencoder.run(config, epath.Path(tmp_path / "next"))
  assert dcae_jax.load(tmp_path / "next").architecture == variant
  config = tiny_config(3, init_from=str(tmp_path / "own"))
  with pytest.raises(ValueError, match=r"variant='custom'.*model\.variant=''"):
    train_autoencoder.run(config, epath.Path(tmp_path / "other"))
  config = tiny_config(1, **{"model.variant": ""})
  with pytest.raises(ValueError, match=r"config\.model\.variant is empty"):
    train_autoencoder.run(config, epath.Path(tmp_path / "other"))
  assert not (tmp_path / "other").exists()


def test_init_from_another_kind_of_model_is_refused(
  tiny_config, phase_1, tmp_path
):
  for key, value in (
    ("model.variant", "tiny-f32"),
    ("model.residual_autoencoding", False),
    ("model.image_channels", 1),
  ):
    changes = {key: value, "init_from": str(phase_1)}
    config = tiny_config(2, **changes)
    with pytest.raises(ValueError, match=rf"init_from=.*{key}"):
      _run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_work_directory_of_another_config_is_refused_and_untouched(
  tiny_config, phase_1
):
  before = (phase_1 / "config.json").read_text()
  config = tiny_config(1, seed=1, **{"optimizer.learning_rate": 0.5})
  with pytest.raises(
    ValueError, match=r"optimizer\.learning_rate: 0\.001 there, 0\.5 now; seed"
  ):
    _run(config, phase_1)
  assert (phase_1 / "config.json").read_text() == before


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model.variant": "f16c4"}, "unknown variant 'f16c4'.*f32c32"),
    ({"model.dtype": "int8"}, "dtype 'int8'"),
    ({"model.image_channels": 2}, "1 .grey. or 3"),
    ({"phase": "phase1"}, "low_resolution_full_training"),
    ({"trainable": ("decoder/head",)}, "'decoder/head' matches no parameter"),
    ({"resolution": 35}, "side 35 in config.* by 2.*use 34 or 36"),
    ({"resolution": 0}, "resolution=0 is below 1"),
    ({"evaluation.resolutions": (32, 21)}, "side 21 in .*is not divisible"),
    ({"evaluation.resolutions": ()}, "resolutions is empty"),
    ({"batch_size": 12}, "batch_size=12 is not divisible by 8"),
    ({"batch_size": 8, "accumulation": 2}, "divisible by 16"),
    ({"mesh.fsdp": 3}, r"config\.mesh .*8 devices"),
    ({"steps": 0}, r"config\.steps=0 is below 1"),
    ({"optimizer.learning_rate": float("nan")}, "learning_rate=nan"),
    ({"optimizer.kind": "lion"}, "kind='lion'; known are adamw, muon"),
    ({"optimizer.schedule": "wsd"}, "decay_steps=0 leaves nothing to decay"),
    ({"optimizer.final_rate": 1.5}, "final_rate=1.5 is above 1"),
    ({"discriminator.learning_rate": -1.0}, "rate=-1.0 is below 0"),
    ({"ema.decay": 1.0}, "decay=1.0 is above 0.9"),
    ({"data.crop": "centre"}, "unknown crop 'centre'"),
    ({"seed": -1}, "seed=-1 is below 0"),
    ({"batch_size": 10**9}, r"of config\.batch_size=1000000000 \([\d,]+ GB\)"),
    ({"resolution": 2**17, "data.source.path": "/nowhere"},
     r"need at least [\d.,]+ GB on each of 8 devices, [\d,]+ GB in all, and "
     r"this machine has [\d.,]+ GB; lower config\.batch_size"),
    ({"evaluation.resolutions": (2**20,)}, "8 images of 1048576 px"),
    ({"data.workers": 1000}, r"config\.data\.workers=1000 is above \d+, 8 for"),
    ({"resolution": 33, "data.source.path": "/nowhere"},
     r"side 33 in config\.resolution is not divisible by 2"),
    ({"data.source.path": ""}, r"^config\.data\.source\.path is empty; name a "
     "folder of images$"),
    ({"evaluation.source.path": ""}, r"^config\.evaluation\.source\.path is"),
    ({"optimizer.beta1": 1.0}, "beta1=1.0 is above 0.9"),
    ({"model.dtype": "float16"}, "float16"),
    ({"data.min_area": 2.0}, "min_area=2.0 is above 1"),
    ({"data.shorter_side": 16}, "shorter_side=16 is below .*resolution=32"),
    ({"data.min_size": 16}, "min_size=16 is below .*resolution=32"),
    ({"data.min_size": 4000}, "none of the 12 images can be used"),
    ({"data.source.path": "/nowhere"}, "image folder '/nowhere'"),
    ({"data.source.kind": "webdataset"}, "unknown config.data.source.kind"),
    ({"data.source.kind": "mixture"}, "at least one member"),
    ({"lpips.weight": 0.25, "lpips.path": "/nowhere.npz"}, "no file /nowhere"),
    ({"lpips.network": "squeeze"}, "unknown LPIPS network"),
    ({"lpips.weight": 0.25, "lpips.network": "alexnet", "resolution": 24},
     "too small for LPIPS"),
    ({"init_from": "/nowhere"}, "'/nowhere' is not the work directory"),
  ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
  tiny_config, tmp_path, changes, message
):
  workdir = tmp_path / "run"
  with pytest.raises(ValueError, match=message):
    _run(tiny_config(1, **changes), workdir)
  assert not workdir.exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "samples"])
def test_files_of_something_else_are_not_written_over(
  name, tiny_config, tmp_path
):
  (tmp_path / name).write_text("mine")
  with pytest.raises(ValueError, match=f"holds {name} of something else"):
    _run(tiny_config(1), tmp_path)
  assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("phase", [2, 3])
def test_later_phases_need_init_from(tiny_config, tmp_path, phase):
  with pytest.raises(ValueError, match=r"set --config\.init_from"):
    _run(tiny_config(phase), tmp_path / "run")


def test_adaptive_weight_needs_the_last_layer(tiny_config, phase_1, tmp_path):
  config = tiny_config(
    3, init_from=str(phase_1), trainable=("decoder/stage_1",)
  )
  with pytest.raises(ValueError, match=r"adaptive needs decoder/project_out"):
    _run(config, tmp_path / "run")


def test_too_small_a_disk_is_refused(tiny_config, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: _Disk())
  with pytest.raises(ValueError, match=r"no space left .*0\.1 MB free"):
    _run(tiny_config(1), workdir)
  assert not workdir.exists()


class _Disk:
  free = 100_000


def test_a_damaged_checkpoint_is_one_clear_error(
  tiny_config, phase_1, tmp_path
):
  shutil.copytree(phase_1, tmp_path, dirs_exist_ok=True)
  for path in (tmp_path / "checkpoints" / "4" / "params").rglob("*"):
    if path.is_file():
      path.write_bytes(b"damaged")
  with pytest.raises(
    ValueError, match=r"checkpoints/4 is damaged .*no whole checkpoint"
  ):
    _run(tiny_config(1, steps=5), tmp_path)


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
  tiny_config, tmp_path
):
  changes = {
    "steps": 50,
    "checkpoint.every": 1,
    "optimizer.learning_rate": 2e9,
    "optimizer.clip_norm": 0.0,
    "optimizer.warmup_steps": 0,
  }
  with pytest.raises(FloatingPointError, match=r"train/.* at step \d+;"):
    _run(tiny_config(1, **changes), tmp_path)
  for name, array in _saved(tmp_path).items():
    if name.startswith("params/"):
      assert np.all(np.isfinite(array)), name


class _Process:
  """`python -m dcae_jax.main` on eight devices, as the other runs here."""

  def __init__(self, config, workdir, *extra):
    self.workdir = workdir
    self.process = subprocess.Popen(
      [
        sys.executable,
        "-m",
        "dcae_jax.main",
        f"--config={config}",
        f"--workdir={os.path.relpath(workdir, REPOSITORY)}",
        *extra,
      ],
      cwd=REPOSITORY,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def wait_for_step(self, step, seconds=240):
    end = time.monotonic() + seconds
    path = self.workdir / "metrics.jsonl"
    while time.monotonic() < end and self.process.poll() is None:
      if path.exists() and len(path.read_text().splitlines()) >= step:
        return
      time.sleep(0.01)
    raise AssertionError(self.process.communicate()[0])

  def finish(self):
    output, _ = self.process.communicate(timeout=300)
    return self.process.returncode, output


def test_an_evaluation_that_a_kill_prevented_is_made_again(
  tiny_config, tmp_path, monkeypatch
):
  """After the checkpoint of its step is there, and before the next step."""
  config = tiny_config(1, **{"checkpoint.every": 2, "evaluation.every": 2})
  assert _run(config, tmp_path / "whole")
  measure, calls = reconstruction.Measurement.measure, []

  def killed(self, *arguments, **options):
    calls.append(None)
    if len(calls) == 2:  # of steps 0 and 2
      raise KeyboardInterrupt
    return measure(self, *arguments, **options)

  monkeypatch.setattr(reconstruction.Measurement, "measure", killed)
  with pytest.raises(KeyboardInterrupt):
    _run(config, tmp_path / "killed")
  assert dcae_jax.load(tmp_path / "killed").scaling_factor  # of step 0
  assert _run(config, tmp_path / "killed")
  _assert_same_bits(_saved(tmp_path / "whole"), _saved(tmp_path / "killed"))
  evaluations = [
    [line for line in _lines(tmp_path / name) if "eval/psnr" in line]
    for name in ("whole", "killed")
  ]
  assert len(evaluations[0]) == 3 and evaluations[0] == evaluations[1]
  factors = [
    dcae_jax.load(tmp_path / name).scaling_factor
    for name in ("whole", "killed")
  ]
  assert factors[0] == factors[1]


def test_an_evaluation_of_fewer_images_is_refused(
  tiny_config, photographs, tmp_path
):
  """An image is gone between two starts."""
  held_out = shutil.copytree(photographs / "animals", tmp_path / "held_out")
  changes = {"evaluation.source.path": str(held_out), "steps": 2}
  assert _run(tiny_config(1, **changes), tmp_path / "run")
  next(held_out.iterdir()).unlink()
  with pytest.raises(ValueError, match="images is 5 at step 4, and was 6 at"):
    _run(tiny_config(1, **changes | {"steps": 4}), tmp_path / "run")


def test_fewer_images_may_be_asked_for(tiny_config, tmp_path):
  assert _run(tiny_config(1, steps=2), tmp_path)
  changes = {"steps": 3, "evaluation.max_images": 5}
  assert _run(tiny_config(1, **changes), tmp_path)
  key = "eval/images"
  counts = {x["step"]: x[key] for x in _lines(tmp_path) if key in x}
  assert counts == {0: 12, 2: 12, 3: 5}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_that_could_not_begin_leaves_its_directory_free(
  tiny_config, phase_1, tmp_path
):
  before = tmp_path / "before"
  shutil.copytree(phase_1, before)
  (before / "checkpoints/4/params/manifest.ocdbt").unlink()
  config = tiny_config(2, init_from=str(before), steps=1)
  with pytest.raises(ValueError, match="no whole checkpoint"):
    _run(config, tmp_path / "run")
  config = tiny_config(2, init_from=str(phase_1), steps=1)
  assert _run(config, tmp_path / "run")


def test_a_checkpoint_that_cannot_be_written_ends_a_run_at_once(
  tiny_config, tmp_path
):
  """Files of at most 20 kB: as on a full disk, in one line."""
  file = config_file(tmp_path / "run.py", tiny_config(1, steps=20))
  limited = 'ulimit -f 20; exec "$0" "$@"'
  begun = time.monotonic()
  ended = subprocess.run(
    [
      "bash", "-c", limited, sys.executable, "-m", "dcae_jax.main",
      f"--config={file}", f"--workdir={tmp_path / 'run'}",
    ],
    cwd=REPOSITORY,
    env=os.environ | {"JAX_COMPILATION_CACHE_DIR": ""},
    capture_output=True,
    text=True,
    check=False,
  )  # fmt: skip
  assert ended.returncode == 2 and time.monotonic() - begun < 120
  last = ended.stderr.splitlines()[-1]
  assert last.startswith("error: writing a checkpoint failed: File too large")
  assert "Traceback" not in ended.stderr


def test_kill_and_sigterm_lose_nothing(tiny_config, tmp_path):
  """One run to its end; another killed once and interrupted once."""
  config = tiny_config(1, **{"checkpoint.every": 3, "steps": 20})
  assert _run(config, tmp_path / "whole")
  file = config_file(tmp_path / "run.py", config)
  start = lambda: _Process(file, tmp_path / "killed")
  run = start()
  run.wait_for_step(5)
  run.process.send_signal(signal.SIGKILL)
  assert run.finish()[0] == -signal.SIGKILL
  with exclusive.held(str(tmp_path / "killed")):  # by this process
    code, output = start().finish()
  assert code == 2 and "killed is worked in by" in output, output
  run = start()
  run.wait_for_step(12)
  run.process.send_signal(signal.SIGINT)
  code, output = run.finish()
  assert code == 0 and "stopped: saved step" in output, output
  assert not (tmp_path / "killed" / "result.json").exists()
  # It was stopped between two evaluations, and has the factor of the first.
  assert dcae_jax.load(tmp_path / "killed").scaling_factor > 0
  code, output = start().finish()
  assert code == 0 and "resuming from step" in output, output
  _assert_same_bits(_saved(tmp_path / "whole"), _saved(tmp_path / "killed"))
  assert _losses(tmp_path / "whole") == _losses(tmp_path / "killed")


def test_bad_input_is_one_line_on_the_command_line(tiny_config, tmp_path):
  config = config_file(tmp_path / "run.py", tiny_config(1))
  for extra, message in [
    ("--config.resolutoin=32", "did you mean config.resolution?"),
    (
      "--config.resolution=33",
      "error: image side 33 in config.resolution is not divisible by 2",
    ),
    ("--config.task=train", "error: unknown config.task 'train'"),
    ("--config.batch_size=x", "batch_size"),
  ]:
    run = _Process(config, tmp_path / "run", extra)
    code, output = run.finish()
    assert code == 2 and message in output, output
    errors = [x for x in output.splitlines() if x.strip()]
    assert len(errors) == 1, output
  assert not (tmp_path / "run").exists()
