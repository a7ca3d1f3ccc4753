"""The training loop, the same for every model.

It hands batches to a jitted step, fetches the metrics of a step after the next
one is dispatched, and calls for evaluations and checkpoints. What is logged are
means over the steps since the last log. A loss that is not finite stops it
before anything is saved.
"""

import collections
import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from clu import metrics as clu_metrics
from jax.experimental import multihost_utils

from dcae_jax.runs import live_line, signals, stopwatch
from dcae_jax.training import profiler as profiler_lib
from dcae_jax.training import watchdog as watchdog_lib

_LOG = logging.getLogger(__name__)
State = Any
_PROMISE = "will stop where it can go on"
_LAST_VALUES = ("learning_rate",)  # of these, a mean says less


@runtime_checkable
class DeviceBatches(Protocol):
  """A checkpointable iterator over batches on the devices."""

  def __next__(self) -> Any: ...

  def get_state(self) -> dict[str, Any]: ...


@runtime_checkable
class Writer(Protocol):
  def scalars(self, step: int, values: dict[str, float]) -> None: ...


class Sigterm:
  """Remembers SIGTERM, SIGINT or SIGHUP, so that a loop can save and leave.

  Attributes:
    received: by this process.
    promise: what it is answered with, "will save after step 12".
  """

  def __init__(self, *, each_alone: bool = False):
    """Listens; `each_alone` where processes need not stop together."""
    self.received = False
    self.promise = _PROMISE
    if threading.current_thread() is not threading.main_thread():
      return
    # Of many processes, jax's own notifier hears SIGTERM, and all agree on a
    # step.
    is_alone = each_alone or jax.process_count() == 1
    for number in signals.STOPS:
      if is_alone:
        signals.handle(number, self._receive)
      elif number != signal.SIGTERM:
        signals.handle(number, _terminate)
    signals.promise(lambda: self.promise)

  def _receive(self, *_) -> None:
    self.received = True

  def requested(self, step: int) -> bool:
    """True once any process was told to stop; all agree on the step."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self.received


def _terminate(*_) -> None:
  """SIGINT to one of many processes: as SIGTERM, of which all learn."""
  os.kill(os.getpid(), signal.SIGTERM)


class Program(NamedTuple):
  """What is run.

  Attributes:
    step: jitted, `(state, batch) -> (state, metrics)`.
    evaluate: `(step, state) -> metrics`, which may be none.
    images_per_step: of the global batch.
    peak_rate: steps per second at the devices' published peak; 0: not known.
    prepare: called with a batch before the step; may compile, which is no time
      of training.
  """

  step: Callable[[State, Any], tuple[State, dict[str, jax.Array]]]
  evaluate: Callable[[int, State], dict[str, float]]
  images_per_step: int
  peak_rate: float
  prepare: Callable[[Any], object]


class Cadence(NamedTuple):
  """Numbers of steps between logs, evaluations and checkpoints; 0: never.

  Attributes:
    log: of the written metrics, each with a line on the terminal.
    evaluate: also after the last step.
    checkpoint: also after the last step.
    seconds: after which a step has a line on the terminal in any case.
  """

  log: int
  evaluate: int
  checkpoint: int
  seconds: float


class Outlets(NamedTuple):
  """Where it all goes, and who may end it early.

  `save(step, state, position of the data)` may return before it is done.
  """

  save: Callable[[int, State, dict[str, Any]], None]
  writer: Writer
  sigterm: Sigterm
  profiler: profiler_lib.Profiler


def run(
  program: Program,
  state: State,
  batches: DeviceBatches,
  steps: range,
  evaluates_first: bool,
  cadence: Cadence,
  outlets: Outlets,
) -> tuple[State, int]:
  """Trains; returns the state and the last step.

  Args:
    program: what is run.
    state: before the first of the steps; donated.
    batches: on the devices.
    steps: to be done, counted from 1.
    evaluates_first: before the first of them: what training changes is seen
      beside it.
    cadence: of logs, evaluations and checkpoints.
    outlets: for metrics and checkpoints.

  Raises:
    FloatingPointError: a metric is not finite.
  """
  done, last_step = steps.start - 1, steps.stop - 1
  is_due = lambda every, step: (
    step == last_step or bool(every and step % every == 0)
  )
  log = _Log(done, last_step, program, cadence.seconds, outlets.writer)
  live = contextlib.ExitStack()
  pending = None  # (step, metrics) whose values are not fetched yet
  has_checkpoint = done > 0
  watchdog = watchdog_lib.Watchdog()

  @contextlib.contextmanager
  def waiting_for(part: str, what: str) -> Iterator[None]:
    with log.part(part), watchdog.waiting_for(what):
      yield

  def settle(stays: bool = False) -> None:
    nonlocal pending
    if pending is None:
      return
    (step, metrics), pending = pending, None
    with waiting_for("step", f"the devices to end step {step}"):
      metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    named = {f"train/{k}": v for k, v in metrics.items()}
    _check_finite(step, named, has_checkpoint)
    log.add(step, metrics, is_due(cadence.log, step), stays)

  def promise(step: int) -> None:
    if step <= last_step:
      outlets.sigterm.promise = f"will save after step {step}"

  def evaluate(step: int) -> None:
    with live_line.timing(f"step {step}/{last_step}  evaluating"):
      values = program.evaluate(step, state)
    _check_finite(step, values, has_checkpoint)
    if values:
      outlets.writer.scalars(step, values)
      text = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
      _LOG.info("evaluated  %s", text)

  try:
    live.enter_context(live_line.showing(lambda: log.words))
    promise(steps.start)
    if evaluates_first:
      with log.part("pause"):
        evaluate(done)
    for step in steps:
      with watchdog.waiting_for(f"the batch of step {step} to be loaded"):
        began = time.perf_counter()
        batch = next(batches)
        seconds = time.perf_counter() - began
      # The devices miss nothing while they are at the step before.
      is_idle = pending is None or _are_ready(pending[1])
      log.count("data" if is_idle else "step", seconds)
      with waiting_for("pause", f"the program of step {step}"):
        program.prepare(batch)
      outlets.profiler.before(step)
      with waiting_for("step", f"the devices to begin step {step}"):
        state, metrics = program.step(state, batch)
      settle()
      pending = (step, metrics)
      outlets.profiler.after(step, metrics)
      done = step
      stop = outlets.sigterm.requested(step)
      promise(step + 1)
      evaluates = is_due(cadence.evaluate, step)
      saves = stop or is_due(cadence.checkpoint, step)
      if evaluates or saves:
        settle(stays=True)
        with log.part("pause"):
          if saves:  # first: an evaluation that fails loses nothing
            outlets.save(step, state, batches.get_state())
            has_checkpoint = True
          if evaluates:
            evaluate(step)
      if stop and step < last_step:
        _LOG.info("stopped: saved step %d of %d", step, last_step)
        break
    settle()
  finally:
    outlets.sigterm.promise = _PROMISE
    outlets.profiler.close()
    watchdog.close()
    live.close()
  return state, done


def _are_ready(metrics: dict[str, Any]) -> bool:
  """Whether the devices have computed them."""
  return all(x.is_ready() for x in metrics.values() if isinstance(x, jax.Array))


def _check_finite(
  step: int, metrics: dict[str, float], has_checkpoint: bool
) -> None:
  advice = "start again, in another --workdir,"
  if has_checkpoint:
    advice = (
      "the last good checkpoint is kept: start another --workdir from it, with "
      "--config.init_from and"
    )
  for name, value in metrics.items():
    if not math.isfinite(value):
      raise FloatingPointError(
        f"{name} is {value} at step {step}; {advice} with a lower "
        "config.optimizer.learning_rate or a config.optimizer.clip_norm"
      )


class _Log:
  """Metrics and speeds since the last log, in lines and on the live one.

  Speeds are without the time of evaluations and checkpoints.

  Attributes:
    words: for the live line.
  """

  def __init__(
    self, done: int, last_step: int, program: Program, patience: float,
    writer: Writer,
  ):  # fmt: skip
    """After `patience` seconds a step has a line in any case."""
    self.words = f"step {done}/{last_step}"
    self._last_step, self._program = last_step, program
    self._patience, self._writer = patience, writer
    self._begin(done)
    self._last_line = self._began

  def _begin(self, step: int) -> None:
    self._began, self._first = time.perf_counter(), step
    self._metrics: dict[str, clu_metrics.Metric] = {}
    self._parts = collections.Counter()

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Of the time: waiting for data, for a step on the devices, or a pause."""
    start = time.perf_counter()
    yield
    self.count(name, time.perf_counter() - start)

  def count(self, name: str, seconds: float) -> None:
    self._parts[name] += seconds

  def add(
    self, step: int, metrics: dict[str, float], is_due: bool, stays: bool
  ) -> None:
    """Takes in the metrics of a step, after which a log may be due.

    On a terminal they are words of its live line; a line that `stays` is above.
    """
    for name, value in metrics.items():
      is_last = name in _LAST_VALUES
      kind = clu_metrics.LastValue if is_last else clu_metrics.Average
      # On the host: the values are there, and dispatching costs more.
      new = kind(total=np.float64(value), count=1)
      before = self._metrics.get(name)
      self._metrics[name] = new if before is None else before.merge(new)
    now, is_live = time.perf_counter(), live_line.is_on()
    patience = live_line.SECONDS if is_live else self._patience
    is_said = is_due or (is_live and stays)
    if not is_said and now - self._last_line <= patience:
      return
    self._last_line = now
    means = {name: float(x.compute()) for name, x in self._metrics.items()}
    speeds = self._speeds(step, now)
    done, losses, rate, images, left = self._parts_of_line(step, means, speeds)
    # A narrow terminal shows the first of them.
    self.words = "  ".join((done, left, rate, losses, images))
    if stays or not is_live:
      _LOG.info("  ".join((done, losses, rate, images, left)))
    if is_due:
      values = (means | speeds).items()
      self._writer.scalars(step, {f"train/{k}": v for k, v in values})
      self._begin(step)

  def _speeds(self, step: int, now: float) -> dict[str, float]:
    data, device, pause = (self._parts[x] for x in ("data", "step", "pause"))
    seconds = max(now - self._began - pause, 1e-9)
    steps = step - self._first
    rate = steps / seconds
    speeds = {
      "steps_per_second": rate,
      "images_per_second": rate * self._program.images_per_step,
      "seconds/data": data / steps,
      "seconds/step": device / steps,
      "seconds/host": max(seconds - data - device, 0.0) / steps,
    }
    if peak_rate := self._program.peak_rate:
      speeds["model_flops_utilization"] = rate / peak_rate
    return speeds

  def _parts_of_line(
    self, step: int, means: dict[str, float], speeds: dict[str, float]
  ) -> tuple[str, ...]:
    rate = speeds["steps_per_second"]
    losses = "  ".join(
      f"{name.removeprefix('loss/')} {value:.4f}"
      for name, value in means.items()
      if name.startswith("loss/")
    )
    return (
      f"step {step}/{self._last_step}",
      losses,
      f"{rate:.2f} steps/s",
      f"{speeds['images_per_second']:.1f} images/s",
      f"left {stopwatch.clock((self._last_step - step) / rate)}",
    )
