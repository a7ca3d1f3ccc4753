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
    rate, left = self._speed()
    _LOG.info(
      "%d/%d %s, %.3g %s/s, about %.0f s left",
      self._done, self._total, self._unit, rate, self._unit, left,
    )  # fmt: skip

  def finish(self) -> None:
    """Says how many of the images could be used."""
    used = self._done - self._left_out
    _LOG.info(
      "%d of %d images used, %.3g images/s",
      used, self._total, used / self.seconds,
    )  # fmt: skip

  def _speed(self) -> tuple[float, float]:
    """Units per second, and seconds that are left."""
    rate = self._done / max(self.seconds, 1e-9)
    return rate, (self._total - self._done) / max(rate, 1e-9)

  def _words(self) -> str:
    """For a terminal, which may be narrow."""
    words = f"{self._done}/{self._total} {self._unit}"
    if not self._done:
      return f"{words}  {stopwatch.clock(self.seconds)}"
    rate, left = self._speed()
    return f"{words}  left {stopwatch.clock(left)}  {rate:.3g} {self._unit}/s"
