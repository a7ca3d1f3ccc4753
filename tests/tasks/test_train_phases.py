"""All three phases and the report through the command line, with real LPIPS."""

import json
import os
import shutil

import html_pages
import pytest
from conftest import REPOSITORY, run_main, said_made
from etils import epath
from PIL import Image

import dcae_jax
from configs import base, quickstart
from dcae_jax.setup import floor
from dcae_jax.tasks import plan, report, train_phases
from dcae_jax.training import loop


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, compilation_cache):
  """The quickstart, shortened."""
  directory = tmp_path_factory.mktemp("runs") / "quickstart"
  flags = [f"--config.phase{i}.steps=3" for i in (1, 2, 3)]
  flags += [f"--config.phase{i}.log_every=1" for i in (1, 2, 3)]
  for part in ("phase1", "phase2", "phase3", "report"):
    flags.append(f"--config.{part}.compilation_cache={compilation_cache}")
  flags += [f"--config.phase{i}.batch_size=4" for i in (1, 2, 3)]
  measured = [f"phase{i}.evaluation" for i in (1, 2, 3)] + ["report"]
  flags += [f"--config.{part}.resolutions=(64,)" for part in measured]
  found = run_main(
    "configs/quickstart.py",
    f"--workdir={os.path.relpath(directory, REPOSITORY)}",
    *flags,
  )
  assert found.returncode == 0, found.stderr
  assert said_made(found.stderr) == {
    "phase1",
    "phase2",
    "phase3",
    "page",
    "result",
  }
  of_report, _ = found.stderr.rsplit("made:\n", 1)
  assert said_made(of_report) == {
    "page",
    "report",
    "numbers",
    "picture",
    "curves",
  }
  for text in (f"| {floor.NAME} | 64 |", "| step 3 "):
    assert text in found.stderr
  for noise in ("Warning", "Traceback", "Exception", "leaked"):
    assert noise not in found.stderr, found.stderr
  return directory


def test_a_phase_of_it_must_be_named(workdir):
  with pytest.raises(ValueError, match=r"three phases.*phase3"):
    dcae_jax.load(workdir)
  assert dcae_jax.load(workdir / "phase3").variant == "tiny-f8-rms"


def test_quickstart_writes_a_report(workdir):
  numbers = json.loads((workdir / "report" / "report.json").read_text())
  assert list(numbers) == [floor.NAME, "phase1", "phase2", "phase3"]
  for found in numbers.values():
    assert all(
      5 < x["psnr"] < 40
      and 0 < x["ssim"] < 1
      and 0 < x["lpips"] < 2
      and x["frechet_efficientnet_lite0"] > 0
      for x in found.values()
    )
  for size, found in numbers[floor.NAME].items():  # above runs of three steps
    assert found["psnr"] > numbers["phase3"][size]["psnr"] + 3
  for name, height in (("reconstructions", 5 * 64), ("loss_curves", 100)):
    with Image.open(workdir / "report" / f"{name}.png") as image:
      assert image.size[1] > height
  table = (workdir / "report" / "report.md").read_text()
  for name, found in numbers.items():
    rows = [x for x in table.splitlines() if x.startswith(f"| {name} ")]
    for row, (size, metrics) in zip(rows, found.items(), strict=True):
      cells = [cell.strip() for cell in row.strip("|").split("|")]
      assert cells[1:4] == [
        size,
        f"{metrics['psnr']:.2f}",
        f"{metrics['ssim']:.4f}",
      ]
  assert "of fewer than 2,048 images" in table


def test_the_report_is_a_page_with_curves_and_the_floor(workdir):
  page = html_pages.read(workdir / "report" / "index.html")
  for words in (floor.NAME, "phase3", "LPIPS", "<svg"):
    assert words in page.text
  assert {"loss_curves.png", "report.md", "report.json"} <= page.links
  for phase in ("phase1", "phase2", "phase3"):
    place = f"latents f8c16, from {workdir / phase}<"
    assert f"tiny-f8-rms, 1,165,612 parameters, {place}" in page.text


def test_report_agrees_with_the_runs_own_evaluation(workdir):
  numbers = json.loads((workdir / "report" / "report.json").read_text())
  del numbers[floor.NAME]
  of_phases = json.loads((workdir / "result.json").read_text())
  for phase, found in numbers.items():
    result = json.loads((workdir / phase / "result.json").read_text())
    assert result == of_phases[phase]
    for metric in ("psnr", "ssim", "lpips"):
      assert abs(found["64"][metric] - result[f"eval/{metric}"]) < 1e-3


