import importlib.metadata
import pathlib
import shutil
import subprocess

import pytest
from conftest import REPOSITORY

from dcae_jax.runs import versions


def test_a_clone_is_named_by_its_commit_whatever_is_installed(monkeypatch):
  monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
  if not (REPOSITORY / ".git").exists():
    pytest.skip("this is no clone")
  command = ["git", "describe", "--always"]
  commit = subprocess.check_output(command, cwd=REPOSITORY, text=True).strip()
  assert versions.versions()["dcae_jax"].rstrip("+") == f"a clone at {commit}"


def test_an_installed_package_is_not_the_repository_that_it_lies_in(
  tmp_path, monkeypatch
):
  """Such as with .venv/ within a project of its own."""
  git = ("git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=@")
  subprocess.run([*git, "init", "-q"], check=True)
  subprocess.run([*git, "commit", "-qm", "x", "--allow-empty"], check=True)
  place = tmp_path / "site-packages" / "dcae_jax" / "runs"
  place.mkdir(parents=True)
  file = pathlib.Path(shutil.copy(versions.__file__, place))
  monkeypatch.setattr(versions, "__file__", str(file))
  monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
  assert versions.versions()["dcae_jax"] == "1.0"
