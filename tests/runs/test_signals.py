"""Signals to real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
import terminal as terminals
from conftest import REPOSITORY

_BUSY = """
import sys, time
import numpy as np
from dcae_jax.runs import signals
signals.listen()
if sys.argv[1]:
  signals.promise(lambda: sys.argv[1])
print("begun", flush=True)
x = np.ones((1500, 1500))
end = time.monotonic() + 4
while time.monotonic() < end:
  np.linalg.svd(x)  # seconds, in which Python's own handlers do not run
print("at its end", flush=True)
"""
_LIVE = """
import signal, time
from dcae_jax.runs import live_line, signals
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever nohup did
signals.listen()
with live_line.on_terminal(), live_line.showing(lambda: "live"):
  time.sleep(60)
"""


def _start(promise):
  process = subprocess.Popen(
    [sys.executable, "-c", _BUSY, promise],
    cwd=REPOSITORY,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "begun\n"
  time.sleep(0.2)
  return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_promises_to_stop_is_not_ended_before_a_second_signal(number):
  with _start("will save after step 7") as process:
    begun = time.monotonic()
    process.send_signal(number)
    line = process.stderr.readline()
    assert (
      line == f"{number.name}: will save after step 7; again to leave now\n"
    )
    assert time.monotonic() - begun < 1  # at once, in the middle of a call
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait() == 128 + number
    assert "left at once; run again" in process.stderr.read()


def test_who_leaves_at_once_leaves_no_half_of_a_live_line():
  terminal = terminals.Terminal(columns=80)
  with subprocess.Popen(
    [sys.executable, "-c", _LIVE],
    cwd=REPOSITORY,
    env=os.environ | {"TERM": "xterm"},
    stderr=terminal.there,
  ) as process:
    terminal.wait_for("live")
    process.send_signal(signal.SIGINT)
    assert process.wait() == 128 + signal.SIGINT
  lines = terminal.wait_for("is saved\r\n")
  assert lines == [
    "SIGINT: left at once; run again to go on from what is saved", ""
  ]  # fmt: skip


def test_signals_are_heard_when_the_terminal_is_gone():
  own, there = os.openpty()
  with subprocess.Popen(
    [sys.executable, "-c", _LIVE],
    cwd=REPOSITORY,
    env=os.environ | {"TERM": "xterm"},
    stderr=there,
  ) as process:
    assert b"live" in os.read(own, 100)
    os.close(own)
    process.send_signal(signal.SIGHUP)
    assert process.wait(10) == 128 + signal.SIGHUP
  os.close(there)


def test_closed_outputs_are_no_mistake():
  """With both closed, as of a daemon, nothing can be said of the mistake."""
  command = f"{sys.executable} -m dcae_jax report >&- 2>&-"
  found = subprocess.run(command, cwd=REPOSITORY, shell=True, check=False)
  assert found.returncode == 2


def test_a_signal_that_is_sent_twice_at_once_is_one():
  with _start("will save") as process:
    for _ in range(2):  # to a group, and by a script to its child
      process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert process.stdout.read() == "at its end\n"


def test_without_a_promise_a_stop_is_one_line_and_a_trace_is_no_end():
  with _start("") as process:
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait() == 128 + signal.SIGINT
    (line,) = process.stderr.read().splitlines()
    assert line.startswith("SIGINT: left at once")


@pytest.mark.parametrize("module", ["dcae_jax", "dcae_jax.main"])
def test_the_command_line_hears_signals_before_its_imports(module):
  """SIGUSR1, which asks for a trace, would end a process otherwise."""
  command = [sys.executable, "-m", module, "--config=nowhere.py"]
  with subprocess.Popen(
    command, cwd=REPOSITORY, env=os.environ, stderr=subprocess.PIPE, text=True
  ) as process:
    while not _hears(process.pid, signal.SIGUSR1):
      assert process.poll() is None
    with open(f"/proc/{process.pid}/maps") as file:
      assert "jaxlib" not in file.read()
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == 2 and "nowhere.py" in process.stderr.read()


def _hears(pid, number):
  with open(f"/proc/{pid}/status") as file:
    caught = next(x for x in file if x.startswith("SigCgt")).split()[1]
  return bool(int(caught, 16) >> (number - 1) & 1)
