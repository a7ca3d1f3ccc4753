"""A terminal whose screen tests can read."""

import contextlib
import fcntl
import os
import struct
import sys
import termios
import threading
import time


class Terminal:
  """The other end of a pseudo terminal; it knows what a live line needs.

  Attributes:
    there: the number of the file that programs write to.
    received: all bytes of it.
  """

  def __init__(self, columns: int):
    self._own, self.there = os.openpty()
    self.resize(columns)
    self.received = bytearray()
    threading.Thread(target=self._receive, daemon=True).start()

  def resize(self, columns: int) -> None:
    size = struct.pack("HHHH", 24, columns, 0, 0)
    fcntl.ioctl(self.there, termios.TIOCSWINSZ, size)

  def _receive(self) -> None:
    with contextlib.suppress(OSError):
      while data := os.read(self._own, 4096):
        self.received += data

  def wait_for(self, text: str) -> list[str]:
    """The lines of the screen, once the text is among what was written."""
    deadline = time.monotonic() + 10
    while text.encode() not in self.received:
      assert time.monotonic() < deadline, self.screen()
      time.sleep(0.01)
    return self.screen()

  def screen(self) -> list[str]:
    """Of all that was written until now."""
    lines, column = [""], 0
    text = self.received.decode().replace("\x1b[K", "\0")
    for sign in text:
      if sign == "\r":
        column = 0
      elif sign == "\n":
        lines.append("")
      elif sign == "\0":
        lines[-1] = lines[-1][:column]
      else:
        line = lines[-1].ljust(column)
        lines[-1] = line[:column] + sign + line[column + 1 :]
        column += 1
    return lines


@contextlib.contextmanager
def standard_streams(terminal: Terminal, monkeypatch):
  """Standard output and error of this process are that terminal."""
  monkeypatch.setenv("TERM", "xterm")
  with (
    open(os.dup(terminal.there), "w", buffering=1) as stream,
    monkeypatch.context() as patch,
  ):
    patch.setattr(sys, "stdout", stream)
    patch.setattr(sys, "stderr", stream)
    yield
