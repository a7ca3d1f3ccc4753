"""Requests of gcsfs to an emulator that fails."""

import time

import pytest
from etils import epath

from dcae_jax.runs import bucket_retries


@pytest.fixture
def hastened(monkeypatch):
  core = bucket_retries.gcsfs.core.GCSFileSystem
  monkeypatch.setattr(core, "_request", core._request)  # as it was, in the end
  bucket_retries.hasten()
  bucket_retries.hasten()


def test_what_fails_is_asked_for_again_at_once(
  gs, emulator, hastened, monkeypatch
):
  for key in ("STORAGE_EMULATOR_HOST", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"):
    monkeypatch.setenv(key, emulator.environment[key])
  path = epath.Path(gs) / "folder" / "file"
  path.write_text("kept")
  begun = time.monotonic()
  with emulator.fail(503) as fault:
    assert path.read_text() == "kept"
  assert fault.hits == 1
  assert time.monotonic() - begun < 1  # the least that gcsfs waits by itself
  with emulator.drop(times=3):
    assert path.read_text() == "kept"
  with pytest.raises(FileNotFoundError):
    (path.parent / "other").read_text()
  is_upload = lambda method, path: "upload_id=" in path
  with emulator.fail(503, done=True, where=is_upload) as fault:
    path.write_text("written, and the answer lost")
  assert fault.hits == 1
  assert path.read_text() == "written, and the answer lost"
