"""The last line of a terminal: what goes on right now, drawn anew in place.

All else that is written to the terminal appears above it, whole. In a file or a
pipe there is no such line, and who has something to show logs plain lines.
"""

import contextlib
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from dcae_jax.runs import plain_text, stopwatch

SECONDS = 0.25  # from one drawing to the next
_TO_THE_END = "\x1b[K"  # erases what is right of the cursor

_terminal: "_Terminal | None" = None


@contextlib.contextmanager
def on_terminal() -> Iterator[None]:
  """While it lasts, a standard error that is a terminal has such a line."""
  global _terminal
  is_dumb = os.environ.get("TERM", "dumb") == "dumb"
  if is_dumb or not sys.stderr.isatty():
    yield
    return
  _terminal = _Terminal(sys.stderr)
  before = sys.stdout, sys.stderr
  if sys.stdout.isatty():
    sys.stdout = _Above(sys.stdout, _terminal)
  sys.stderr = _Above(sys.stderr, _terminal)
  try:
    yield
  finally:
    end()
    sys.stdout, sys.stderr = before


def end() -> None:
  """Leaves a clean terminal, and draws nothing any more."""
  global _terminal
  if _terminal is not None:
    _terminal.close()
  _terminal = None


def is_on() -> bool:
  """Whether somebody sees the line: not so for a job in the background."""
  return _terminal is not None and _terminal.is_ours()


@contextlib.contextmanager
def showing(words: Callable[[], str]) -> Iterator[None]:
  """While it lasts, the line has these words; within it, others may follow.

  They are asked for again and again, by another thread, and must be there at
  once.
  """
  terminal = _terminal
  if terminal is None:
    yield
    return
  terminal.push(words)
  try:
    yield
  finally:
    terminal.remove(words)


def timing(
  text: str, after: str = ""
) -> contextlib.AbstractContextManager[None]:
  """Shows a text, the time since now, and what comes after it."""
  began = time.monotonic()

  def words() -> str:
    return f"{text}  {stopwatch.clock(time.monotonic() - began)}{after}"

  return showing(words)


class _Terminal:
  """A terminal, and a thread that draws its last line."""

  def __init__(self, stream: TextIO):
    self._stream = stream
    self._shown: list[Callable[[], str]] = []
    self._is_drawn = False
    self._is_at_start = True  # of a line, after what others wrote
    self._lock = threading.RLock()  # a signal's handler may write, too
    self._closed = threading.Event()
    threading.Thread(target=self._draw_again, daemon=True).start()

  def is_ours(self) -> bool:
    try:
      return os.tcgetpgrp(self._stream.fileno()) == os.getpgrp()
    except OSError:  # no terminal that controls jobs
      return True

  def push(self, words: Callable[[], str]) -> None:
    with self._lock:
      self._shown.append(words)

  def remove(self, words: Callable[[], str]) -> None:
    with self._lock:
      if words in self._shown:
        self._shown.remove(words)
      self._erase()

  def write_above(self, stream: TextIO, text: str) -> int:
    with self._lock:
      self._erase()
      written = stream.write(text)
      stream.flush()
      if text:
        self._is_at_start = text.endswith("\n")
      self._draw()
    return written

  def close(self) -> None:
    self._closed.set()
    with self._lock:
      self._shown.clear()
      self._erase()

  def _draw_again(self) -> None:
    while not self._closed.wait(SECONDS):
      with self._lock:
        self._draw()

  def _draw(self) -> None:
    if self._shown and self._is_at_start and self.is_ours():
      text = plain_text.escaped(self._shown[-1]())
      with contextlib.suppress(OSError):  # the terminal may be gone
        columns = os.get_terminal_size(self._stream.fileno()).columns or 80
        # A line that fills the last column wraps on some terminals.
        self._stream.write(f"\r{_cut(text, columns - 1)}{_TO_THE_END}")
        self._stream.flush()
        self._is_drawn = True

  def _erase(self) -> None:
    if self._is_drawn:
      self._is_drawn = False
      with contextlib.suppress(OSError):
        self._stream.write(f"\r{_TO_THE_END}")
        self._stream.flush()


class _Above:
  """A stream to the terminal whose text appears above the line."""

  def __init__(self, stream: TextIO, terminal: _Terminal):
    self._stream, self._terminal = stream, terminal

  def write(self, text: str) -> int:
    return self._terminal.write_above(self._stream, text)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def _cut(text: str, columns: int) -> str:
  """As much of it as the columns hold; some signs take two, some none."""
  for i, sign in enumerate(text):
    if not unicodedata.combining(sign):
      columns -= 2 if unicodedata.east_asian_width(sign) in "WF" else 1
    if columns < 0:
      return text[:i]
  return text
