"""Leases on a disk and in a bucket, of real processes."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY

from dcae_jax.runs import lease
from dcae_jax.runs import storage as storages

_PROGRAM = """
import sys, time
from dcae_jax.runs import lease
from dcae_jax.runs import storage as storages

leases = lease.Leases(storages.Storage(sys.argv[1]))
print("ready", flush=True)
start = float(input())
held = []
for i in range(int(sys.argv[2])):
  time.sleep(max(0, start + 0.02 * i - time.time()))  # with the others
  if won := leases.take(f"{i}/lease"):
    held.append(won)
    print(i)
print("done", flush=True)
input()
"""
_ELSEWHERE = {
  "host": "elsewhere", "kernel": "another", "pid": 1, "started": "1",
  "token": "theirs", "beats": 0,
}  # fmt: skip


@pytest.fixture(params=["disk", "bucket"])
def storage(request, tmp_path):
  path = str(tmp_path)
  if request.param == "bucket":
    path = request.getfixturevalue("gs") + "/study"
  return storages.Storage(path, retries=2)


@pytest.fixture
def start():
  """A function: processes that take leases 0 to n - 1, all at once."""
  started = []

  def run(storage, n, processes=1):
    new = [
      subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, storage.path, str(n)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
      )
      for _ in range(processes)
    ]
    started.extend(new)
    for process in new:
      assert process.stdout.readline() == "ready\n"
    for process in new:
      process.stdin.write(f"{time.time() + 0.1}\n")
      process.stdin.flush()
    return new

  yield run
  for process in started:
    process.kill()
    process.communicate()


def _won(process):
  return [int(x) for x in iter(process.stdout.readline, "done\n")]


def _kill(process):
  """As SIGKILL leaves it: ended, and not yet waited for."""
  process.kill()
  os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def _until(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_one_of_two_wins_and_one_takes_over_from_the_killed(storage, start):
  everything = list(range(20))
  for _ in range(2):  # where nothing is, and then from those who were killed
    racing = start(storage, len(everything), processes=2)
    won = [_won(process) for process in racing]
    assert sorted(won[0] + won[1]) == everything
    leases = lease.Leases(storage)
    assert not any(leases.take(f"{i}/lease") for i in everything)
    names = {leases.owner(f"{i}/lease").split()[-1] for i in everything}
    assert names <= {str(process.pid) for process in racing}
    for process in racing:
      _kill(process)
  with lease.Leases(storage).take("0/lease"):
    pass


def test_a_number_that_is_used_again_is_another_process(storage):
  leases = lease.Leases(storage)
  with leases.take("a"):
    ours = storage.read_json("a")
    assert leases.take("a") is None
  storage.write_json("a", ours | {"kernel": "another", "started": "1"})
  assert leases.take("a") is None
  storage.write_json("a", ours | {"started": "1"})
  with leases.take("a"):
    pass
  with subprocess.Popen(["true"]) as ended:
    pass
  storage.write_json("a", ours | {"pid": ended.pid})
  with leases.take("a"):
    pass


@pytest.mark.parametrize("silent", ["elsewhere", "here", "damaged"])
def test_who_is_silent_is_replaced_after_a_while(silent, storage, monkeypatch):
  with lease.Leases(storage).take("a"):
    here = storage.read_json("a")
  leases = lease.Leases(storage)
  found = {"elsewhere": _ELSEWHERE, "here": here}.get(silent, {})
  storage.write_json("a", found)
  assert leases.take("a") is None
  assert leases.take("a") is None  # long before 60 s
  time.sleep(0.05)
  monkeypatch.setattr(lease, "SECONDS_OF_PATIENCE", 0.05)
  # Others have not seen it for as long, and a heartbeat begins it anew.
  assert lease.Leases(storage).take("a") is None
  storage.write_json("a", found | {"beats": 1})
  assert leases.take("a") is None
  time.sleep(0.05)
  with leases.take("a"):
    pass


def test_a_heartbeat_outlives_the_patience(storage, monkeypatch):
  monkeypatch.setattr(lease, "SECONDS_BETWEEN_BEATS", 0.02)
  monkeypatch.setattr(lease, "SECONDS_OF_PATIENCE", 2)
  leases = lease.Leases(storage)
  with leases.take("a") as held:
    end = time.monotonic() + 3
    while time.monotonic() < end:
      assert leases.take("a") is None
      time.sleep(0.05)
    assert not held.lost


def test_what_is_released_is_free_and_nobodys(storage):
  leases = lease.Leases(storage)
  assert leases.owner("a") == ""
  for _ in range(3):
    with leases.take("a") as held:
      assert leases.owner("a").endswith(f", process {os.getpid()}")
      assert leases.take("a") is None
    assert not leases.owner("a") and not held.lost
  with leases.take("a"):
    held.release()  # a second time
    assert leases.take("a") is None and not held.lost


@pytest.mark.parametrize("by", [json.dumps(_ELSEWHERE).encode(), None])
def test_what_others_took_or_deleted_is_lost(by, storage, monkeypatch):
  monkeypatch.setattr(lease, "SECONDS_BETWEEN_BEATS", 0.02)
  held = lease.Leases(storage).take("a")
  assert not held.lost
  _, generation = storage.read_version("a")
  while not storage.replace("a", by, generation):
    _, generation = storage.read_version("a")  # a heartbeat came between
  _until(lambda: held.lost)
  held.release()
  assert storage.read("a") == by


def test_storage_that_does_not_answer_is_no_loss(gs, emulator, monkeypatch):
  monkeypatch.setattr(lease, "SECONDS_BETWEEN_BEATS", 0.02)
  storage = storages.Storage(gs, retries=0)
  held = lease.Leases(storage).take("a")
  with emulator.fail(503, times=None) as fault:
    _until(lambda: fault.hits >= 3)
  with emulator.fail(403, times=None) as fault:
    _until(lambda: fault.hits >= 3)
  beats = storage.read_json("a")["beats"]
  _until(lambda: storage.read_json("a")["beats"] > beats)
  assert not held.lost
  held.release()
  assert storage.read("a") is None


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_lost_answer_changes_nothing(method, gs, emulator):
  leases = lease.Leases(storages.Storage(gs))
  where = lambda found, _: found == method
  with emulator.fail(503, where=where, done=True) as fault:
    with leases.take("a") as held:
      assert leases.owner("a") != ""
    assert fault.hits == 1 and not held.lost
  assert leases.owner("a") == ""


def test_an_object_is_replaced_only_as_it_was_read(storage):
  found, absent = storage.read_version("a")
  assert found is None
  assert storage.replace("a", b"1", absent)
  assert not storage.replace("a", b"2", absent)
  found, first = storage.read_version("a")
  assert found == b"1" and storage.replace("a", b"2", first)
  assert not storage.replace("a", b"3", first)
  assert not storage.replace("a", None, first)
  assert storage.read("a") == b"2"
  assert storage.replace("a", None, storage.read_version("a")[1])
  assert storage.read("a") is None
