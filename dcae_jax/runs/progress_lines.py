"""Says how far work on many images, or other units, is.

On the live line of a terminal; in a file, in a line of the log now and then.
"""

import contextlib
import logging
import time

from dcae_jax.runs import live_line, stopwatch

_LOG = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10  # of progress


class Progress(contextlib.ExitStack):
  """Says how many are done, and how long the rest takes, until it is left."""

  def __init__(self, total: int, unit: str = "images"):
    super().__init__()
    self._total, self._done, self._unit = total, 0, unit
    self._left_out = 0
    self._start = self._said = time.monotonic()

  def __enter__(self):
    self.enter_context(live_line.showing(self._words))
    return super().__enter__()

  @property
  def seconds(self) -> float:
    """Since the start."""
    return time.monotonic() - self._start

  def add(self, number: int, left_out: int = 0) -> None:
    """So many that were used, and others that cannot be."""
    self._done += number + left_out
    self._left_out += left_out
    now = time.monotonic()
    if now - self._said < _SECONDS_BETWEEN_LINES or live_line.is_on():
      return
    self._said = now
    _LOG.info("%s", self._words())

  def finish(self) -> None:
    """Says how many of the images could be used."""
    used = self._done - self._left_out
    _LOG.info(
      "%d of %d images used, %.3g images/s",
      used, self._total, used / self.seconds,
    )  # fmt: skip

  def _words(self) -> str:
    """The first ones count: a terminal may be narrow."""
    words, seconds = f"{self._done}/{self._total} {self._unit}", self.seconds
    if not self._done:
      return f"{words}  {stopwatch.clock(seconds)}"
    left = stopwatch.clock((self._total / self._done - 1) * seconds)
    rate = self._done / max(seconds, 1e-9)
    return f"{words}  left {left}  {rate:.3g} {self._unit}/s"
