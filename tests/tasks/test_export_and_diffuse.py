"""Latents, a diffusion model and samples, one after the other."""

import json
import os
import signal

import pytest
from etils import epath

from configs import base
from dcae_jax.latents import reader
from dcae_jax.tasks import export_and_diffuse


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
  for part in (c.export, c.samples):
    part.compilation_cache = compilation_cache
  return c


def test_images_become_classes_and_samples_of_them(config, tmp_path):
  """And again, with nothing left to do."""
  for _ in range(2):
    assert export_and_diffuse.run(config, epath.Path(tmp_path))
  store = reader.Latents(tmp_path / "latents")
  assert store.classes == store.keys()[::2] and len(store.classes) == 12
  assert store.condition("labels").tolist() == [
    i for i in range(12) for _ in range(2)
  ]
  model = json.loads((tmp_path / "training/config.json").read_text())["model"]
  assert model["num_classes"] == 12
  assert (tmp_path / "samples" / "samples.png").exists()
  result = json.loads((tmp_path / "samples" / "result.json").read_text())
  assert set(result["guidance"]) == {"1", "3"}


def test_sigterm_stops_in_any_stage(config, tmp_path, monkeypatch):
  """The stage that gets it leaves, and no other starts."""
  for stage in ("export_latents", "train_diffusion"):
    task = getattr(export_and_diffuse, stage)
    run = task.run

    def interrupted(config, workdir, sigterm, run=run):
      os.kill(os.getpid(), signal.SIGTERM)
      assert sigterm.received
      return run(config, workdir, sigterm)

    monkeypatch.setattr(task, "run", interrupted)
    assert not export_and_diffuse.run(config, epath.Path(tmp_path))
    monkeypatch.undo()
    assert not (tmp_path / "samples").exists()
  assert export_and_diffuse.run(config, epath.Path(tmp_path))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"samples.guidance": (-1.0,)}, "guidance scale -1.0 is negative"),
    ({"samples.batch_size": 3}, "config.batch_size=3 is not divisible"),
    ({"training.label_dropout": 2.0}, "label_dropout=2.0 is above 1"),
    ({"training.sampler.steps": 1}, "1 steps are too few"),
    ({"training.model.variant": "UViT-G"}, "unknown denoiser 'UViT-G'"),
    ({"training.model.patch_size": 4}, "latent side 2 is not divisible"),
    ({"training.batch_size": 9}, "config.batch_size=9 is not divisible by 8"),
    ({"samples.classes": (12,)}, "class 12 is not from 0"),
    ({"samples.metrics": ("gfid",)}, "config.reference is empty"),
    ({"export.crop": "crop"}, "crop"),
  ],
)
def test_every_stage_is_checked_before_the_first(
  changes, message, config, tmp_path
):
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    export_and_diffuse.run(config, epath.Path(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
