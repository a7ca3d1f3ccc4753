import os
import signal

import jax
import jax.numpy as jnp
import pytest

from dcae_jax.training import profiler


@pytest.fixture
def traced(monkeypatch):
  """What starts and stops, instead of traces."""
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda d: calls.append(d))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
  handler = signal.getsignal(signal.SIGUSR1)
  yield calls
  signal.signal(signal.SIGUSR1, handler)


def _run(p, calls, first, last, at=None):
  for step in range(first + 1, last + 1):
    if step == at:
      os.kill(os.getpid(), signal.SIGUSR1)
    p.before(step)
    calls.append(step)
    p.after(step, {"loss": jnp.zeros(())})
  p.close()


def test_planned_steps_are_traced(traced):
  p = profiler.Profiler(
    first=10, start=2, steps=2, on_signal=3, directory="here"
  )
  _run(p, traced, 10, 16)
  assert traced == [11, 12, "here", 13, 14, "stop", 15, 16]


def test_a_signal_traces_the_next_steps_and_a_short_rest(traced):
  p = profiler.Profiler(first=0, start=0, steps=0, on_signal=3, directory="d")
  _run(p, traced, 0, 5, at=2)
  assert traced == [1, "d", 2, 3, 4, "stop", 5]
  traced.clear()
  _run(p, traced, 5, 7, at=7)
  assert traced == [6, "d", 7, "stop"]
