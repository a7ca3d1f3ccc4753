import logging

import jax
from etils import epath

from dcae_jax.runs import outcome

_FILES = {"pictures": "samples", "of each": "a/b.csv", "result": "result.json"}


def _said(workdir, caplog):
  caplog.set_level(logging.INFO)
  outcome.say(epath.Path(workdir), _FILES, {"latents": "gs://bucket/latents"})
  return caplog.messages


def test_what_is_there_has_a_line_each(tmp_path, caplog):
  """An empty folder is nothing that was made."""
  (tmp_path / "samples").mkdir()
  (tmp_path / "a").mkdir()
  for file in ("a/b.csv", "result.json"):
    (tmp_path / file).touch()
  lines = _said(tmp_path, caplog)[0].splitlines()
  assert lines == [
    "made:",
    "  latents  gs://bucket/latents",
    f"  of each  {tmp_path}/a/b.csv",
    f"  result   {tmp_path}/result.json",
  ]
  (tmp_path / "samples" / "1.png").touch()
  lines = _said(tmp_path, caplog)[1].splitlines()
  assert f"  pictures  {tmp_path}/samples" in lines


def test_the_first_process_says_it(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert not _said(tmp_path, caplog)
