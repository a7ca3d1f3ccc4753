import itertools
import os
import signal
import time

import jax.numpy as jnp
import pytest

from dcae_jax.training import loop, profiler


class _World:
  """A step that counts, and everything the loop calls, written down."""

  def __init__(self, loss=lambda step: 1.0):
    self.calls = []
    self._loss = loss
    self._position = itertools.count(1)
    self.state = None

  def __next__(self):
    self.state = next(self._position)
    return jnp.float32(self.state)

  def get_state(self):
    return {"next": self.state}

  def set_state(self, state):
    raise AssertionError("the loop does not move the data")

  def step(self, state, batch):
    self.calls.append(("step", state + 1))
    return state + 1, {"loss/l1": jnp.float32(self._loss(state + 1))}

  def scalars(self, step, values):
    if "train/loss/l1" in values:
      self.calls.append(("log", step))

  def evaluate(self, step, state):
    assert step == state
    self.calls.append(("evaluate", step))
    return {"eval/psnr": 20.0}

  def save(self, step, state, data_state):
    assert data_state == {"next": step} and step == state
    self.calls.append(("save", step))

  def run(self, first=0, last=6, log=1, evaluate=3, checkpoint=2, sigterm=None):
    return loop.run(
      self.step,
      first,
      self,
      first_step=first,
      last_step=last,
      images_per_step=8,
      flops_per_step=1e9,
      peak_flops=1e12,
      cadence=loop.Cadence(log, evaluate, checkpoint),
      save=self.save,
      evaluate=self.evaluate,
      writer=self,
      sigterm=sigterm or loop.Sigterm(),
      profiler=profiler.Profiler(
        first=first, start=0, steps=0, on_signal=3, directory=""
      ),
    )

  def of(self, kind):
    return [step for name, step in self.calls if name == kind]


def test_logs_evaluations_and_checkpoints_follow_the_cadence():
  world = _World()
  assert world.run() == (6, 6)
  assert world.of("log") == [1, 2, 3, 4, 5, 6]
  assert world.of("evaluate") == [3, 6]
  assert world.of("save") == [2, 4, 6]


def test_metrics_are_fetched_after_the_next_step_is_dispatched():
  world = _World()
  world.run(evaluate=0, checkpoint=0, last=3)
  assert world.calls[:4] == [
    ("step", 1),
    ("step", 2),
    ("log", 1),
    ("step", 3),
  ]


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved():
  world = _World(lambda step: float("nan") if step == 4 else 1.0)
  with pytest.raises(
    FloatingPointError, match=r"train/loss/l1 is nan at step 4"
  ):
    world.run()
  assert world.of("save") == [2]


def test_sigterm_saves_and_leaves():
  world = _World()
  sigterm = loop.Sigterm()
  evaluate = world.evaluate

  def evaluate_and_terminate(step, state):
    os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(step, state)

  world.evaluate = evaluate_and_terminate
  try:
    state, step = world.run(evaluate=3, checkpoint=0, sigterm=sigterm)
  finally:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
  assert (state, step) == (4, 4)
  assert world.of("save") == [4]


def test_the_time_of_a_step_is_told_apart():
  world = _World()
  values = []
  world.scalars = lambda step, found: values.append(found)
  step, load = world.step, world.__next__
  world.step = lambda *a: (time.sleep(0.05), step(*a))[1]
  batches = _Slow(load, world.get_state, 0.1)
  loop.run(
    world.step,
    0,
    batches,
    first_step=0,
    last_step=4,
    images_per_step=8,
    flops_per_step=0.0,
    peak_flops=1e12,
    cadence=loop.Cadence(4, 0, 0),
    save=world.save,
    evaluate=world.evaluate,
    writer=world,
    sigterm=loop.Sigterm(),
    profiler=profiler.Profiler(
      first=0, start=0, steps=0, on_signal=3, directory=""
    ),
  )
  found = next(x for x in values if "train/seconds/data" in x)
  data, step, host = (
    found[f"train/seconds/{part}"] for part in ("data", "step", "host")
  )
  assert data >= 0.1 and step >= 0.05 and host >= 0
  total = 1 / found["train/steps_per_second"]
  assert data + step + host == pytest.approx(total, rel=1e-6)


class _Slow:
  """Batches that take their time."""

  def __init__(self, load, get_state, seconds):
    self._load, self.get_state, self._seconds = load, get_state, seconds

  def __next__(self):
    time.sleep(self._seconds)
    return self._load()
