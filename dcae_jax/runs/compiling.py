"""Says that a program is compiled: for how long, and how long it took before.

The seconds are kept beside the compiled programs, where jax keeps those. What
is compiled within other work, when a function is first called, has lines in the
log if it takes long.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.monitoring

from dcae_jax import errors
from dcae_jax.runs import json_types, live_line, stopwatch, storage

_LOG = logging.getLogger(__name__)
_KEPT = {"compiled": json_types.NUMBER}
_SECONDS_UNSAID = 5.0  # of what is compiled within other work
_COMPILE = "/jax/core/compile/backend_compile_duration"  # events of jax
_LOADED = "/jax/compilation_cache/cache_hits"


class _Thread(threading.local):
  """What a thread compiles now, and whether jax's cache had the last one."""

  is_announced = False
  is_loaded = False
  within: "_Within | None" = None


_own = _Thread()


@contextlib.contextmanager
def announced(
  what: str, arguments: Any, devices: Sequence[jax.Device]
) -> Iterator[None]:
  """Around the compiling of a program, which is known again by its arguments.

  Args:
    what: it is, such as "the training step".
    arguments: of which the shapes count.
    devices: that it is for.
  """
  listen()
  key = _key(arguments, devices)
  said, after = "how long is not known here; minutes, if it is large", ""
  if before := _read(key):
    said = f"it took {_words(before)} the last time"
    after = f" of {_words(before)}, or less if the cache has it"
  _LOG.info("compiling %s; %s", what, said)
  began, _own.is_announced, _own.is_loaded = time.monotonic(), True, False
  try:
    with live_line.timing(f"compiling {what}", after):
      yield
  finally:
    _own.is_announced = False
  seconds = time.monotonic() - began
  if _own.is_loaded:
    _LOG.info("loaded from the compilation cache in %s", _words(seconds))
  else:
    _LOG.info("compiled in %s", _words(seconds))
    _write(key, seconds)


def _key(arguments: Any, devices: Sequence[jax.Device]) -> str:
  shapes = [(x.shape, str(x.dtype)) for x in jax.tree.leaves(arguments)]
  program = [devices[0].device_kind, len(devices), shapes]
  return f"dcae_jax_seconds_{json_types.digest(program)[:16]}.json"


def _kept() -> storage.Storage | None:
  directory = jax.config.jax_compilation_cache_dir
  return storage.Storage(directory, retries=1) if directory else None


def _read(key: str) -> float:
  """Seconds of the last time; 0: not known."""
  with contextlib.suppress(OSError, errors.UserError):
    if (kept := _kept()) and (found := kept.read_json(key)):
      json_types.check(key, found, _KEPT, "remove it")
      return found["compiled"]
  return 0.0


def _write(key: str, seconds: float) -> None:
  if jax.process_index() == 0:
    with contextlib.suppress(OSError, errors.UserError):  # all else goes on
      if kept := _kept():
        kept.write_json(key, {"compiled": seconds})


@functools.cache
def listen() -> None:
  """Hears what jax compiles from here on, unless it is announced."""
  jax.monitoring.register_scalar_listener(_begin)
  jax.monitoring.register_event_listener(_load)
  jax.monitoring.register_event_duration_secs_listener(_end)


def _begin(event: str, value: float, **of_event: Any) -> None:
  if event == _COMPILE:
    _own.is_loaded = False
    if not _own.is_announced:
      _own.within = _Within(of_event.get("fun_name", ""))


def _load(event: str, **of_event: Any) -> None:
  if event == _LOADED:
    _own.is_loaded = True


def _end(event: str, seconds: float, **of_event: Any) -> None:
  if event == _COMPILE and _own.within is not None:
    _own.within.end(seconds)
    _own.within = None


class _Within:
  """A program that is compiled within other work."""

  def __init__(self, name: str):
    name = name.removeprefix("jit(").removesuffix(")").strip("_")
    self._text = "compiling a program"
    if name.isidentifier():
      self._text += f" ({name})"
    self._shown = contextlib.ExitStack()
    self._shown.enter_context(live_line.timing(self._text))
    self._said = threading.Timer(_SECONDS_UNSAID, self._say)
    self._said.daemon = True
    self._said.start()

  def _say(self) -> None:
    _LOG.info("%s, for %s so far", self._text, _words(_SECONDS_UNSAID))

  def end(self, seconds: float) -> None:
    self._said.cancel()
    self._shown.close()
    if seconds > _SECONDS_UNSAID:
      _LOG.info("%s took %s", self._text, _words(seconds))


def _words(seconds: float) -> str:
  if seconds < 100:
    return f"{seconds:.1f} s"
  return stopwatch.clock(seconds)
