"""One run at a time in a directory, as real processes find it."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY

from dcae_jax.runs import exclusive, lease

_HOLD = """
import sys, time
from dcae_jax.runs import exclusive
with exclusive.held(sys.argv[1]):
  print("held", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
  """A process that works in `tmp_path / "run"`."""
  with subprocess.Popen(
    [sys.executable, "-c", _HOLD, str(tmp_path / "run")],
    cwd=REPOSITORY,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()


def test_a_second_run_is_refused_until_the_first_is_gone(
  other, tmp_path, monkeypatch
):
  run = tmp_path / "run"
  message = f"run is worked in by .*process {other.pid}"
  with pytest.raises(ValueError, match=message), exclusive.held(str(run)):
    pass
  copy = tmp_path / "copy"  # with the lease in it, which nobody renews
  shutil.copytree(run, copy)
  monkeypatch.setattr(lease, "SECONDS_OF_PATIENCE", 0.5)
  with exclusive.held(str(copy)):
    pass
  other.kill()
  other.wait()
  with exclusive.held(str(run)):
    assert (run / "lease.json").exists()
  assert not (run / "lease.json").exists()


def test_a_directory_that_nothing_was_written_to_is_gone_again(tmp_path):
  run = tmp_path / "a" / "b"
  with exclusive.held(str(run)):
    pass
  assert not (tmp_path / "a").exists()
  with exclusive.held(str(run)):
    (run / "kept").write_text("")
  assert os.listdir(run) == ["kept"]


@pytest.mark.parametrize("beats", [True, False])
def test_an_owner_elsewhere_is_waited_for(beats, tmp_path, monkeypatch):
  """Alive it keeps the directory; silent it loses it after a while."""
  with exclusive.held(str(tmp_path)):
    ours = json.loads((tmp_path / "lease.json").read_text())
  count = 0

  def pass_time(_):
    nonlocal count
    count += beats
    theirs = ours | {"kernel": "elsewhere", "host": "tpu-3", "beats": count}
    if beats:
      (tmp_path / "lease.json").write_text(json.dumps(theirs))

  pass_time(0)
  theirs = ours | {"kernel": "elsewhere", "host": "tpu-3"}
  (tmp_path / "lease.json").write_text(json.dumps(theirs))
  monkeypatch.setattr(exclusive.time, "sleep", pass_time)
  monkeypatch.setattr(lease, "SECONDS_OF_PATIENCE", 0.2)
  if beats:
    with (
      pytest.raises(ValueError, match="worked in by tpu-3"),
      exclusive.held(str(tmp_path)),
    ):
      pass
  else:
    with exclusive.held(str(tmp_path)):
      pass


def test_a_lease_that_is_deleted_comes_back(tmp_path, monkeypatch):
  monkeypatch.setattr(lease, "SECONDS_BETWEEN_BEATS", 0.02)
  file = tmp_path / "run" / "lease.json"
  with exclusive.held(str(file.parent)):
    for _ in range(2):
      file.unlink()
      end = time.monotonic() + 30
      while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
  assert not file.exists()


def test_what_is_no_directory_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(ValueError, match="file is not a directory"),
    exclusive.held(str(tmp_path / "file")),
  ):
    pass
