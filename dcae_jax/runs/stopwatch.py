"""Where the time of a long task went."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
  """Seconds by name, and of all together."""

  def __init__(self):
    self._start = time.monotonic()
    self._seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def measure(self, name: str) -> Iterator[None]:
    start = time.monotonic()
    try:
      yield
    finally:
      self.add(name, time.monotonic() - start)

  def add(self, name: str, seconds: float) -> None:
    self._seconds[name] = self._seconds.get(name, 0.0) + seconds

  def seconds(self) -> dict[str, float]:
    """By name, "other" and "total" at the end."""
    total = time.monotonic() - self._start
    other = total - sum(self._seconds.values())
    return self._seconds | {"other": other, "total": total}

  def table(self) -> str:
    """A line for each name: seconds and their share."""
    seconds = self.seconds()
    return "\n".join(
      f"  {name:<22} {value:9.1f} s {100 * value / seconds['total']:6.1f} %"
      for name, value in seconds.items()
    )


def clock(seconds: float) -> str:
  """Hours, minutes and seconds, as a clock has them."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"
