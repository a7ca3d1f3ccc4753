"""Traces of a few steps, for xprof or TensorBoard: planned, or when asked."""

import logging
import signal
import threading

import jax

_LOG = logging.getLogger(__name__)


class Profiler:
  """Traces steps of the training loop of this process."""

  def __init__(
    self, first: int, directory: str, *, start: int, steps: int, on_signal: int
  ):
    """Listens for SIGUSR1, and traces `on_signal` steps when it comes.

    Of a run that begins after the step `first`, `steps` steps are traced after
    `start` others; 0: none. The `directory` is local or gs://.
    """
    self._from = first + start + 1 if steps else None
    self._steps, self._on_signal = steps, on_signal
    self._directory = directory
    self._asked = False
    self._last: int | None = None  # of the trace that runs
    if threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGUSR1, self._ask)

  def _ask(self, *_) -> None:
    self._asked = True

  def before(self, step: int) -> None:
    """Begins a trace where one is due; call it before a step is dispatched."""
    if self._last is not None:
      return
    steps = self._steps if step == self._from else 0
    if self._asked:
      steps = max(steps, self._on_signal)
    self._asked = False
    if steps:
      self._last = step + steps - 1
      jax.profiler.start_trace(self._directory)

  def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Ends the trace if the step is its last; waits for `metrics` then."""
    if step == self._last:
      jax.block_until_ready(metrics)
      self.close()

  def close(self) -> None:
    """Ends a trace that runs: the last steps of a run can be too few."""
    if self._last is None:
      return
    self._last = None
    jax.profiler.stop_trace()
    _LOG.info("traced to %s", self._directory)
