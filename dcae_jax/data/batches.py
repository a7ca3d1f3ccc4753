"""An endless iterator over batches that can stop and go on, through grain.

What training reads, images or latents: the position is one number, the same for
any number of loader processes.
"""

import ctypes
import dataclasses
import os
import platform
import signal
import sys
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from dcae_jax import errors

Batch = dict[str, np.ndarray]
_WORKERS_PER_CPU = 8  # more only take memory


@dataclasses.dataclass(frozen=True)
class Reading:
  """How a process reads its share of the data.

  Attributes:
    batch_size: of this process.
    process_index: of this process.
    process_count: processes that share the data.
    workers: loader processes; 0 loads in threads of this one.
    threads: loader threads, in each process.
  """

  batch_size: int
  process_index: int = 0
  process_count: int = 1
  workers: int = 0
  threads: int = 4


def check_workers(workers: int) -> None:
  """Raises UserError for more loader processes than this machine can feed."""
  cpus = os.cpu_count() or 1
  if workers > _WORKERS_PER_CPU * cpus:
    raise errors.UserError(
      f"config.data.workers={workers} is above {_WORKERS_PER_CPU * cpus}, "
      f"{_WORKERS_PER_CPU} for each of the {cpus} CPUs of this machine; use "
      f"about {cpus}"
    )


class Batches:
  """A checkpointable iterator over the batches of this process.

  Its workers, as in `Reading`, start with the first batch.
  """

  def __init__(
    self,
    dataset: grain.MapDataset,
    *,
    workers: int,
    threads: int,
    fingerprint: str,
  ):
    """`fingerprint` changes when what is read does, or its order."""
    self._dataset, self._fingerprint = dataset, fingerprint
    self._options = grain.ReadOptions(
      num_threads=threads, prefetch_buffer_size=max(threads, 2)
    )
    self._workers = workers
    self._next_batch = 0
    self._iterator: Any = None

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    if self._iterator is None:
      if not flags.FLAGS.is_parsed():  # grain's processes ask for theirs
        flags.FLAGS.mark_as_parsed()
      _keep_freed_memory()
      rest = self._dataset[self._next_batch :].to_iter_dataset(self._options)
      if self._workers:
        options = grain.MultiprocessingOptions(num_workers=self._workers)
        # Through pipes: shared memory would outlive a process that is killed.
        piped = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        rest = grain.experimental.WithOptionsIterDataset(rest, piped)
        rest = rest.mp_prefetch(options, worker_init_fn=_begin_worker)
      self._iterator = iter(rest)
    try:
      batch = next(self._iterator)
    except RuntimeError as error:
      if "terminated unexpectedly" not in str(error):
        raise
      raise errors.UserError(
        f"a loader process was killed ({errors.first_line(error)}), maybe for "
        "want of memory; run again, with fewer config.data.workers if it was: "
        "it goes on from what is saved"
      ) from error
    self._next_batch += 1
    return batch

  def get_state(self) -> dict[str, Any]:
    """The position after the last batch: plain JSON, for any worker count."""
    return {"next_batch": self._next_batch, "fingerprint": self._fingerprint}

  def set_state(self, state: dict[str, Any], accepts: str = "") -> None:
    """Goes on from a state of `get_state`.

    Raises UserError if what is read has changed since, unless the fingerprint
    that it has now begins with what the caller `accepts`.
    """
    before, now = state.get("fingerprint"), self._fingerprint  # once had none
    if before not in (None, now) and not (accepts and now.startswith(accepts)):
      raise errors.UserError(
        f"what this run reads has changed since its last checkpoint (its "
        f"fingerprint was {before[:12]} and is {now[:12]}): its order would be "
        "another; bring back what it was, start another --workdir, or accept "
        f"it with --config.data.fingerprint={now[:12]}"
      )
    self.close()
    self._next_batch = state["next_batch"]

  def close(self) -> None:
    """Stops loader processes and threads."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None


def _keep_freed_memory() -> None:
  """The next batch takes the memory of the last one, as glibc learns late.

  Memory that is given back has to be cleared, page by page, when it is taken
  again: a seventh of the time of a worker that decodes small photographs.
  """
  if platform.libc_ver()[0] == "glibc":
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, 2**28)  # M_TRIM_THRESHOLD
    libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the most that is allowed


def _begin_worker(worker_index: int, worker_count: int) -> None:
  del worker_index, worker_count
  _follow_the_main_process()
  _keep_freed_memory()


def _follow_the_main_process() -> None:
  """A loader process outlives a signal to the group, but not its parent."""
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
  if sys.platform == "linux":
    die_with_parent = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL)
