"""Which of several processes, on any machines, does a piece of work.

A lease is a small object that names its owner, who renews it while the work
lasts. When its owner has died, others may take it. No clocks are compared; but
an owner that stood still may hear late that it has lost its lease, so that work
must bear to be done twice.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable

from dcae_jax.runs import storage as storages

DIRECTORY = "lease.json"  # of who works in a directory
SECONDS_BETWEEN_BEATS = 10
SECONDS_OF_PATIENCE = 60  # with an owner of whom nothing is heard


@dataclasses.dataclass(frozen=True)
class _Owner:
  """A process, and how often it has renewed its lease.

  Attributes:
    kernel: a boot of a machine, and the name space of its process numbers;
      empty where the system does not tell.
    started: when, in ticks: a number that is used again is another process.
    place: a local path, as that machine knows it; empty for a bucket.
    token: of this lease alone.
  """

  host: str
  kernel: str
  pid: int
  started: str
  token: str
  place: str = ""
  beats: int = 0

  def __str__(self) -> str:
    return f"{self.host}, process {self.pid}"

  def data(self) -> bytes:
    return json.dumps(dataclasses.asdict(self)).encode()

  def is_here(self) -> bool:
    """Whether it is, or was, a process of this machine."""
    return bool(self.kernel) and self.kernel == _kernel()

  def is_gone(self) -> bool:
    """Whether it was a process of this machine, and is no more."""
    if not self.is_here():
      return False
    try:
      os.kill(self.pid, 0)  # asks only, even of processes that /proc hides
    except ProcessLookupError:
      return True
    except PermissionError:
      pass
    return _started(self.pid) not in (self.started, None)


class Lease:
  """A lease that was taken; as a context manager, until its end."""

  def __init__(
    self,
    storage: storages.Storage,
    key: str,
    owner: _Owner,
    on_loss: Callable[[], None],
  ):
    self._storage, self._key, self._owner = storage, key, owner
    self._on_loss, self._lost = on_loss, False
    self._ended = threading.Event()
    self._heart = threading.Thread(target=self._live, daemon=True)
    self._heart.start()

  @property
  def lost(self) -> bool:
    """Whether it was taken by others, or deleted: then stop the work.

    Storage that does not answer for a while is no loss.
    """
    return self._lost

  def release(self) -> None:
    """Lets others have it; once it is lost, leaves it to them."""
    if not self._ended.is_set():
      self._ended.set()
      self._heart.join()
      self._update(None)

  def __enter__(self) -> "Lease":
    return self

  def __exit__(self, *_) -> None:
    self.release()

  def _live(self) -> None:
    while not self._lost and not self._ended.wait(SECONDS_BETWEEN_BEATS):
      beats = self._owner.beats + 1
      self._owner = dataclasses.replace(self._owner, beats=beats)
      self._update(self._owner.data())
    if self._lost:
      self._on_loss()

  def _update(self, data: bytes | None) -> None:
    """Writes or deletes it if it is still there; what fails is left to time."""
    with contextlib.suppress(OSError):
      found, generation = self._storage.read_version(self._key)
      owner = _parsed(found)
      if owner is None or owner.token != self._owner.token:
        self._lost = True
      else:
        self._storage.replace(self._key, data, generation)


class Leases:
  """Takes leases, and remembers when it saw those of others unchanged."""

  def __init__(self, storage: storages.Storage):
    self._storage = storage
    path = storage.path
    self._place = "" if "://" in path else os.path.realpath(path)
    self._seen: dict[str, tuple[bytes, float]] = {}
    self._renewed: set[str] = set()

  def take(
    self, key: str, on_loss: Callable[[], None] = lambda: None
  ) -> Lease | None:
    """None, at once, where somebody else has it.

    It is free when its owner has died: at once if that was a process of this
    machine, otherwise when it stays unchanged between calls for long enough.
    """
    found, generation = self._storage.read_version(key)
    if found is not None and not self._is_free(key, found, generation):
      return None
    owner = _Owner(
      host=socket.gethostname(),
      kernel=_kernel(),
      pid=os.getpid(),
      started=_started(os.getpid()) or "",
      place=self._place,
      token=secrets.token_hex(8),
    )
    if not self._storage.replace(key, owner.data(), generation):
      return None
    return Lease(self._storage, key, owner, on_loss)

  def owner(self, key: str) -> str:
    """Who has it: "host, process 123"; empty where it is not taken."""
    found, _ = self._storage.read_version(key)
    if found is None:
      return ""
    return str(_parsed(found) or "somebody unknown")

  def is_alive(self, key: str) -> bool:
    """Whether its owner lives here, or renews it while `take` is called.

    In a copy of the directory the owner lives, and renews nothing.
    """
    owner = _parsed(self._storage.read_version(key)[0])
    if owner is None or not owner.is_here() or owner.place != self._place:
      return key in self._renewed
    return not owner.is_gone()

  def _is_free(self, key: str, found: bytes, generation: bytes) -> bool:
    owner = _parsed(found)
    if owner is not None and owner.is_gone():
      return True
    now = time.monotonic()
    seen, since = self._seen.get(key, (None, now))
    if seen != generation:
      if seen is not None:
        self._renewed.add(key)
      self._seen[key] = generation, now
      return False
    return now - since >= SECONDS_OF_PATIENCE


def _parsed(data: bytes | None) -> _Owner | None:
  """None also where it is damaged: that, too, is nobody's after a while."""
  with contextlib.suppress(ValueError, TypeError):
    return _Owner(**json.loads(data))
  return None


def _kernel() -> str:
  with contextlib.suppress(OSError):
    space = os.readlink("/proc/self/ns/pid")
    with open("/proc/sys/kernel/random/boot_id") as file:
      return f"{file.read().strip()} {space}"
  return ""


def _started(pid: int) -> str | None:
  """Empty for one that has ended and is still listed; None if not told."""
  with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
    state, *fields = file.read().rpartition(b") ")[2].decode().split()
    return "" if state in "ZX" else fields[18]
  return None
