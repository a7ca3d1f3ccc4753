import os

from dcae_jax.runs import owned_directory


def test_what_others_put_in_its_place_is_not_waited_for(tmp_path):
  """A pipe; and what a link leads to is not removed."""
  (tmp_path / "files").mkdir()
  (tmp_path / "files/lock").touch()
  os.symlink(tmp_path / "files", tmp_path / "run_link")
  (tmp_path / "run_pipe").mkdir()
  os.mkfifo(tmp_path / "run_pipe/lock")
  owned = owned_directory.OwnedDirectory("run", str(tmp_path))
  assert os.path.isdir(owned.path) and (tmp_path / "files/lock").exists()
