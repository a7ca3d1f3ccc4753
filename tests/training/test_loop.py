import itertools
import logging
import os
import re
import signal
import time

import jax
import jax.numpy as jnp
import pytest
import terminal as terminals

from dcae_jax.runs import live_line
from dcae_jax.training import loop, profiler


class _World:
  """A step that counts, and everything the loop calls, written down."""

  def __init__(self, loss=lambda step: 1.0):
    self.calls = []
    self._loss = loss
    self._position = itertools.count(1)
    self.state = None
    self.values = {}

  def __next__(self):
    self.state = next(self._position)
    return jnp.float32(self.state)

  def get_state(self):
    return {"next": self.state}

  def set_state(self, state):
    raise AssertionError("the loop does not move the data")

  def step(self, state, batch):
    self.calls.append(("step", state + 1))
    metrics = {
      "loss/l1": jnp.float32(self._loss(state + 1)),
      "learning_rate": jnp.float32(state + 1),
    }
    return state + 1, metrics

  def scalars(self, step, values):
    if "train/loss/l1" in values:
      self.calls.append(("log", step))
      self.values[step] = values

  def evaluate(self, step, state):
    assert step == state
    self.calls.append(("evaluate", step))
    return {"eval/psnr": 20.0}

  def save(self, step, state, data_state):
    assert data_state == {"next": step} and step == state
    self.calls.append(("save", step))

  def run(
    self, first=0, last=6, log=1, evaluate=3, checkpoint=2, seconds=1e9,
    sigterm=None,
  ):  # fmt: skip
    return loop.run(
      loop.Program(self.step, self.evaluate, 8, 1e3, lambda batch: None),
      first,
      self,
      range(first + 1, last + 1),
      first == 0,
      loop.Cadence(log, evaluate, checkpoint, seconds),
      loop.Outlets(
        save=self.save,
        writer=self,
        sigterm=sigterm or loop.Sigterm(),
        profiler=profiler.Profiler(
          first=first, start=0, steps=0, on_signal=3, directory=""
        ),
      ),
    )

  def of(self, kind):
    return [step for name, step in self.calls if name == kind]


def test_logs_evaluations_and_checkpoints_follow_the_cadence():
  world = _World()
  assert world.run() == (6, 6)
  assert world.of("log") == [1, 2, 3, 4, 5, 6]
  assert world.of("evaluate") == [0, 3, 6]
  assert world.of("save") == [2, 4, 6]


def test_a_run_is_evaluated_before_its_first_step_and_not_when_it_goes_on():
  world = _World()
  world.run(evaluate=0, last=2)
  assert world.calls[0] == ("evaluate", 0)
  assert world.of("evaluate") == [0, 2]
  world.calls.clear()
  world.run(evaluate=0, first=2, last=4)
  assert world.of("evaluate") == [4]


def test_logged_metrics_are_means_since_the_last_log():
  """And the learning rate is the last one."""
  world = _World(lambda step: step**2)
  world.run(last=8, log=3, evaluate=0, checkpoint=2)
  losses = {k: v["train/loss/l1"] for k, v in world.values.items()}
  assert losses == {3: 14 / 3, 6: 77 / 3, 8: 113 / 2}
  rates = {k: v["train/learning_rate"] for k, v in world.values.items()}
  assert rates == {3: 3, 6: 6, 8: 8}


def test_after_a_resume_means_are_of_the_steps_since():
  whole, resumed = (_World(lambda step: step**2) for _ in range(2))
  whole.run(last=8, log=4)
  resumed.run(last=2, log=4)
  resumed._position = itertools.count(3)
  resumed.run(first=2, last=8, log=4)
  loss = lambda world, step: world.values[step]["train/loss/l1"]
  assert loss(resumed, 4) == (9 + 16) / 2
  assert loss(resumed, 8) == loss(whole, 8) == (25 + 36 + 49 + 64) / 4


def test_slow_steps_have_lines_between_the_logs(caplog):
  """On the terminal alone: what is written does not depend on the time."""
  caplog.set_level(logging.INFO)
  world = _World(float)
  world.run(last=4, log=4, evaluate=0, checkpoint=0, seconds=0.0)
  lines = [x for x in caplog.messages if x.startswith("step ")]
  found = [line.split("  ")[:2] for line in lines]
  means = ("1.0000", "1.5000", "2.0000", "2.5000")
  assert found == [
    [f"step {i}/4", f"l1 {mean}"] for i, mean in enumerate(means, start=1)
  ]
  assert world.of("log") == [4]
  caplog.clear()
  world = _World()
  world.run(last=4, log=4, evaluate=0, checkpoint=0)
  assert len([x for x in caplog.messages if x.startswith("step ")]) == 1


