"""Latents, a diffusion model and samples, one after the other."""

import json
import math
import os
import pathlib
import shutil
import signal

import numpy as np
import pytest
from conftest import said_made
from etils import epath

import dcae_jax
from configs import base
from dcae_jax.latents import reader
from dcae_jax.tasks import export_and_diffuse, plan
from dcae_jax.training import loop

OF_EFFICIENTNET = (
  "frechet_efficientnet_lite0",
  "precision_recall_efficientnet_lite0",
)


@pytest.fixture
def config(tiny_autoencoder, photographs, tiny_diffusion, compilation_cache):
  c = base.export_and_diffuse()
  c.export.init_from = str(tiny_autoencoder)
  c.export.source = base.source("folder", str(photographs))
  c.export.class_per_image = True
  c.export.crop, c.export.crops_per_image = "random_crop", 2
  c.export.resolution, c.export.shard_rows = 16, 16
  c.export.batch_size_per_device = 2
  c.training = tiny_diffusion(latents="", steps=2, batch_size=8)
  c.samples.samples, c.samples.batch_size = 8, 8
  c.samples.guidance, c.samples.metrics = (1.0, 3.0), ()
  c.samples.picture.classes = 3
  for part in (c.export, c.reference, c.samples):
    part.compilation_cache = compilation_cache
  return c


def test_images_become_classes_and_samples_of_them(config, tmp_path, caplog):
  """And again, with nothing left to do; samples are compared with the images.

  Of two images in 12, features are not kept.
  """
  config.samples.metrics, config.reference.features = OF_EFFICIENTNET, 10
  reference = tmp_path / "reference" / "efficientnet_lite0_16px.npz"
  times = set()
  caplog.set_level("INFO")
  for _ in range(2):
    assert export_and_diffuse.run(config, epath.Path(tmp_path))
    times.add(reference.stat().st_mtime_ns)
  assert len(times) == 1
  assert said_made(caplog.text) == {
    "latents", "reference", "training", "samples", "result"
  }  # fmt: skip
  assert np.load(reference)["features"].shape == (10, 1280)
  store = reader.Latents(tmp_path / "latents")
  assert store.classes == store.keys()[::2] and len(store.classes) == 12
  assert store.condition("labels").tolist() == [
    i for i in range(12) for _ in range(2)
  ]
  model = json.loads((tmp_path / "training/config.json").read_text())["model"]
  assert model["num_classes"] == 12
  assert (tmp_path / "samples" / "samples.png").exists()
  result = json.loads((tmp_path / "result.json").read_text())
  assert result == json.loads((tmp_path / "samples/result.json").read_text())
  assert set(result["guidance"]) == {"1", "3"} and not result["absent"]
  for measured in result["guidance"].values():
    assert math.isfinite(measured["frechet_efficientnet_lite0"])
    for name in ("precision", "recall"):
      assert 0 <= measured[f"{name}_efficientnet_lite0"] <= 1


def test_a_run_that_has_moved_with_its_autoencoder_goes_on(
  config, tiny_autoencoder, tmp_path, monkeypatch
):
  """And what reads its training finds the latents, and what decodes them."""
  shutil.copytree(tiny_autoencoder, tmp_path / "old" / "weights")
  monkeypatch.chdir(tmp_path / "old")
  config.export.init_from = "weights"
  config.samples.metrics = OF_EFFICIENTNET[:1]
  config.samples.guidance, config.samples.picture.classes = (1.0,), 0
  assert export_and_diffuse.run(config, epath.Path("run"))
  (tmp_path / "old").rename(tmp_path / "new")
  monkeypatch.chdir(tmp_path)
  reference = pathlib.Path("new/run/reference/efficientnet_lite0_16px.npz")
  before = reference.stat().st_mtime_ns
  planned = plan.load("new/run/training", {})[""]
  assert planned.latents == str(tmp_path / "new/run/latents")
  assert dcae_jax.load_denoiser("new/run/training").autoencoder
  config.export.init_from = "new/weights"
  config.samples.guidance = (1.0, 2.0)
  assert export_and_diffuse.run(config, epath.Path("new/run"))
  assert reference.stat().st_mtime_ns == before
  result = json.loads(pathlib.Path("new/run/result.json").read_text())
  assert set(result["guidance"]) == {"1", "2"}


