"""The package itself, offline or with a server that is not there."""

import contextlib
import http.server
import io
import json
import logging
import os
import socket
import struct
import sys
import threading
import time

import numpy as np
import pytest
from etils import epath
from PIL import Image

from dcae_jax import errors
from dcae_jax.runs import metrics_writer, weights_and_biases
from dcae_jax.tasks import train_autoencoder

_BLOCK = 2**15
PROJECT = {"id": "p", "name": "dcae_jax", "entity": {"id": "e", "name": "me"}}


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


class Server(http.server.BaseHTTPRequestHandler):
  """As much of theirs as a run needs; keeps what it was sent."""

  resumed, history = None, ""

  def do_POST(self):
    size = int(self.headers.get("Content-Length", 0))
    body, data = self.rfile.read(size).decode(), {}
    if self.path.endswith("/file_stream"):
      Server.history += body
    elif "RunResumeStatus" in body:
      data = {"model": Server.resumed}
    elif "UpsertBucket" in body:
      bucket = {"id": "b", "name": "run", "project": PROJECT}
      data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
    elif "CreateRunFiles" in body:
      data = {"createRunFiles": {"runID": "b", "files": []}}
    answer = json.dumps({"data": data}).encode()
    self.send_response(200)
    self.send_header("Content-Length", str(len(answer)))
    self.end_headers()
    self.wfile.write(answer)

  do_PUT = do_POST  # noqa: N815

  def log_message(self, *_):
    pass


@pytest.fixture
def server(wandb, monkeypatch):
  """Online, with a server on this machine, until the stack is closed."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
  thread = threading.Thread(target=server.serve_forever, args=(0.02,))
  thread.start()
  monkeypatch.setattr(Server, "resumed", None)
  monkeypatch.setattr(Server, "history", "")
  address = f"http://127.0.0.1:{server.server_port}"
  monkeypatch.setenv("WANDB_BASE_URL", address)
  monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
  monkeypatch.setenv("WANDB_MODE", "online")
  with contextlib.ExitStack() as stack:
    stack.callback(thread.join)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    yield stack


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


def test_a_killed_run_goes_on_after_what_the_server_has(server, workdir, capfd):
  """Steps after its last checkpoint come again, and are not sent again."""
  tail = json.dumps([json.dumps({"_step": 7})])
  bucket = {
    "id": "b", "name": "run", "displayName": "a", "tags": [],
    "historyLineCount": 5, "eventsLineCount": 0, "logLineCount": 0,
    "historyTail": tail, "eventsTail": "[]", "summaryMetrics": "{}",
    "config": "{}", "wandbConfig": '{"t": 1}',
  }  # fmt: skip
  Server.resumed = PROJECT | {"bucket": bucket}
  writer = _writer(workdir, 5)
  for step in (6, 7, 8, 9):
    writer.scalars(step, {"train/loss/l1": step / 8})
  writer.close()
  steps = [step for step in range(12) if f'_step\\":{step}' in Server.history]
  assert steps == [8, 9]
  assert "WARNING" not in capfd.readouterr().err


def test_a_server_that_is_gone_is_not_waited_for(
  server, workdir, monkeypatch, capfd
):
  monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
  writer = _writer(workdir)
  writer.scalars(1, {"train/loss/l1": 0.5})
  server.close()
  began = time.monotonic()
  writer.scalars(2, {"train/loss/l1": 0.25})
  writer.close()
  assert time.monotonic() - began < 10
  assert "`wandb sync`" in capfd.readouterr().err
  (folder,) = workdir.glob("wandb/run-*")
  assert list(_history(folder)) == [1, 2]


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


@pytest.mark.parametrize(
  ("mode", "key", "message"),
  [
    ("online", "", "refuses: .*key.*WANDB_MODE=off"),
    ("online", "short", "refuses: .*40.*WANDB_MODE=off"),
    ("of", "", "refuses: .*'offline'.*input_value='of'"),
  ],
)
def test_who_is_not_logged_in_is_told_before_anything_is_written(
  mode, key, message, wandb, tiny_config, tmp_path, monkeypatch
):
  """And not asked, on a terminal, for a key."""
  monkeypatch.setenv("WANDB_MODE", mode)
  monkeypatch.setenv("WANDB_API_KEY", key)
  own, there = os.openpty()
  workdir = epath.Path(tmp_path / "run")
  with open(there, "r+b", buffering=0) as raw:
    terminal = io.TextIOWrapper(raw, write_through=True)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(errors.UserError, match=message) as refused:
      train_autoencoder.run(tiny_config(1, writers=("wandb",)), workdir)
  os.close(own)
  assert "\n" not in str(refused.value)
  assert not workdir.exists()


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
