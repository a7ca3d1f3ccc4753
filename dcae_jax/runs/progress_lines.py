"""Says in the log how far work on many images, or other units, is."""

import logging
import time

_LOG = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10  # of progress


class Progress:
  """Says now and then how many are done, and how long the rest takes."""

  def __init__(self, total: int, unit: str = "images"):
    self._total, self._done, self._unit = total, 0, unit
    self._left_out = 0
    self._start = self._said = time.monotonic()

  @property
  def seconds(self) -> float:
    """Since the start."""
    return time.monotonic() - self._start

  def add(self, number: int, left_out: int = 0) -> None:
    """So many that were used, and others that cannot be."""
    self._done += number + left_out
    self._left_out += left_out
    now = time.monotonic()
    if now - self._said < _SECONDS_BETWEEN_LINES:
      return
    self._said = now
    rate = self._done / self.seconds
    left = (self._total - self._done) / max(rate, 1e-9)
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