def test_sigterm_stops_in_any_stage(config, tmp_path, monkeypatch):
  """The stage that gets it leaves, and no other starts."""
  config.samples.metrics = OF_EFFICIENTNET[:1]
  config.export.min_size = 70  # but for two images, which are no reference
  for stage in ("export_latents", "reference_statistics", "train_diffusion"):
    task = getattr(export_and_diffuse, stage)
    run = task.run

    def interrupted(config, workdir, sigterm, run=run):
      os.kill(os.getpid(), signal.SIGTERM)
      assert sigterm.received
      return run(config, workdir, sigterm)

    monkeypatch.setattr(task, "run", interrupted)
    assert not export_and_diffuse.run(config, epath.Path(tmp_path))
    monkeypatch.undo()
    reference = tmp_path / "reference" / "result.json"
    assert reference.exists() == (stage == "train_diffusion")
    assert not (tmp_path / "samples").exists()
    assert not (tmp_path / "result.json").exists()
  config.reference.features = 5  # of 12, with one of the two
  assert export_and_diffuse.run(config, epath.Path(tmp_path))
  statistics = np.load(tmp_path / "reference" / "efficientnet_lite0_16px.npz")
  assert statistics["features"].shape == (4, 1280)
  found = json.loads((tmp_path / "reference" / "result.json").read_text())
  assert found["images"] == {"16": 10}


def test_whoever_runs_it_can_listen_to_sigterm(config, tmp_path):
  sigterm = loop.Sigterm()
  sigterm.received = True
  assert not export_and_diffuse.run(config, epath.Path(tmp_path), sigterm)
  assert not (tmp_path / "training" / "result.json").exists()


def test_samples_are_compared_with_statistics_that_are_named(config, tmp_path):
  config.samples.metrics = OF_EFFICIENTNET[:1]
  config.samples.reference = str(tmp_path / "{network}.npz")
  with pytest.raises(ValueError, match=r"no file .*efficientnet_lite0\.npz"):
    export_and_diffuse.run(config, epath.Path(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_result_of_something_else_is_not_written_over(config, tmp_path):
  (tmp_path / "result.json").write_text("{}")
  with pytest.raises(ValueError, match=r"holds result\.json of something else"):
    export_and_diffuse.run(config, epath.Path(tmp_path))


def test_without_images_there_is_no_reference_of_them(config, tmp_path):
  config.samples.metrics = OF_EFFICIENTNET
  config.export.source.kind = "npy"
  config.export.crop, config.export.crops_per_image = "dm_crop", 1
  config.export.scaling_factor = 1.0
  np.save(tmp_path / "0.npy", np.zeros((16, 2, 2), "float32"))
  config.export.source.path = str(tmp_path)
  with pytest.raises(ValueError, match=r"name config\.samples\.reference"):
    export_and_diffuse.run(config, epath.Path(tmp_path / "run"))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"samples.guidance": (-1.0,)}, "guidance scale -1.0 is negative"),
    ({"samples.batch_size": 3}, "config.samples.batch_size=3 is not divisible"),
    ({"training.label_dropout": 2.0}, "label_dropout=2.0 is above 1"),
    ({"training.sampler.steps": 1}, "1 steps are too few"),
    ({"training.model.variant": "UViT-G"}, "unknown denoiser 'UViT-G'"),
    ({"training.model.patch_size": 4}, "latent side 2 is not divisible"),
    (
      {"training.batch_size": 9},
      "config.training.batch_size=9 is not divisible by 8",
    ),
    ({"samples.classes": (12,)}, "class 12 is not from 0"),
    ({"samples.metrics": ("fid",)}, "unknown metric 'fid'"),
    (
      {"samples.metrics": OF_EFFICIENTNET, "reference.features": -1},
      "config.reference.features=-1 is below 0",
    ),
    ({"export.crop": "crop"}, "crop"),
    ({"export.resolution": 100}, "side 100 in config.export.resolution"),
    ({"training.data.workers": 1000}, "config.training.data.workers=1000"),
    ({"training.sampler.steps": 10**6}, "config.training.sampler.steps=10000"),
    (
      {"samples.batch_size": 2**20, "export.resolution": 2**13},
      "of config.samples.batch_size=1048576",
    ),
  ],
)
def test_every_stage_is_checked_before_the_first(
  changes, message, config, tmp_path
):
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    export_and_diffuse.run(config, epath.Path(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
