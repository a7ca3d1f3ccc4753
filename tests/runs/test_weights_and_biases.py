"""The package itself, offline or with a server that is not there."""

import json
import logging
import os
import socket
import struct
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image

from dcae_jax import errors
from dcae_jax.runs import metrics_writer, weights_and_biases
from dcae_jax.tasks import train_autoencoder

_BLOCK = 2**15


@pytest.fixture
def wandb(monkeypatch, tmp_path):
  """The package, offline, as if nobody had used it here before."""
  for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
    monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "of_the_user"))
  monkeypatch.setenv("HOME", str(tmp_path / "of_the_user"))
  monkeypatch.setenv("WANDB_MODE", "offline")
  import wandb

  yield wandb
  wandb.teardown()


@pytest.fixture
def workdir(tmp_path):
  workdir = epath.Path(tmp_path / "phase1")
  workdir.mkdir()
  config = {"task": "a", "optimizer": {"kind": "adamw"}, "workdir": "/then"}
  metrics_writer.write_json(workdir / "config.json", config)
  return workdir


def _writer(workdir, first_step=0):
  return metrics_writer.MetricsWriter(
    workdir, first_step, False, True, ("wandb",)
  )


def _records(folder):
  """Of an offline run: protocol buffers in the log format of LevelDB."""
  import wandb
  from wandb.proto import wandb_internal_pb2

  wandb.teardown()  # waits for what is written

  (file,) = folder.glob("*.wandb")
  data, at, record = file.read_bytes(), 7, b""
  while at < len(data):
    if _BLOCK - at % _BLOCK < 7:
      at += _BLOCK - at % _BLOCK
      continue
    _, length, kind = struct.unpack("<IHB", data[at : at + 7])
    record += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):  # whole, or its last part
      yield wandb_internal_pb2.Record.FromString(record)
      record = b""


def _history(folder):
  """Values by step."""
  rows = [
    {
      x.key or "/".join(x.nested_key): json.loads(x.value_json)
      for x in record.history.item
    }
    for record in _records(folder)
    if record.HasField("history")
  ]
  return {row["_step"]: row for row in rows}


def _run(folder):
  return next(x.run for x in _records(folder) if x.HasField("run"))


def test_metrics_and_pictures_arrive(wandb, workdir, caplog):
  with caplog.at_level(logging.INFO, "dcae_jax"):
    writer = _writer(workdir)
  pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
  for step in (1, 2, 3):
    writer.scalars(step, {"train/loss/l1": step / 8})
  writer.image(3, "samples", pixels)
  writer.image(3, "grey", pixels[..., :1])
  writer.scalars(3, {"eval/psnr": 20.0})
  writer.close()
  (folder,) = workdir.glob("wandb/offline-run-*")
  found = _history(folder)
  losses = {step: row["train/loss/l1"] for step, row in found.items()}
  assert losses == {1: 0.125, 2: 0.25, 3: 0.375}
  assert found[3]["eval/psnr"] == 20
  for name, expected in (("samples", pixels), ("grey", pixels[..., 0])):
    with Image.open(folder / "files" / found[3][f"{name}/path"]) as image:
      np.testing.assert_array_equal(np.asarray(image), expected)
  run = _run(folder)
  assert (run.project, run.display_name) == ("dcae_jax", "phase1")
  assert run.run_id == (workdir / "wandb_id").read_text()
  assert not run.git.commit
  config = {x.key: json.loads(x.value_json) for x in run.config.update}
  assert config["optimizer"] == {"kind": "adamw"}
  sent = {x for *_, names in os.walk(folder / "files") for x in names}
  assert all(name.endswith((".png", ".txt", ".json", ".yaml")) for name in sent)
  assert f"Weights & Biases: offline; `wandb sync {folder}`" in caplog.text


def test_a_restart_goes_on_in_the_same_run(wandb, workdir, monkeypatch):
  monkeypatch.setenv("WANDB_PROJECT", "mine")
  for first_step in (0, 2):
    writer = _writer(workdir, first_step)
    writer.scalars(first_step + 1, {"train/loss/l1": 0.5})
    writer.close()
  runs = [_run(folder) for folder in workdir.glob("wandb/offline-run-*")]
  assert [run.project for run in runs] == ["mine", "mine"]
  assert len({run.run_id for run in runs}) == 1


def test_steps_that_are_there_are_not_sent_again(wandb, workdir, capfd):
  """Those after the checkpoint that a killed run goes on from."""
  writer = _writer(workdir)
  for step in (1, 2, 3, 2, 3, 4):
    writer.scalars(step, {"train/loss/l1": step / 8})
  writer.close()
  (folder,) = workdir.glob("wandb/offline-run-*")
  assert list(_history(folder)) == [1, 2, 3, 4]
  assert not capfd.readouterr().err


def test_without_the_package_a_run_ends_before_anything_is_written(
  tiny_config, monkeypatch, tmp_path
):
  monkeypatch.setitem(sys.modules, "wandb", None)
  workdir = epath.Path(tmp_path / "run")
  with pytest.raises(
    errors.UserError, match=r'=wandb needs .* pip install "dcae_jax\[wandb\]"$'
  ):
    train_autoencoder.run(tiny_config(1, writers=("wandb",)), workdir)
  assert not workdir.exists()


def test_a_folder_of_runs_is_not_the_package(monkeypatch, tmp_path):
  """Python takes any folder for a package."""
  (tmp_path / "wandb").mkdir()
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  monkeypatch.setattr(sys, "path", [str(tmp_path)])
  with pytest.raises(errors.UserError, match="not installed"):
    weights_and_biases.WeightsAndBiases.check()


def test_who_is_not_logged_in_is_told(wandb, workdir, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "online")
  monkeypatch.delenv("WANDB_API_KEY", raising=False)
  with pytest.raises(errors.UserError, match=r"refuses: .*key.*WANDB_MODE=off"):
    _writer(workdir)


def test_without_a_server_a_run_is_kept_in_files(
  wandb, workdir, monkeypatch, caplog
):
  with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))  # and does not listen
    port = unused.getsockname()[1]
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    writer = _writer(workdir)
    writer.scalars(1, {"train/loss/l1": 0.5})
    writer.close()
  assert "does not answer" in caplog.text
  (folder,) = workdir.glob("wandb/offline-run-*")
  assert _history(folder)[1]["train/loss/l1"] == 0.5
