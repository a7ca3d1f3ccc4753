"""The processes of a run: waiting for all, counting over all, leaving."""

import errno
import hashlib
import logging
import os
import platform
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from dcae_jax.runs import host_memory

_SECONDS_FOR_OTHERS = 5  # to leave after SIGTERM


def total(number: int) -> int:
  """The sum of a number over all processes."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.process_allgather(np.array(number)).sum())


def sums(numbers: Sequence[int]) -> list[int]:
  """Of each of several numbers over all processes, modulo 2**64."""
  return _gathered(numbers).sum(axis=0, dtype=np.uint64).tolist()


def memory() -> int:
  """Bytes for a process: the machine's over its processes, where least."""
  digest = hashlib.sha256(platform.node().encode()).digest()
  machine = int.from_bytes(digest[:8], "big")
  machines, totals = _gathered([machine, host_memory.total()]).T
  _, of_process, counts = np.unique(
    machines, return_inverse=True, return_counts=True
  )
  return int((totals // counts[of_process].astype(np.uint64)).min())


def _gathered(numbers: Sequence[int]) -> np.ndarray:
  """Those of every process, uint64 [processes, n]."""
  own = np.array(numbers, np.uint64)
  if jax.process_count() == 1:
    return own[None]
  halves = own.view(np.uint32)  # jax has no 64 bits
  return np.asarray(multihost_utils.process_allgather(halves)).view(np.uint64)


def wait_for_all(name: str) -> None:
  """Until every process is here; OSError if one of them has ended."""
  if jax.process_count() == 1:
    return
  try:
    multihost_utils.sync_global_devices(name)
  except (ValueError, RuntimeError) as error:
    raise OSError(
      errno.ECONNABORTED,
      "another process has ended before this one; see its log, and start all "
      f"of them again: they go on from what is saved ({error})",
    ) from error


def leave(status: int) -> None:
  """Ends this process at once: jax would wait for the others for minutes.

  The first one, without which jax aborts the others, gives them time to leave.
  """
  if jax.process_index() == 0:
    time.sleep(_SECONDS_FOR_OTHERS)
  logging.shutdown()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)