def test_on_a_terminal_steps_are_on_its_live_line(monkeypatch, caplog):
  """Above it are lines of those that are evaluated, saved or the last."""
  caplog.set_level(logging.INFO)
  terminal = terminals.Terminal(columns=78)
  monkeypatch.setattr(live_line, "SECONDS", 0.01)

  class World(_World):
    def step(self, state, batch):
      time.sleep(0.1)
      return super().step(state, batch)

    def evaluate(self, step, state):
      time.sleep(0.1)
      return super().evaluate(step, state)

  world = World(float)
  with (
    terminals.standard_streams(terminal, monkeypatch),
    live_line.on_terminal(),
  ):
    world.run(last=6, log=1, evaluate=4, checkpoint=0, seconds=0.0)
    print("the end")
    assert terminal.wait_for("the end\r\n") == ["the end", ""]
  lines = [x.split("  ")[0] for x in caplog.messages if x.startswith("step ")]
  assert lines == ["step 4/6", "step 6/6"]
  assert world.of("log") == [1, 2, 3, 4, 5, 6]
  drawn = terminal.received.decode()
  assert "step 4/6  evaluating  0:00:00" in drawn
  assert re.search(
    r"step 2/6  left 0:00:\d\d  [\d.]+ steps/s  l1 2.0000  ", drawn
  )


def test_metrics_are_fetched_after_the_next_step_is_dispatched():
  world = _World()
  world.run(evaluate=0, checkpoint=0, last=3)
  assert world.calls[1:5] == [
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
    world.run(log=100)
  assert world.of("save") == [2]


def test_only_a_checkpoint_that_there_is_is_advised():
  for checkpoint, advice in (
    (2, "checkpoint is kept: .*init_from"),
    (0, "again"),
  ):
    world = _World(lambda step: float("nan") if step == 4 else 1.0)
    with pytest.raises(FloatingPointError, match=advice):
      world.run(evaluate=0, checkpoint=checkpoint)


def test_an_evaluation_that_fails_loses_no_checkpoint():
  world = _World()
  evaluate = world.evaluate

  def fail(step, state):
    if step == 3:
      raise OSError(5, "an image is gone")
    return evaluate(step, state)

  world.evaluate = fail
  with pytest.raises(OSError, match="an image is gone"):
    world.run(evaluate=3, checkpoint=3)
  assert world.of("save") == [3]


def test_sigterm_saves_and_leaves():
  world = _World()
  sigterm = loop.Sigterm()
  evaluate = world.evaluate

  def evaluate_and_terminate(step, state):
    if step == 3:
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
  step = world.step
  world.step = lambda *a: (time.sleep(0.05), step(*a))[1]
  found = _times(world, _Slow(world, 0.1))
  data, step, host = (
    found[f"train/seconds/{part}"] for part in ("data", "step", "host")
  )
  assert data >= 0.1 and step >= 0.05 and host >= 0
  total = 1 / found["train/steps_per_second"]
  assert data + step + host == pytest.approx(total, rel=1e-6)


def test_reading_while_the_devices_work_is_no_wait():
  """They take many times as long for a step as a batch does."""
  world, x = _World(), jnp.ones((400, 400)) / 400

  @jax.jit
  def slow(x):
    return jax.lax.fori_loop(0, 200, lambda _, x: x @ x, x).sum()

  slow(x).block_until_ready()  # compiled
  world.step = lambda state, batch: (state + 1, {"loss/l1": slow(x)})
  batches = _Slow(world, 0.01)
  found = _times(world, batches)
  first, *others = batches.seconds[:4]  # nothing is done meanwhile
  assert first <= 4 * found["train/seconds/data"] < first + sum(others)
  assert 4 * found["train/seconds/step"] >= sum(others)


def _times(world, batches):
  """What the log says of four steps."""
  values = {}
  world.scalars = lambda step, found: values.update(found)
  loop.run(
    loop.Program(world.step, world.evaluate, 8, 0.0, lambda batch: None),
    0,
    batches,
    range(1, 5),
    True,
    loop.Cadence(4, 0, 0, 1e9),
    loop.Outlets(
      world.save,
      world,
      loop.Sigterm(),
      profiler.Profiler(first=0, start=0, steps=0, on_signal=3, directory=""),
    ),
  )
  return values


class _Slow:
  """Batches that take their time, which `seconds` has."""

  def __init__(self, world, least):
    self._load, self.get_state = world.__next__, world.get_state
    self._least, self.seconds = least, []

  def __next__(self):
    start = time.perf_counter()
    time.sleep(self._least)
    self.seconds.append(time.perf_counter() - start)
    return self._load()
