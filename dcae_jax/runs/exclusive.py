"""A directory in which one run works at a time, local or in a bucket."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator

import jax

from dcae_jax import errors
from dcae_jax.runs import lease, live_line, processes, storage

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def held(directory: str) -> Iterator[None]:
  """This process, or the first of several, alone works there meanwhile.

  Waits for a while where the owner may have died on another machine. Raises
  UserError if others work there, and ends the process if it loses its lease.
  """
  hold, refused = _Hold(directory), None
  created = [] if "://" in directory else _absent(directory)
  if jax.process_index() == 0:
    try:
      hold.take()
    except (errors.UserError, OSError) as error:
      refused = error
  if processes.total(refused is not None):
    raise refused or errors.UserError(f"{directory}: see the first process")
  try:
    yield
  finally:
    if jax.process_index() == 0:
      hold.release()
      with contextlib.suppress(OSError):  # others are not empty
        for path in created:
          os.rmdir(path)


def _absent(path: str) -> list[str]:
  """A directory and those above it, as far as they are not there."""
  path, found = os.path.abspath(path), []
  while not os.path.lexists(path):
    found.append(path)
    path = os.path.dirname(path)
  return found


class _Hold:
  """A lease of a directory that comes back if somebody deletes it."""

  def __init__(self, directory: str):
    self._directory = directory
    self._leases = lease.Leases(storage.Storage(directory))
    self._lease: lease.Lease | None = None

  def take(self) -> None:
    """Raises UserError if others work there."""
    directory, said = self._directory, False
    if os.path.lexists(directory) and not os.path.isdir(directory):
      raise errors.UserError(
        f"{directory} is not a directory; choose another --workdir"
      )
    while not self._try():
      owner = self._leases.owner(lease.DIRECTORY)
      if self._leases.is_alive(lease.DIRECTORY):
        raise errors.UserError(
          f"{directory} is worked in by {owner}; wait for it, stop it, or "
          "choose another directory"
        )
      if owner and not said:
        _LOG.info(
          "%s was worked in by %s; waiting for a sign of it, for %d s",
          directory, owner, lease.SECONDS_OF_PATIENCE,
        )  # fmt: skip
      said = True
      time.sleep(1)

  def _try(self) -> bool:
    taken = self._leases.take(lease.DIRECTORY, self._lost)
    self._lease = taken or self._lease
    return taken is not None

  def _lost(self) -> None:
    """It was deleted, or others have waited for too long a time."""
    if self._try():
      return
    live_line.end()
    print(
      f"error: {self._directory} was taken over by another process; left it to "
      "that",
      file=sys.stderr,
      flush=True,
    )
    os._exit(2)

  def release(self) -> None:
    released = None
    while released is not self._lease:  # another one, taken meanwhile
      released = self._lease
      released.release()
