import ctypes
import os
import pathlib
import stat

import numpy as np
import pytest
import safetensors.numpy

from dcae_jax.autoencoder.weights import safetensors_files

NAME = "model.safetensors"


def _save(folder, number):
  """Every file says the number."""
  safetensors_files.save(
    folder,
    NAME,
    {"a": np.full(3, number, np.float32)},
    config={"number": number},
    model_card=str(number),
    arrays={"beside.npy": np.full(2, number)},
  )


def _saved(folder):
  """The number that every file says."""
  (file,), config = safetensors_files.find(str(folder))
  card = (file.parent / "README.md").read_text()
  beside = np.load(file.parent / "beside.npy")
  found = {*safetensors_files.read(file, "a"), *beside, config["number"]}
  (number,) = found | {int(card)}
  return number


class Killed(BaseException):
  """Nothing handles it."""


class Death:
  """Of this process, at one of its calls of the file system.

  All later ones do nothing, too; who writes a file leaves half of it.
  """

  def __init__(self, patch, at, can_swap):
    self._calls, self._at = 0, at
    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "chmod"):
      patch.setattr(os, name, self._deadly(getattr(os, name)))
    write = self._deadly(pathlib.Path.write_text, 0)
    patch.setattr(pathlib.Path, "write_text", write)
    patch.setattr(np, "save", self._deadly(np.save, 0))
    write = self._deadly(safetensors.numpy.save_file, 1)
    patch.setattr(safetensors.numpy, "save_file", write)
    libc = ctypes.CDLL(None)
    swap = getattr(libc, "renameat2", None) if can_swap else None
    system = type("System", (), {})()
    if swap:
      system.renameat2 = self._deadly(swap)
    patch.setattr(ctypes, "CDLL", lambda name: system)

  def _deadly(self, call, written=None):
    def called(*arguments, **options):
      self._calls += 1
      if self._calls < self._at:
        return call(*arguments, **options)
      if self._calls == self._at and written is not None:
        pathlib.Path(arguments[written]).write_bytes(b"ha")
      raise Killed

    return called


@pytest.mark.parametrize("can_swap", [True, False])
@pytest.mark.parametrize("before", [None, 1])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one_whole(
  before, can_swap, tmp_path
):
  ends = []
  for at in range(1, 99):
    folder = tmp_path / str(at) / "saved"
    if before:
      _save(folder, before)
    try:
      with pytest.MonkeyPatch.context() as patch:
        Death(patch, at, can_swap)
        _save(folder, 2)
    except Killed:
      try:
        ends.append(_saved(folder))
      except ValueError:  # there was none
        assert not folder.exists()
        ends.append(None)
      _save(folder, 3)
    assert _saved(folder) == (3 if len(ends) == at else 2)
    # Whatever the killed one left is gone.
    assert os.listdir(folder.parent) == ["saved"]
    if len(ends) < at:
      break
  assert ends == sorted(ends, key=lambda number: number or 0)
  assert set(ends) >= {before} and (ends[-1] == 2 or not before)
  assert len(ends) > 5


def test_what_another_process_is_saving_stays(tmp_path):
  with safetensors_files._new_beside(tmp_path / "saved") as new:
    _save(tmp_path / "saved", 1)
    assert new.exists()
  assert os.listdir(tmp_path) == ["saved"]


def test_saved_files_follow_the_umask_and_a_folder_stays_private(tmp_path):
  modes = lambda: {
    stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()
  }
  before = os.umask(0o027)
  try:
    _save(tmp_path / "a", 1)
    assert modes() == {0o640}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750
    (tmp_path / "a").chmod(0o700)
    os.umask(0o002)
    _save(tmp_path / "a", 2)
    assert modes() == {0o664}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
  finally:
    os.umask(before)


def test_a_link_goes_on_leading_to_what_is_saved(tmp_path):
  (tmp_path / "disk").mkdir()
  (tmp_path / "link").symlink_to("disk")
  for number in (1, 2):
    _save(tmp_path / "link", number)
    assert (tmp_path / "link").is_symlink()
    assert _saved(tmp_path / "disk") == number


@pytest.mark.parametrize(
  ("place", "message"),
  [
    ("run", "run is the work directory of a run"),
    ("run/a", "run/a is inside .*run, the work directory of a run"),
    ("run/checkpoints/a/b", "is inside .*run, the work directory of a run"),
    ("link/a", "run/a is inside .*run, the work directory of a run"),
    ("runs", "runs already holds phase1; choose another"),
    ("deep", "deep already holds a"),
    ("notes", r"notes already holds 1\.txt, 2\.txt, 3\.txt and 1 more"),
    ("file", "file is not a directory"),
    ("file/a", "writing .*file/a failed: "),
    (".", "current directory"),
  ],
)
def test_nothing_but_a_saved_folder_is_replaced(
  place, message, tmp_path, monkeypatch
):
  for run in ("run", "runs/phase1", "deep/a/b"):
    (tmp_path / run).mkdir(parents=True)
    (tmp_path / run / "config.json").write_text('{"task": "train_phases"}')
  (tmp_path / "link").symlink_to("run")
  (tmp_path / "notes").mkdir()
  _save(tmp_path / "notes", 1)
  for i in range(1, 5):
    (tmp_path / f"notes/{i}.txt").write_text("of somebody")
  (tmp_path / "file").write_text("of somebody")
  (tmp_path / "empty").mkdir()
  monkeypatch.chdir(tmp_path / "empty")
  held = lambda: {str(path) for path in tmp_path.rglob("*")}
  before = held()
  with pytest.raises(ValueError, match=message) as caught:
    _save(place if place == "." else tmp_path / place, 2)
  assert "\n" not in str(caught.value)
  assert held() == before


def test_a_disk_that_is_full_leaves_the_old_one(tmp_path, monkeypatch):
  _save(tmp_path / "a", 1)

  def fail(*arguments, **options):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "save", fail)
  with pytest.raises(ValueError, match=r"writing .*a failed: .*No space left"):
    _save(tmp_path / "a", 2)
  assert _saved(tmp_path / "a") == 1
  assert os.listdir(tmp_path) == ["a"]
