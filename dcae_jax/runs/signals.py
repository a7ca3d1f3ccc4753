"""Signals to this process: heard from its first moment, whatever it does.

SIGTERM, SIGINT and SIGHUP ask it to stop; who can stop gently promises to, and
a second one does not wait for it. A thread hears them, since Python's own
handlers have to wait while the main thread compiles or waits for devices.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from dcae_jax.runs import live_line

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SECONDS_OF_ONE = 0.1  # what comes again sooner was sent twice: to a group, say

trace_asked = threading.Event()
_promise: Callable[[], str] | None = None
_thread: threading.Thread | None = None


def listen() -> None:
  """Hears signals from here on; until somebody promises more, a stop is one.

  Called by the main thread; again does no harm.
  """
  global _thread
  # Closed ones, as of a daemon: what is said is lost, and nothing else.
  sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
  sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
  for number in STOPS:
    handle(number, lambda *_: None)
  listen_for_traces()
  if _thread is None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _thread = threading.Thread(target=_hear, args=(reading,), daemon=True)
    _thread.start()


def handle(number: int, handler: Callable[..., None]) -> None:
  """Unless nohup had SIGHUP ignored."""
  if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
    signal.signal(number, handler)


def listen_for_traces() -> None:
  """SIGUSR1 sets `trace_asked`; called by the main thread."""
  signal.signal(signal.SIGUSR1, lambda *_: trace_asked.set())


def promise(words: Callable[[], str]) -> None:
  """From here on the first stop is only answered, with these words."""
  global _promise
  _promise = words


def _hear(reading: int) -> None:
  first = 0.0
  while True:
    for number in os.read(reading, 64):
      now = time.monotonic()
      if number not in STOPS or now - first < _SECONDS_OF_ONE:
        continue
      name = signal.Signals(number).name
      if _promise is None or first:
        live_line.end()
        _say(f"{name}: left at once; run again to go on from what is saved")
        os._exit(128 + number)
      first = now
      _say(f"{name}: {_promise()}; again to leave now")


def _say(text: str) -> None:
  with contextlib.suppress(OSError):  # the terminal may be gone
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
