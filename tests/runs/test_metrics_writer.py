import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from dcae_jax import errors
from dcae_jax.runs import metrics_writer


def _write(workdir, first_step, steps):
  writer = metrics_writer.MetricsWriter(
    epath.Path(workdir), first_step, False, True
  )
  for step in steps:
    writer.scalars(step, {"train/loss/l1": step / 10})
  writer.close()


def _steps(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["step"] for line in lines]


def test_lines_beyond_the_restored_step_are_written_again(tmp_path):
  _write(tmp_path, 0, [1, 2, 3, 4])
  _write(tmp_path, 2, [3, 4, 5])
  assert _steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
  _write(tmp_path, 0, [1, 2])
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 3, "train/lo')
  assert len(metrics_writer.read_lines(epath.Path(tmp_path / "metrics.jsonl")))
  _write(tmp_path, 3, [4])
  assert _steps(tmp_path) == [1, 2, 4]


@pytest.mark.parametrize(
  "line",
  ["[]", "3", "{}", '{"step": "a"}', '{"step": 1.5}', '{"step": 1, "l1": "a"}',
   '{"step": 1, "l1": {}}', '{"step": true}'],
)  # fmt: skip
def test_lines_of_another_kind_are_named(line, tmp_path):
  _write(tmp_path, 0, [1, 2])
  path = epath.Path(tmp_path / "metrics.jsonl")
  path.write_text(f"{path.read_text()}{line}\n")
  with pytest.raises(errors.UserError, match=r"line 3 of .*jsonl is damaged"):
    metrics_writer.final_values(path)
  with pytest.raises(errors.UserError, match="; remove it"):
    _write(tmp_path, 2, [3])


def test_speeds_are_those_of_the_whole_training(tmp_path):
  """Step 3 took place, and its line was lost with a process."""
  writer = metrics_writer.MetricsWriter(epath.Path(tmp_path), 0, False, True)
  writer.scalars(0, {"eval/psnr": 10.0})
  for step, rate in ((2, 1.0), (4, 4.0)):
    speeds = {"steps_per_second": rate, "images_per_second": 8 * rate}
    writer.scalars(step, {f"train/{k}": v for k, v in speeds.items()})
  writer.scalars(4, {"eval/psnr": 20.0})
  writer.close()
  path = epath.Path(tmp_path / "metrics.jsonl")
  lines = metrics_writer.read_lines(path)
  assert metrics_writer.seconds_of_training(lines) == [0.0, 2.0, 0.5, 0.0]
  assert metrics_writer.final_values(path) == {
    "step": 4,
    "train/seconds": 2.5,
    "train/steps_per_second": 1.6,
    "train/images_per_second": 12.8,
    "eval/psnr": 20.0,
  }


class Kept:
  """A writer; what the last one was given."""

  def __init__(self, workdir, first_step):
    self.seen = [first_step]
    Kept.last = self

  @staticmethod
  def check():
    pass

  def scalars(self, step, values):
    self.seen.append((step, values))

  def image(self, step, name, pixels):
    self.seen.append((step, name, pixels.shape))

  def close(self):
    self.seen.append("closed")


class Failing(Kept):
  def scalars(self, step, values):
    super().scalars(step, values)
    raise ConnectionError("no route\nto the host")


def _write_with(names, workdir):
  writer = metrics_writer.MetricsWriter(
    epath.Path(workdir), 2, False, True, names
  )
  writer.scalars(3, {"eval/psnr": 20})
  writer.image(3, "grid", np.zeros((2, 3, 3), np.uint8))
  writer.close()


def test_a_writer_is_a_line_in_a_table(tmp_path, monkeypatch):
  monkeypatch.setitem(metrics_writer.WRITERS, "kept", Kept)
  _write_with(("tensorboard", "kept"), tmp_path)
  assert Kept.last.seen == [
    2,
    (3, {"eval/psnr": 20.0}),
    (3, "grid", (2, 3, 3)),
    "closed",
  ]
  names = [path.name.partition(".")[0] for path in tmp_path.iterdir()]
  assert sorted(names) == ["events", "metrics", "samples"]


def test_a_run_does_without_a_writer_that_fails(tmp_path, monkeypatch, caplog):
  monkeypatch.setitem(metrics_writer.WRITERS, "failing", Failing)
  _write_with(("failing",), tmp_path)
  assert Kept.last.seen == [2, (3, {"eval/psnr": 20.0})]
  assert caplog.messages == ["failing writes no more: no route"]
  assert _steps(tmp_path) == [3]
  assert (tmp_path / "samples" / "grid_00000003.png").exists()


def test_known_writers_are_named():
  with pytest.raises(
    errors.UserError,
    match=r"unknown writer 'tb' in config.writers; .* tensorboard, wandb$",
  ):
    metrics_writer.check(("tensorboard", "tb"), enabled=False)


def test_images_are_saved_as_png(tmp_path):
  writer = metrics_writer.MetricsWriter(epath.Path(tmp_path), 0, False, True)
  pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
  writer.image(7, "grid", pixels)
  writer.image(8, "grey", pixels[..., :1])
  writer.close()
  for name, expected in (("grid_00000007", pixels), ("grey_00000008", None)):
    with Image.open(tmp_path / "samples" / f"{name}.png") as image:
      found = np.asarray(image)
    if expected is None:
      expected = pixels[..., 0]
    np.testing.assert_array_equal(found, expected)


def test_other_processes_write_nothing(tmp_path):
  writer = metrics_writer.MetricsWriter(epath.Path(tmp_path), 0, False, False)
  writer.scalars(1, {"a": 1.0})
  writer.image(1, "grid", np.zeros((2, 2, 3), np.uint8))
  writer.close()
  assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_no_part(tmp_path):
  """A folder of its name is in the way, as a full disk would be."""
  (tmp_path / "a.json").mkdir()
  with pytest.raises(OSError, match=r"a\.json"):
    metrics_writer.write_json(epath.Path(tmp_path / "a.json"), {})
  assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
