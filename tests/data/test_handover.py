"""Batches of other processes: what is taken is what was given, and is gone."""

import contextlib
import errno
import os
import pathlib
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import grain
import ml_dtypes
import numpy as np
import pytest
from conftest import REPOSITORY

from dcae_jax.data import batches, handover


def _files(given):
  return list(pathlib.Path(given[0]).parent.iterdir())


def test_what_is_taken_is_what_was_given():
  main = handover.Handover()
  worker = pickle.loads(pickle.dumps(main))
  batch = {
    "images": np.arange(30, dtype=np.uint8).reshape(2, 5, 3),
    "states": {"states": np.ones((3, 2), ml_dtypes.bfloat16)},
    "captions": np.array(["a", "bc"]),
    "nothing": np.zeros((0, 4), np.float32),
  }
  given = worker.give(batch)
  assert len(_files(given)) == 2  # and the lock
  taken = main.take(given)
  assert len(_files(given)) == 1
  np.testing.assert_array_equal(taken["images"], batch["images"])
  np.testing.assert_array_equal(taken["captions"], batch["captions"])
  states = taken["states"]["states"]
  assert states.dtype == ml_dtypes.bfloat16 and states.sum() == 6
  assert taken["nothing"].shape == (0, 4)
  taken["images"][:] = 0  # its own memory
  assert taken["images"].ctypes.data % 64 == 0


def test_where_memory_is_not_for_us_files_are_temporary(monkeypatch):
  make = tempfile.mkdtemp

  def refusing(prefix, dir):
    if dir == "/dev/shm":
      raise PermissionError(errno.EACCES, "not for you", dir)
    return make(prefix=prefix, dir=dir)

  monkeypatch.setattr(tempfile, "mkdtemp", refusing)
  monkeypatch.setattr(handover, "_ENOUGH", 0)
  main = handover.Handover()
  given = main.give([1])
  assert given[0].startswith(tempfile.gettempdir()) and main.take(given) == [1]


def test_no_room_for_a_batch_says_where():
  unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, unlimited[1]))
  try:
    with pytest.raises(OSError, match=r"too large: '.*dcae_jax_batches"):
      handover.Handover().give(_large(1))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def test_files_of_a_killed_process_are_removed_by_the_next_one():
  code = (
    "import time\n"
    "from dcae_jax.data import handover\n"
    "given = handover.Handover().give(list(range(1000)))\n"
    "main = handover.Handover()\n"
    "print(main.give(list(range(1000)))[0], flush=True)\n"
    "time.sleep(60)\n"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE
  )
  path = process.stdout.readline().decode().strip()
  handover.Handover()
  assert os.path.exists(path)  # its process is alive
  process.kill()
  process.communicate()
  handover.Handover()
  assert not os.path.exists(os.path.dirname(path))


def test_a_worker_that_still_writes_leaves_nothing_behind(monkeypatch):
  main = handover.Handover()
  worker, rmdir = pickle.loads(pickle.dumps(main)), os.rmdir
  place = pathlib.Path(main.give([0])[0]).parent

  def remove(*arguments, **options):
    with contextlib.suppress(FileNotFoundError):
      worker.give([1])
    rmdir(*arguments, **options)

  monkeypatch.setattr(os, "rmdir", remove)
  del main
  assert not list(place.parent.glob(f"{place.name}*"))


def test_a_removal_that_was_cut_off_is_finished_by_the_next_one(monkeypatch):
  place = pathlib.Path(handover.Handover().give([0])[0]).parent.parent
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "rmtree", lambda *_, **__: None)
    main = handover.Handover()
    name = pathlib.Path(main.give([0])[0]).parent.name
    del main
  (left,) = place.glob(f"{name}*")
  (left / "lock").unlink()
  handover.Handover()
  assert not list(place.glob(f"{name}*"))


def _large(number):
  return {"x": np.full(2**22, number, np.uint8)}


def test_workers_that_are_ahead_end_at_once():
  """A worker whose pipe is full would be waited for, for 25 s."""
  iterator = batches.Batches(
    grain.MapDataset.range(100).map(_large),
    workers=2,
    threads=2,
    fingerprint="",
  )
  assert [next(iterator)["x"][-1] for _ in range(3)] == [0, 1, 2]
  time.sleep(0.5)
  start = time.monotonic()
  iterator.close()
  assert time.monotonic() - start < 15
