"""Says in the log what a training loop waits for, when it waits for long."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

_LOG = logging.getLogger(__name__)


class Watchdog:
  """A thread that looks at a clock while the loop's own thread waits."""

  def __init__(self, patience: float = 30.0):
    """Starts the thread.

    The first warning comes after `patience` seconds of one wait, each further
    one after twice as long.
    """
    self._patience = patience
    self._waiting: tuple[str, float, float] | None = None  # what, since, next
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._look, daemon=True)
    self._thread.start()

  @contextlib.contextmanager
  def waiting_for(self, what: str) -> Iterator[None]:
    """Around a call that may take long; `what` ends up in the warning."""
    now = time.monotonic()
    self._waiting = (what, now, now + self._patience)
    try:
      yield
    finally:
      self._waiting = None

  def _look(self) -> None:
    while not self._closed.wait(self._patience / 10):
      waiting, now = self._waiting, time.monotonic()
      if waiting is None or now < waiting[2]:
        continue
      what, since, _ = waiting
      _LOG.warning("waiting for %s: %.0f s so far", what, now - since)
      if self._waiting is waiting:
        self._waiting = (what, since, now + (now - since))

  def close(self) -> None:
    self._closed.set()
    self._thread.join()
