"""Paths in configs: of runs that have moved, and of those that have not."""

import os

import pytest

from dcae_jax.runs import places


@pytest.fixture
def world(tmp_path, monkeypatch):
  """Runs in `new`, a link to it, and a current directory beside it."""
  for name in ("new/phase1", "new/phase2", "new/cells/a/0", "new/cells/b/0"):
    (tmp_path / name).mkdir(parents=True)
  (tmp_path / "new/phase1/config.json").touch()
  (tmp_path / "link").symlink_to(tmp_path / "new")
  (tmp_path / "old").mkdir()
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize(
  ("before", "now", "written_in"),
  [
    ("new/phase1", "{}/new/phase1", ""),
    ("link/phase1", "./new/phase1/", ""),
    ("/nowhere/phase1", "{}/new/phase1", ""),  # of an earlier version
    ("runs/quick/phase1", "new/phase1", ""),
    ("quick/phase1", "new/phase1", ""),
    ("/nowhere/phase1", "link/phase1", "/nowhere/phase2"),
    ("{}/old/phase1", "new/phase1", "{}/old/phase2"),
    ("{}/old", "{}/new/phase1/..", "{}/old/phase2"),
    ("gs://b/q/phase1", "new/phase1", "gs://b/q/phase2"),
  ],
)
def test_paths_that_mean_the_same(before, now, written_in, world):
  before, now, written_in = (
    x.replace("{}", str(world)) for x in (before, now, written_in)
  )
  for workdir in ("new/phase2", f"{world}/link/phase2"):
    assert places.same(before, now, workdir, written_in)


@pytest.mark.parametrize(
  ("before", "now", "written_in"),
  [
    ("", ".", ""),
    ("adamw", "muon", ""),
    ("adamw", "muon", "/nowhere/phase2"),
    ("owner/phase2", "owner/phase1", ""),
    ("owner/cells", "new/cells", ""),  # no run: maybe a hub id
    ("{}/old", "{}/new", ""),  # both are there
    ("{}/old/phase1", "{}/new/phase1", "{}/new/phase2"),  # nothing has moved
    ("/nowhere/phase3", "{}/new/phase1", ""),
    ("/nowhere/a/phase1", "{}/new/phase1", "/nowhere/phase2"),
    ("a\0b", "b", ""),
  ],
)
def test_paths_that_do_not(before, now, written_in, world):
  before, now, written_in = (
    x.replace("{}", str(world)) for x in (before, now, written_in)
  )
  assert not places.same(before, now, "new/phase2", written_in)


def test_what_moved_with_a_run_is_found(world):
  here, workdir = str(world / "new"), f"{world}/new/phase2"
  for written_in in ("", "/nowhere/phase2"):
    found = places.found("/nowhere/phase1", workdir, written_in)
    assert found == f"{here}/phase1"
  cell = f"{here}/cells/b/0"
  assert places.found("runs/study/cells/a/0", cell) == f"{here}/cells/a/0"
  for path in (
    "owner/phase1", "phase1", "/nowhere/phase9", str(world / "old"), "x" * 9999,
  ):  # fmt: skip
    assert places.found(path, workdir) == path


def test_local_paths_become_absolute_and_others_stay(world):
  assert places.absolute_if_there("new") == os.path.join(world, "new")
  for path in ("owner/name", "gs://b/new"):
    assert places.absolute_if_there(path) == path
