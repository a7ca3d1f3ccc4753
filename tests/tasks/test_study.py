"""A study as a user has it: its cells, kills, several processes, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import html_pages
import jax
import numpy as np
import pytest
from conftest import REPOSITORY, said_made
from etils import epath

import dcae_jax
from configs import base
from dcae_jax.autoencoder import families
from dcae_jax.runs import lease
from dcae_jax.tasks import plan, study, throughput

_PATH = "eval/psnr"


@pytest.fixture
def tiny_study(tiny_config):
  """A function: two arms with two seeds, four steps each."""

  def create(**changes):
    c = base.study()
    c.base = tiny_config(1)
    c.arms = {"slow": {}, "fast": {"optimizer": {"learning_rate": 1e-2}}}
    c.seeds = (0, 3)
    c.measures = {"PSNR": _PATH, "latents": "latent_change"}
    c.compilation_cache = c.base.compilation_cache
    for key, value in changes.items():
      c[key] = value
    return c

  return create


def _run(config, workdir):
  return study.run(config, epath.Path(workdir))


def _results(workdir):
  """Of all cells."""
  return {
    str(path.parent.relative_to(workdir / "cells")): json.loads(
      path.read_text()
    )
    for path in sorted((workdir / "cells").glob("*/*/result.json"))
  }


def _psnr(workdir):
  return {name: result[_PATH] for name, result in _results(workdir).items()}


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory):
  """A finished study; of its arms, one starts from another."""
  workdir = tmp_path_factory.mktemp("studies") / "whole"
  c = base.study()
  c.base = tiny_config(1)
  c.arms = {
    "slow": {},
    "after": {"init_from": "{study}/cells/slow/{seed}"},
    "fast": {"optimizer": {"learning_rate": 1e-2}},
  }
  c.seeds = (0, 3)
  c.measures = {"PSNR": _PATH, "latents": "latent_change"}
  c.figure.over_steps = ("PSNR",)
  c.compilation_cache = c.base.compilation_cache
  assert _run(c, workdir)
  return c, workdir


def test_cells_are_runs_with_their_seed_and_changes(whole):
  _, workdir = whole
  assert set(_results(workdir)) == {
    f"{arm}/{seed}" for arm in ("slow", "after", "fast") for seed in (0, 3)
  }
  read = lambda cell: json.loads(
    (workdir / "cells" / cell / "config.json").read_text()
  )
  assert read("slow/3")["seed"] == 3
  assert read("fast/0")["optimizer"]["learning_rate"] == 1e-2
  assert read("slow/0")["optimizer"]["learning_rate"] == 1e-3
  assert read("after/3")["init_from"] == str(workdir / "cells/slow/3")
  assert len(set(_psnr(workdir).values())) == 6
  cell = workdir / "cells/slow/3"
  assert dcae_jax.load(cell).variant == "tiny-f2"
  assert plan.load(str(cell), {})[""].optimizer.learning_rate == 1e-3


def test_the_report_has_means_and_paired_differences(whole):
  _, workdir = whole
  found, psnr = json.loads((workdir / "study.json").read_text()), _psnr(workdir)
  slow, fast = (
    np.array([psnr[f"{arm}/{seed}"] for seed in (0, 3)])
    for arm in ("slow", "fast")
  )
  measured = found["arms"]["slow"]["measured"]
  np.testing.assert_allclose(measured[_PATH]["mean"], slow.mean(), rtol=1e-12)
  assert "latent_change" not in measured  # it started from nothing
  assert found["arms"]["after"]["measured"]["latent_change"]["least"] > 0
  compared = {tuple(x["arms"]): x["difference"] for x in found["compared"]}
  assert set(compared) == {("after", "slow"), ("fast", "slow")}
  between = compared["fast", "slow"][_PATH]
  np.testing.assert_allclose(between["mean"], np.mean(fast - slow), rtol=1e-9)
  for name in ("study.md", "index.html", "figure.png", "over_steps.png"):
    assert (workdir / name).stat().st_size > 200
  page = html_pages.read(workdir / "index.html")
  cells = {f"cells/{cell}/result.json" for cell in psnr}
  assert cells | {"figure.png", "study.json", "study.md"} <= page.links
  assert page.tables[0][1][0] == "slow" and "written" in page.text
  assert not list((workdir / "leases").rglob("*/*"))


def test_what_is_finished_is_not_run_again(whole, caplog):
  config, workdir = whole
  before = {x: x.stat().st_mtime for x in workdir.rglob("metrics.jsonl")}
  (workdir / "study.json").unlink()
  caplog.set_level("INFO")
  assert _run(config, workdir)
  assert said_made(caplog.text) == {
    "runs", "page", "report", "numbers", "figure", "curves"
  }  # fmt: skip
  assert (workdir / "study.json").exists()
  assert before == {
    x: x.stat().st_mtime for x in workdir.rglob("metrics.jsonl")
  }


@pytest.mark.parametrize("is_earlier", [False, True])
def test_a_study_that_has_moved_keeps_its_cells(
  is_earlier, whole, tmp_path, monkeypatch
):
  """What was written by an earlier version is read once more, not computed."""
  config, workdir = whole
  shutil.copytree(workdir, tmp_path / "there" / "study")
  (tmp_path / "link").symlink_to("there")
  monkeypatch.chdir(tmp_path)
  moved = epath.Path("link/study")
  if is_earlier:
    for file in moved.glob("cells/*/*/config.json"):
      found = json.loads(file.read_text().replace(str(workdir), "/no/study"))
      del found["workdir"]
      file.write_text(json.dumps(found))
    for file in moved.glob("cells/after/*/cell.json"):
      found = json.loads(file.read_text()) | {"config": "of another place"}
      file.write_text(json.dumps(found))
  before = {x: x.read_bytes() for x in moved.glob("cells/*/*/metrics.jsonl")}
  cells = study.study_lib.cells(config, moved)
  finished = {cell.name for cell in cells if cell.record()}
  kept = {cell.name for cell in cells if not is_earlier or not cell.before}
  assert finished == kept and len(kept) == (4 if is_earlier else 6)
  assert _run(config, moved)
  assert all(cell.record() for cell in cells)
  assert before == {
    x: x.read_bytes() for x in moved.glob("cells/*/*/metrics.jsonl")
  }


def test_other_studies_start_from_its_cells(whole, tiny_study, tmp_path):
  _, workdir = whole
  changes = {"init_from": "{study}/cells/slow/{seed}"}
  config = tiny_study(arms={"next": changes}, start_from=str(workdir))
  config.seeds = (0, 5)
  with pytest.raises(ValueError, match=r"cell slow/5 of the study .* finished"):
    _run(config, tmp_path)
  config.seeds = (3,)
  config.base.steps = 1
  assert _run(config, tmp_path)
  assert _results(tmp_path)["next/3"]["latent_change"] > 0


class _Process:
  """A worker of a study, in a process of its own."""

  def __init__(self, file, workdir):
    self.process = subprocess.Popen(
      [
        sys.executable, "-m", "dcae_jax.main", f"--config={file}",
        f"--workdir={workdir}",
      ],
      cwd=REPOSITORY,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )  # fmt: skip

  def finish(self):
    output, _ = self.process.communicate(timeout=400)
    return self.process.returncode, output


def test_killed_and_shared_by_two_it_ends_as_the_whole(
  whole, tiny_study, tmp_path
):
  config, workdir = tiny_study(), tmp_path / "shared"
  # Other processes do not know the variant.
  config.base.model.architecture = families.described("tiny-f2", {}, 3)
  file = tmp_path / "config.py"
  file.write_text(
    "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
    f"  return ConfigDict({config.to_dict()!r})\n"
  )
  killed = _Process(file, workdir)
  end = time.monotonic() + 240
  while not list(workdir.glob("cells/*/*/checkpoints/4/commit_success.txt")):
    assert time.monotonic() < end and killed.process.poll() is None
    time.sleep(0.01)
  killed.process.send_signal(signal.SIGKILL)
  assert killed.finish()[0] == -signal.SIGKILL
  left = {"slow/0", "slow/3", "fast/0", "fast/3"} - {
    f"{path.parent.parent.name}/{path.parent.name}"
    for path in workdir.glob("cells/*/*/cell.json")
  }
  workers = [_Process(file, workdir) for _ in range(2)]
  said = ""
  for worker in workers:
    code, output = worker.finish()
    assert code == 0, output
    said += output
  assert sorted(re.findall(r"; now (\S+)", said)) == sorted(left)
  assert "4 cells took" in (workdir / "study.md").read_text()
  expected = _psnr(whole[1])
  for cell, value in _psnr(workdir).items():
    np.testing.assert_allclose(value, expected[cell], rtol=1e-4)


def test_a_cell_of_somebody_else_is_left_alone(whole, monkeypatch, caplog):
  config, workdir = whole
  record = workdir / "cells/fast/3/cell.json"
  kept = record.read_text()
  record.unlink()
  other = lease.Leases(study.storage.Storage(f"{workdir}/leases"))
  monkeypatch.setattr(study, "_PATIENCE", 0.1)
  held = other.take("fast/3")

  def give_back(seconds):
    assert seconds == 0.1
    record.write_text(kept)
    held.release()

  monkeypatch.setattr(study.time, "sleep", give_back)
  with caplog.at_level("INFO"):
    assert _run(config, workdir)
  assert f"waiting for fast/3 ({held_by()})" in caplog.text
  assert "now fast/3" not in caplog.text


@pytest.fixture
def computed(tmp_path):
  """A study whose cells are finished, without computing any: b, by 0 and 1."""
  c = base.study()
  c.base = base.throughput()
  c.arms, c.seeds = {"a": {}, "b": {}}, (0, 1)
  c.measures = {"x": "measured/x"}
  for cell in study.study_lib.cells(c, epath.Path(tmp_path)):
    measured = {"x": cell.seed if cell.arm == "b" else 0}
    cell.finish(seconds=1.0, versions=study.versions.versions())
    (cell.workdir / "result.json").write_text(
      json.dumps({"measured": measured})
    )
  return c, tmp_path


def test_a_cell_that_others_finish_meanwhile_has_not_failed(
  computed, monkeypatch
):
  config, workdir = computed
  record = workdir / "cells/b/1/cell.json"
  kept = record.read_text()
  record.unlink()
  take = lease.Leases.take

  def take_late(leases, key):
    if key == "b/1":
      record.write_text(kept)
    return take(leases, key)

  monkeypatch.setattr(lease.Leases, "take", take_late)
  monkeypatch.setattr(study, "_PATIENCE", 0.1)
  assert _run(config, workdir)


def test_damaged_files_of_computed_cells_are_not_believed(computed):
  config, workdir = computed
  cells = study.study_lib.cells(config, epath.Path(workdir))
  (workdir / "cells/a/1/cell.json").write_text("")
  assert [x.name for x in cells if x.record() is None] == ["a/1"]
  (workdir / "cells/b/0/result.json").write_text("")
  for text in ("", "[]", "3"):
    (workdir / "cells/b/0/result.json").write_text(text)
    with pytest.raises(ValueError, match=r"b/0/result\.json is damaged"):
      study.study_lib.report(config, cells)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"steps": 3}, "steps: 4 there, 3 now"),
    ({"evaluation": {"max_images": 1}}, "max_images: 5000 there, 1 now"),
  ],
)  # fmt: skip
def test_results_of_another_config_are_not_taken_for_its_own(
  changes, message, tiny_study, tmp_path
):
  config = tiny_study(arms={"a": {}}, seeds=(0,))
  before = study.study_lib.cells(config, epath.Path(tmp_path))[0]
  study.start.write_config(before.config, before.workdir)
  (before.workdir / "result.json").write_text("{}")
  before.check_goes_on()
  config.arms.a = changes
  with pytest.raises(ValueError, match=message):
    _run(config, tmp_path)
  config.arms.a = {"steps": 5}
  study.study_lib.cells(config, epath.Path(tmp_path))[0].check_goes_on()


def test_pictures_of_something_else_are_not_written_over(computed):
  config, workdir = computed
  (workdir / "figure.png").write_text("mine")
  with pytest.raises(ValueError, match=r"holds figure\.png of something else"):
    _run(config, workdir)


def test_a_cell_without_enough_memory_does_not_end_the_study(
  computed, monkeypatch
):
  config, workdir = computed
  (workdir / "cells/a/0/cell.json").unlink()

  def allocate(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

  monkeypatch.setattr(throughput, "run", allocate)
  with pytest.raises(ValueError, match=r"1 of 4 cells failed \(a/0: RESOURCE"):
    _run(config, workdir)
  assert "3 cells took" in (workdir / "study.md").read_text()


def held_by():
  return f"{os.uname().nodename}, process {os.getpid()}"


def test_a_cell_that_fails_is_named_and_the_others_go_on(tiny_study, tmp_path):
  config = tiny_study(seeds=(0,))
  optimizer = {"learning_rate": 2e9, "clip_norm": 0.0, "warmup_steps": 0}
  config.arms.slow = {"optimizer": optimizer, "steps": 50}
  config.arms.late = {"init_from": "{study}/cells/slow/{seed}"}
  with pytest.raises(
    ValueError, match=r"2 of 3 cells failed \(slow/0: .* at step"
  ):
    _run(config, tmp_path)
  assert set(_results(tmp_path)) == {"fast/0"}
  found = json.loads((tmp_path / "study.json").read_text())
  assert found["cells_unfinished"] == 2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"arms": {"a": {"optimizer": {"knd": 1}}}}, "optimizer.knd .* 'kind'"),
    ({"arms": {"a": {"steps": "many"}}}, "arms.a.steps: .*"),
    ({"arms": {"a": {"steps": 0}}}, "steps=0 is below 1"),
    ({"arms": {"a": {"phase": "4"}}}, "arm a: unknown phase '4'"),
    ({"arms": {"a": {"data": 3}}}, "arms.a.data=3 is no group"),
    ({"arms": {"a/b": {}}}, "'a/b'; use letters"),
    ({"arms": {}}, "must not be empty"),
    ({"arms": {"a": 3}}, "arms.a=3 is no group"),
    ({"arms": {"a": {"steps": None}}}, "steps=None is of the wrong form"),
    ({"seeds": (1, 1)}, "different whole numbers"),
    ({"seeds": ("a", "b")}, "seeds=.* is of the wrong form"),
    ({"seeds": (0, 0.5)}, "seeds=.* is of the wrong form"),
    ({"measures": {"PSNR": 3}}, "measures.PSNR=3 is no path"),
    ({"pairs": ("slow", "fast")}, "'slow', which is no two arms"),
    ({"pairs": (("slow",),)}, "which is no two arms"),
    ({"published": {"rFID": 3.0}}, "rFID=3.0 has no numbers by arm"),
    ({"pairs": (("slow", "quick"),)}, "'quick', which is no arm"),
    ({"compare": "sum"}, "known are difference, ratio"),
    ({"published": {"rFID": {"quick": 1.0}}}, "'quick', which is no arm"),
    (
      {"arms": {"a": {"init_from": "{study}/cells/b/{seed}"}}},
      "starts from b/0, which is no cell",
    ),
  ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
  changes, message, tiny_study, tmp_path
):
  config = tiny_study()
  for key, value in changes.items():
    config[key] = value
  with pytest.raises(ValueError, match=message):
    _run(config, tmp_path / "study")
  assert not (tmp_path / "study").exists()