def test_runs_end_with_their_floor(workdir):
  """The same as in the report, where the crops are the same."""
  numbers = json.loads((workdir / "report" / "report.json").read_text())
  result = json.loads((workdir / "phase1" / "result.json").read_text())
  for metric in ("psnr", "ssim", "lpips"):
    expected = numbers[floor.NAME]["64"][metric]
    assert result[f"floor/{metric}"] == pytest.approx(expected, abs=1e-3)


def test_a_report_without_the_training_images_has_no_floor_and_says_so(
  workdir, tmp_path, compilation_cache
):
  run = tmp_path / "run"
  shutil.copytree(workdir / "phase1", run)
  config = json.loads((run / "config.json").read_text())
  config["data"]["source"] |= {"kind": "folder", "path": "/not/here"}
  del config["model"]["scan"]  # of a run from before this key
  (run / "config.json").write_text(json.dumps(config))
  c = base.report()
  c.runs["o|ne\x1b"] = str(run)
  c.source = base.source("embedded", split="validation")
  c.resolutions, c.max_images, c.metrics = (64,), 2, ()
  c.compilation_cache = compilation_cache
  report.run(c, epath.Path(tmp_path / "report"))
  numbers = json.loads((tmp_path / "report" / "report.json").read_text())
  assert list(numbers) == ["o|ne\x1b"]
  text = (tmp_path / "report" / "report.md").read_text()
  assert f"{floor.NAME} is absent: image folder '/not/here'" in text
  assert r"| o\|ne\\x1b |" in text and "\x1b" not in text


