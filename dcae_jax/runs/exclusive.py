"""A directory in which one run works at a time, local or in a bucket."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator

import jax

from dcae_jax import errors
from dcae_jax.runs import lease, processes, storage

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def held(directory: str) -> Iterator[None]:
  """This process, or the first of several, alone works there meanwhile.

  Waits for a while where the owner may have died on another machine. Raises
  UserError if others work there, and ends the process if it loses its lease.
  """
  taken, refused = None, ""
  created = [] if "://" in directory else _absent(directory)
  if jax.process_index() == 0:
    try:
      taken = _take(directory)
    except errors.UserError as error:
      refused = str(error)
  if processes.total(bool(refused)):
    raise errors.UserError(refused or "others work in the directory")
  try:
    yield
  finally:
    if taken is not None:
      taken.release()
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


def _take(directory: str) -> lease.Lease:
  def leave():
    print(
      f"error: {directory} was taken over by another process; left it to that",
      file=sys.stderr,
      flush=True,
    )
    os._exit(2)

  leases, said = lease.Leases(storage.Storage(directory)), False
  while (taken := leases.take(lease.DIRECTORY, leave)) is None:
    owner = leases.owner(lease.DIRECTORY)
    if leases.is_alive(lease.DIRECTORY):
      raise errors.UserError(
        f"{directory} is worked in by {owner}; wait for it, stop it, or choose "
        "another directory"
      )
    if owner and not said:
      _LOG.info(
        "%s was worked in by %s; waiting for a sign of it, for %d s",
        directory, owner, lease.SECONDS_OF_PATIENCE,
      )  # fmt: skip
    said = True
    time.sleep(1)
  return taken
