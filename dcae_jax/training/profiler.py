"""Traces of a few steps, for xprof or TensorBoard: planned, or when asked."""

import logging
import threading

import jax

from dcae_jax.runs import signals

_LOG = logging.getLogger(__name__)


class Profiler:
  """Traces steps of the training loop of this process."""

  def __init__(
    self, first: int, directory: str, *, start: int, steps: int, on_signal: int
  ):
    """Traces `on_signal` steps when SIGUSR1 comes, or has come before.

    Of a run that begins after the step `first`, `steps` steps are traced after
    `start` others; 0: none. The `directory` is local or gs://.
    """
    self._from = first + start + 1 if steps else None
    self._steps, self._on_signal = steps, on_signal
    self._directory = directory
    self._last: int | None = None  # of the trace that runs
    if threading.current_thread() is threading.main_thread():
      signals.listen_for_traces()

  def before(self, step: int) -> None:
    """Begins a trace where one is due; call it before a step is dispatched."""
    if self._last is not None:
      return
    steps = self._steps if step == self._from else 0
    if signals.trace_asked.is_set():
      signals.trace_asked.clear()
      steps = max(steps, self._on_signal)
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