def test_a_run_from_before_sources_had_parts_has_its_floor(workdir, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(workdir / "phase1", run)
  config = json.loads((run / "config.json").read_text())
  del config["data"]["source"]["part"], config["data"]["source"]["held_out"]
  (run / "config.json").write_text(json.dumps(config))
  ((source, _),) = floor.of_run(str(run)).weighted_sources
  assert len(source) == 81


def test_phases_are_trained_with_the_losses_of_the_paper(workdir):
  keys = {}
  for phase in ("phase1", "phase2", "phase3"):
    text = (workdir / phase / "metrics.jsonl").read_text().splitlines()
    keys[phase] = set().union(*(json.loads(line) for line in text))
  for found in keys.values():
    assert {"train/loss/l1", "train/loss/lpips"} <= found
  gan = {"train/loss/generator", "train/loss/discriminator"}
  assert gan <= keys["phase3"]
  assert not gan & (keys["phase1"] | keys["phase2"])


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("phase3.trainable", ("decoder/head",), "'decoder/head' matches no"),
    (
      "phase3.model.variant",
      "tiny-f32",
      "phase1 has .*'tiny-f8-rms'.*'tiny-f32'",
    ),
    ("phase2.lpips.path", "/nowhere.npz", "no file /nowhere"),
    (
      "phase3.data.source.kind",
      "folder",
      r"config\.phase3\.data\.source\.path is empty; name a folder of images",
    ),
    ("report.resolutions", (64, 65), "side 65 in config.report.resolutions"),
    ("phase2.resolution", 100, "side 100 in config.phase2.resolution is not"),
    ("phase2.batch_size", 10**9, "of config.phase2.batch_size=1000000000"),
    ("phase2.data.workers", 1000, "config.phase2.data.workers=1000 is above"),
    ("phase2.evaluation.resolutions", (2**20,), "8 images of 1048576 px"),
  ],
)
def test_all_phases_are_checked_before_the_first_starts(
  tmp_path, key, value, message
):
  config = quickstart.get_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    train_phases.run(config, epath.Path(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_sigterm_between_phases_starts_no_other(tmp_path, monkeypatch):
  started = []

  def phase(config, workdir, sigterm):
    started.append(workdir.name)
    sigterm.received = True  # during the last evaluation, say
    return True

  monkeypatch.setattr(train_phases.train_autoencoder, "run", phase)
  config = quickstart.get_config()
  assert not train_phases.run(config, epath.Path(tmp_path / "run"))
  assert started == ["phase1"]
  sigterm = loop.Sigterm()  # of whoever runs all of them
  assert not train_phases.run(config, epath.Path(tmp_path / "run"), sigterm)
  assert sigterm.received


@pytest.fixture(scope="module")
def tiny_phases(tiny_config, compilation_cache):
  """A function: the config of three phases of a step each, and their report."""

  def create():
    c = base.three_phases("f32c32")
    for number in (1, 2, 3):
      c[f"phase{number}"] = tiny_config(number, steps=1)
    c.report.source = c.phase1.evaluation.source
    c.report.resolutions, c.report.metrics = (32,), ()
    c.report.max_images, c.report.samples = 1, 1
    c.report.compilation_cache = compilation_cache
    return c

  return create


@pytest.fixture(scope="module")
def moved_phases(tiny_phases, tmp_path_factory):
  """A finished run in `new`, which was `old` before; a link to it is `link`."""
  root = tmp_path_factory.mktemp("moved")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(root)
    assert train_phases.run(tiny_phases(), epath.Path("old"))
  (root / "old").rename(root / "new")
  (root / "link").symlink_to(root / "new")
  return root


def _check(config, workdir):
  """As each of the runs does before it writes anything."""
  config = train_phases.chained(config, workdir)
  train_phases.start.check_work_directory(config, workdir)
  for name in ("phase1", "phase2", "phase3"):
    train_phases.start.check_work_directory(config[name], workdir / name)


@pytest.mark.parametrize("place", ["new", "link", "{}/new", "../{}/link"])
@pytest.mark.parametrize("is_earlier", [False, True])
def test_phases_that_have_moved_or_have_another_name_go_on(
  place, is_earlier, moved_phases, tiny_phases, tmp_path, monkeypatch
):
  shutil.copytree(moved_phases, tmp_path, dirs_exist_ok=True, symlinks=True)
  (tmp_path / "link").unlink()
  (tmp_path / "link").symlink_to("new")
  monkeypatch.chdir(tmp_path)
  if is_earlier:  # as it was written before paths were absolute
    for file in tmp_path.glob("new/**/config.json"):
      text = file.read_text().replace(f"{moved_phases}/old/", "quick/old/")
      found = json.loads(text)
      found.pop("workdir", None)
      file.write_text(json.dumps(found))
  place = place.replace("../{}", f"../{tmp_path.name}")
  workdir = epath.Path(place.replace("{}", str(tmp_path)))
  _check(tiny_phases(), workdir)
  other = tiny_phases()
  other.phase1.seed = 1
  with pytest.raises(ValueError, match=r"phase1\.seed: 0 there, 1 now"):
    _check(other, workdir)


def test_moved_phases_are_trained_further_loaded_and_planned(
  moved_phases, tiny_phases, tmp_path, monkeypatch
):
  shutil.copytree(moved_phases / "new", tmp_path / "runs" / "copy")
  monkeypatch.chdir(tmp_path / "runs")
  config = tiny_phases()
  config.phase2.steps = 2
  assert train_phases.run(config, epath.Path("copy"))
  monkeypatch.chdir(tmp_path)
  for name, steps in (("phase1", 1), ("phase2", 2), ("phase3", 1)):
    run = f"runs/copy/{name}"
    assert (
      json.loads((tmp_path / run / "result.json").read_text())["step"] == steps
    )
    assert dcae_jax.load(run).variant == "tiny-f2"
    assert plan.load(run, {})[""].steps == steps
  planned = plan.load("runs/copy", {})
  before = str(tmp_path / "runs/copy/phase1")
  assert planned[" phase 2"].init_from == before
  (tmp_path / "runs").rename(tmp_path / "elsewhere")
  planned = plan.load("elsewhere/copy", {})
  assert planned[" phase 2"].init_from == before.replace(
    "/runs/", "/elsewhere/"
  )


def test_another_predecessor_is_still_another_config(
  moved_phases, tiny_config, tmp_path
):
  """Though it lies where the one before lay, as seen from elsewhere."""
  for name in ("a", "b"):
    shutil.copytree(moved_phases / "new/phase1", tmp_path / name / "phase1")
  config = tiny_config(2, init_from=str(tmp_path / "a/phase1"))
  config = train_phases.models.with_model(config)
  workdir = epath.Path(tmp_path / "b/phase2")
  train_phases.start.write_config(config, workdir)
  config.init_from = str(tmp_path / "b/phase1")
  with pytest.raises(ValueError, match=r"another config \(init_from"):
    train_phases.start.check_work_directory(config, workdir)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({}, "runs is empty"),
    ({"runs.a": "/nowhere"}, "'/nowhere' is not the work directory"),
    ({"runs.a": "/nowhere", "resolutions": ()}, "resolutions is empty"),
    ({"runs.a": "/nowhere", "samples": 0}, "samples=0"),
    ({"runs.a": "/nowhere", "metrics": ("fid",)}, "unknown metric 'fid'"),
  ],
)
def test_reports_without_runs_are_refused(tmp_path, changes, message):
  config = base.report()
  for key, value in changes.items():
    if key.startswith("runs."):
      config.runs[key.removeprefix("runs.")] = value
    else:
      config[key] = value
  with pytest.raises(ValueError, match=message):
    report.run(config, epath.Path(tmp_path / "report"))
  assert not (tmp_path / "report").exists()
