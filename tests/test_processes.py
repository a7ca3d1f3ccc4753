"""A small pod: processes on loopback, eight devices among them."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import REPOSITORY, config_file
from etils import epath

from dcae_jax.tasks import train_autoencoder

STEPS = 12
SPEEDS = ("second", "left", "utilization")


# Who is gone is missed after 20 seconds, where it is 100 by default.
_MAIN = """
import functools, jax, runpy, sys
jax.distributed.initialize = functools.partial(
  jax.distributed.initialize, heartbeat_timeout_seconds=20
)
sys.argv[0] = "dcae_jax"
runpy.run_module("dcae_jax.main", run_name="__main__", alter_sys=True)
"""


def _losses(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
  """Step to metrics, without those of time."""
  found = {}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    values = json.loads(line)
    kept = {
      key: value
      for key, value in values.items()
      if key.startswith("train/") and not any(x in key for x in SPEEDS)
    }
    if kept:
      assert values["step"] not in found
      found[values["step"]] = kept
  return found


@pytest.fixture(scope="module")
def config(tiny_config):
  return tiny_config(
    1,
    **{
      "steps": STEPS,
      "mesh.data": -1,
      "checkpoint.every": 2,
      "optimizer.learning_rate": 1e-4,  # rounding grows less than at 1e-3
    },
  )


@pytest.fixture(scope="module")
def start(config, tmp_path_factory):
  """A function: starts processes of one run, eight devices in all."""
  file = config_file(tmp_path_factory.mktemp("processes") / "run.py", config)
  started = []

  def run(count, workdir):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("count=8", f"count={8 // count}")
    processes = [
      subprocess.Popen(
        [
          sys.executable, "-c", _MAIN, f"--config={file}",
          f"--workdir={workdir}", f"--coordinator_address={address}",
          f"--num_processes={count}", f"--process_id={i}",
        ],
        cwd=REPOSITORY,
        env=os.environ | {"XLA_FLAGS": flags},
        stderr=subprocess.PIPE,
        text=True,
      )
      for i in range(count)
    ]  # fmt: skip
    started.extend(processes)
    return processes

  yield run
  for process in started:
    process.kill()
    process.communicate()


def _end(processes, timeout=240):
  return [
    (process.communicate(timeout=timeout)[1], process.returncode)
    for process in processes
  ]


def _all_well(processes):
  for messages, status in _end(processes):
    assert status == 0, messages


def _wait_for_step(workdir, step, processes):
  deadline = time.monotonic() + 240
  while True:
    assert time.monotonic() < deadline
    for process in processes:
      assert process.poll() is None, process.communicate()[1]
    path = workdir / "metrics.jsonl"
    if path.exists() and path.read_text().count('"train/loss/total"') >= step:
      return
    time.sleep(0.02)


def _agree(found, expected):
  """Rounding differs with the order of sums, and grows with the steps.

  In twelve steps to 3.4e-4 of the gradient's norm.
  """
  assert sorted(found) == sorted(expected)
  for step, values in expected.items():
    for key in values:
      rtol = 1e-5 if step == 1 else 1e-3 if step <= STEPS // 2 else 5e-3
      np.testing.assert_allclose(
        found[step][key], values[key], rtol=rtol, err_msg=f"{key} at {step}"
      )


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
  """The metrics of one process with eight devices."""
  workdir = tmp_path_factory.mktemp("undisturbed") / "run"
  assert train_autoencoder.run(config, epath.Path(workdir))
  return _losses(workdir)


@pytest.fixture(scope="module")
def stopped(start, tmp_path_factory):
  """A run of two processes, of which one got SIGTERM after two steps."""
  workdir = tmp_path_factory.mktemp("stopped") / "run"
  processes = start(2, workdir)
  _wait_for_step(workdir, 2, processes)
  processes[1].send_signal(signal.SIGTERM)
  _all_well(processes)
  return workdir


def test_two_processes_compute_what_one_does_and_one_sigterm_saves_and_ends_all(
  stopped, undisturbed
):
  found = _losses(stopped)
  last = max(found)
  assert 2 <= last < STEPS - 3
  _agree(found, {step: undisturbed[step] for step in range(1, last + 1)})
  saved = [int(x.name) for x in (stopped / "checkpoints").iterdir()]
  assert max(saved) == last


def test_a_checkpoint_of_two_processes_is_resumed_by_four(
  start, stopped, undisturbed, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(stopped, workdir)
  _all_well(start(4, workdir))
  _agree(_losses(workdir), undisturbed)


def test_when_one_of_two_is_killed_the_other_stops_and_one_alone_goes_on(
  start, stopped, undisturbed, config, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(stopped, workdir)
  processes = start(2, workdir)
  _wait_for_step(workdir, max(_losses(workdir)) + 2, processes)
  processes[1].kill()
  killed = time.monotonic()
  messages, status = _end(processes[:1])[0]
  assert time.monotonic() - killed < 90
  assert status not in (0, -signal.SIGKILL)
  # The first device notices that a neighbour is gone, or jax that its
  # heartbeats are.
  assert (
    "another process has ended" in messages.splitlines()[-1]
    or "The following tasks are unhealthy" in messages
  ), (status, messages)
  assert train_autoencoder.run(config, epath.Path(workdir))
  _agree(_losses(workdir), undisturbed)
