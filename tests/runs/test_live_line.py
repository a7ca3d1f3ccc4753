import contextlib
import io
import logging
import os
import sys
import time

import pytest
import terminal as terminals

from dcae_jax.runs import live_line, progress_lines


@contextlib.contextmanager
def _on_terminal(monkeypatch):
  """One of 40 columns, whose last line is ours, and drawn often."""
  monkeypatch.setattr(live_line, "SECONDS", 0.02)
  terminal = terminals.Terminal(columns=40)
  with (
    terminals.standard_streams(terminal, monkeypatch),
    live_line.on_terminal(),
  ):
    yield terminal


def _later(terminal):
  """The screen after it was drawn some times."""
  time.sleep(5 * live_line.SECONDS)
  return terminal.screen()


def _screen_after(terminal, text):
  print(text)
  return terminal.wait_for(f"{text}\r\n")


def test_the_line_is_drawn_in_place_and_gone_at_the_end(monkeypatch):
  with _on_terminal(monkeypatch) as terminal:
    count = iter(range(1000))
    with live_line.showing(lambda: f"step {next(count)}"):
      (line,) = terminal.wait_for("step 2")
      assert line == "step 2"
      with live_line.showing(lambda: "within"):
        assert terminal.wait_for("within") == ["within"]
      terminal.wait_for("step 3")
    assert _screen_after(terminal, "the end") == ["the end", ""]


def test_what_others_write_is_above_it_whole(monkeypatch):
  with _on_terminal(monkeypatch) as terminal:
    handler = logging.StreamHandler()
    logger = logging.getLogger("others")
    logger.addHandler(handler)
    with live_line.showing(lambda: "live"):
      terminal.wait_for("live")
      logger.warning("of a log\nin two lines")
      print("of a program")
      print("of a library", file=sys.stderr)
      terminal.wait_for("of a library\r\n")
      lines = _later(terminal)
    logger.removeHandler(handler)
    assert lines == [
      "of a log", "in two lines", "of a program", "of a library", "live"
    ]  # fmt: skip


def test_a_line_that_others_have_begun_is_left_to_them(monkeypatch):
  with (
    _on_terminal(monkeypatch) as terminal,
    live_line.showing(lambda: "live"),
  ):
    terminal.wait_for("live")
    sys.stderr.write("downloading 1 %")
    assert _later(terminal) == ["downloading 1 %"]
    sys.stderr.write("\rdownloading 100 %\n")
    assert _later(terminal) == ["downloading 100 %", "live"]


@pytest.mark.parametrize("sign", ["x", "宽", "e\u0301"])
def test_it_is_cut_to_the_columns_that_there_are_now(sign, monkeypatch):
  """A sign may take two of them, or none."""
  with (
    _on_terminal(monkeypatch) as terminal,
    live_line.showing(lambda: f"{sign * 60}"),
  ):
    widths = {"x": 1, "宽": 2, "e\u0301": 1}
    for columns in (40, 20):
      terminal.resize(columns)
      (line,) = _later(terminal)
      assert line == sign * ((columns - 1) // widths[sign])


def test_what_a_name_holds_does_not_move_the_cursor(monkeypatch):
  with (
    _on_terminal(monkeypatch) as terminal,
    live_line.showing(lambda: "a\nb\x1b[2J"),
  ):
    assert terminal.wait_for("a") == ["a\\nb\\x1b[2J"]


@pytest.mark.parametrize("kind", ["a file", "a dumb terminal"])
def test_elsewhere_there_is_none(kind, monkeypatch):
  terminal = terminals.Terminal(columns=40)
  with terminals.standard_streams(terminal, monkeypatch):
    if kind == "a file":
      monkeypatch.setattr(sys, "stderr", io.StringIO())
    else:
      monkeypatch.setenv("TERM", "dumb")
    before = sys.stderr
    with live_line.on_terminal(), live_line.showing(lambda: "live"):
      assert sys.stderr is before and not live_line.is_on()
      time.sleep(2 * live_line.SECONDS)
    assert _screen_after(terminal, "the end") == ["the end", ""]


def test_who_leaves_at_once_leaves_a_clean_line(monkeypatch):
  """As a second signal does: within all that is shown."""
  with (
    _on_terminal(monkeypatch) as terminal,
    live_line.showing(lambda: "live"),
  ):
    terminal.wait_for("live")
    live_line.end()
    os.write(terminal.there, b"left at once\n")
    assert _later(terminal) == ["left at once", ""]


def test_progress_is_on_the_line_or_in_the_log(monkeypatch, caplog):
  with _on_terminal(monkeypatch) as terminal:
    monkeypatch.setattr(progress_lines, "_SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level(logging.INFO)

    def work():
      with progress_lines.Progress(4) as progress:
        time.sleep(0.2)
        progress.add(1)
        if live_line.is_on():
          terminal.wait_for("1/4 images  left 0:00:01  ")
      return [x for x in caplog.messages if "left" in x]

    assert work() == []
    live_line.end()
    (line,) = work()
    assert line.startswith("1/4 images  left 0:00:01  ")
    assert line.endswith(" images/s")


def test_the_line_of_a_job_in_the_background_is_not_drawn(monkeypatch):
  with _on_terminal(monkeypatch) as terminal:
    monkeypatch.setattr(os, "tcgetpgrp", lambda number: os.getpgrp() + 1)
    with live_line.showing(lambda: "live"):
      assert not live_line.is_on()
      time.sleep(2 * live_line.SECONDS)
      assert _screen_after(terminal, "the end") == ["the end", ""]


def test_a_terminal_that_is_gone_stops_nothing(monkeypatch):
  """As that of a job which was left alone, with nohup or without."""
  monkeypatch.setattr(live_line, "SECONDS", 0.02)
  monkeypatch.setenv("TERM", "xterm")
  own, there = os.openpty()
  stream = open(there, "w", buffering=1)  # noqa: SIM115
  with monkeypatch.context() as patch:
    patch.setattr(sys, "stderr", stream)
    with live_line.on_terminal():
      with live_line.showing(lambda: "live"):
        assert b"live" in os.read(own, 100)
        os.close(own)
      with live_line.showing(lambda: "more"):
        time.sleep(5 * live_line.SECONDS)
  with contextlib.suppress(OSError):  # of what nobody has read
    stream.close()
