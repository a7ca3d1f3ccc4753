"""An autoencoder's training where each batch has one of several shapes."""

import json
import logging
import math
import shutil

import jax
import numpy as np
import pytest
import sized
from etils import epath
from PIL import Image

import dcae_jax
from dcae_jax import errors
from dcae_jax.data import sources
from dcae_jax.setup import autoencoder_training
from dcae_jax.tasks import train_autoencoder


@pytest.fixture
def at_ratios(tiny_config, monkeypatch, photographs):
  """The config of a run whose source knows the sizes of images."""
  monkeypatch.setitem(sources.KINDS, "sized", sized.folder)

  def create(phase, **changes):
    defaults = {
      "data.source.kind": "sized", "data.max_aspect_ratio": 4.0, "steps": 8,
      "batch_size": 4, "mesh.data": 4, "mesh.spatial": 2,
    }  # fmt: skip
    return tiny_config(phase, **(defaults | changes))

  return create


def _losses(run):
  lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
  key = "train/loss/total"
  return {x["step"]: x[key] for x in lines if key in x}


def _programs(caplog):
  lines = [x.getMessage() for x in caplog.records]
  return [x for x in lines if x.startswith("compiling the training step")]


def test_a_run_at_several_shapes_goes_on_exactly_and_compiles_each_once(
  at_ratios, tmp_path, caplog
):
  whole, again = tmp_path / "whole", tmp_path / "again"
  config = at_ratios(1, **{"checkpoint.every": 4})
  with caplog.at_level(logging.INFO):
    assert train_autoencoder.run(config, epath.Path(whole))
  (described,) = [
    x.getMessage() for x in caplog.records if "shapes:" in x.getMessage()
  ]
  shapes = int(described.split()[2])
  assert 2 <= shapes <= len(autoencoder_training.build(config).shapes)
  programs = _programs(caplog)
  assert len(set(programs)) == len(programs) <= shapes + 1  # and the square
  assert len(programs) > 2
  shutil.copytree(whole, again)
  shutil.rmtree(again / "checkpoints" / "8")
  (again / "result.json").unlink()
  assert train_autoencoder.run(config, epath.Path(again))
  assert _losses(whole) == _losses(again) and len(_losses(again)) == 8
  a, b = (
    jax.tree.leaves(dcae_jax.load(run).variables) for run in (whole, again)
  )
  for x, y in zip(a, b, strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
  result = json.loads((whole / "result.json").read_text())
  assert math.isfinite(result["eval/psnr"])


@pytest.mark.parametrize("phase", [2, 3])
def test_losses_and_the_discriminator_take_any_shape(at_ratios, phase):
  changes = {"lpips.weight": 0.25, "lpips.network": "alexnet"}
  config = at_ratios(phase, resolution=128, **changes)
  training = autoencoder_training.build(config, predecessor_is_pending=True)
  state, images, weights = training.arguments()
  for height, width in ((64, 256), (256, 64)):
    assert (height, width) in training.shapes
    batch = jax.ShapeDtypeStruct((4, height, width, 3), images.dtype)
    after, metrics = jax.eval_shape(training.step(), state, batch, weights)
    assert {"loss/l1", "loss/lpips"} <= metrics.keys()
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)


def test_rows_of_all_shapes_divide_over_the_mesh(at_ratios):
  config = at_ratios(1, **{"mesh.data": 1, "mesh.spatial": 8, "resolution": 64})
  shapes = autoencoder_training.build(config).shapes
  assert len(shapes) > 3 and all(height % 8 == 0 for height, _ in shapes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data.source.kind": "folder"}, "task prepare"),
    ({"data.max_aspect_ratio": 1.01}, "no shape but the square"),
    ({"data.max_aspect_ratio": 0.25}, r"max_aspect_ratio=0\.25 is below 1"),
    ({"lpips.weight": 0.25, "lpips.network": "alexnet"},
     "the shortest side is 16, is too small for LPIPS"),
  ],
)  # fmt: skip
def test_what_cannot_have_aspect_ratios_is_refused_before_training(
  at_ratios, tmp_path, changes, message
):
  with pytest.raises(errors.UserError, match=message):
    train_autoencoder.run(at_ratios(1, **changes), epath.Path(tmp_path / "run"))
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_small_images_are_looked_up_not_read(at_ratios, tmp_path):
  """Where sizes are known: one that is damaged is never opened."""
  root = tmp_path / "images"
  root.mkdir()
  for i in range(4):
    Image.new("RGB", (64, 40), (40 * i,) * 3).save(root / f"{i}.png")
  Image.new("RGB", (20, 20)).save(root / "small.png")
  config = at_ratios(1, **{"data.source.path": str(root), "data.min_size": 32})
  inputs = train_autoencoder.open_inputs(config)
  ((source, _),) = inputs.training
  keys = [source.key(i) for i in range(len(source))]
  assert keys == ["0.png", "1.png", "2.png", "3.png"]
