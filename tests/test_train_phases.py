"""All three phases and the report through the command line, with real LPIPS."""

import json
import os

import pytest
from conftest import REPOSITORY, run_main
from etils import epath
from PIL import Image

import dcae_jax
from configs import base, quickstart
from dcae_jax.tasks import report, train_phases


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, compilation_cache):
  """The quickstart, shortened."""
  directory = tmp_path_factory.mktemp("runs") / "quickstart"
  flags = [f"--config.phase{i}.steps=3" for i in (1, 2, 3)]
  flags += [f"--config.phase{i}.log_every=1" for i in (1, 2, 3)]
  for part in ("phase1", "phase2", "phase3", "report"):
    flags.append(f"--config.{part}.compilation_cache={compilation_cache}")
  flags.append("--config.phase1.batch_size=8")
  found = run_main(
    "configs/quickstart.py",
    f"--workdir={os.path.relpath(directory, REPOSITORY)}",
    *flags,
  )
  assert found.returncode == 0, found.stderr
  assert "report.md" in found.stderr.splitlines()[-1]
  for noise in ("Warning", "Traceback", "Exception", "leaked"):
    assert noise not in found.stderr, found.stderr
  return directory


def test_a_phase_of_it_must_be_named(workdir):
  with pytest.raises(ValueError, match=r"three phases.*phase3"):
    dcae_jax.load(workdir)
  assert dcae_jax.load(workdir / "phase3").variant == "tiny-f8"


def test_quickstart_writes_a_report(workdir):
  numbers = json.loads((workdir / "report" / "report.json").read_text())
  assert list(numbers) == ["phase1", "phase2", "phase3"]
  for found in numbers.values():
    assert all(
      10 < x["psnr"] < 40 and 0 < x["ssim"] < 1 for x in found.values()
    )
  high = max(quickstart.get_config().report.resolutions)
  for name, height in (("reconstructions", 4 * high), ("loss_curves", 100)):
    with Image.open(workdir / "report" / f"{name}.png") as image:
      assert image.size[1] > height
  table = (workdir / "report" / "report.md").read_text()
  for phase, found in numbers.items():
    (row,) = (x for x in table.splitlines() if x.startswith(f"| {phase} "))
    for metrics in found.values():
      assert f"{metrics['psnr']:.2f} dB" in row


def test_report_agrees_with_the_runs_own_evaluation(workdir):
  numbers = json.loads((workdir / "report" / "report.json").read_text())
  for phase, found in numbers.items():
    result = json.loads((workdir / phase / "result.json").read_text())
    resolutions = quickstart.get_config()[phase].evaluation.resolutions
    for metric in ("psnr", "ssim"):
      own = found[str(resolutions[0])][metric]
      assert abs(own - result[f"eval/{metric}"]) < 1e-3


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
    ("phase3.model.variant", "tiny-f32", "phase1 has .*'tiny-f8'.*'tiny-f32'"),
    ("phase2.lpips.path", "/nowhere.npz", "no file /nowhere"),
    ("phase3.data.source.kind", "folder", "image folder '' does not exist"),
    ("report.resolutions", (64, 65), "side 65 is not divisible"),
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


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({}, "runs is empty"),
    ({"runs.a": "/nowhere"}, "'/nowhere' is not the work directory"),
    ({"runs.a": "/nowhere", "resolutions": ()}, "resolutions is empty"),
    ({"runs.a": "/nowhere", "samples": 0}, "samples=0"),
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
