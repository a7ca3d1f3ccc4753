"""Plots for people."""

import io
import math

from PIL import Image

from dcae_jax.evaluation.report import plots


def test_losses_of_different_size_have_panels_of_their_own():
  def flat(value):
    return [(step, value) for step in range(20)]

  curves = {
    "l1": [(0, 9.0), *flat(0.05)[1:]],  # it begins high
    "lpips": flat(0.06),
    "generator": flat(-0.8),
    "discriminator": flat(1.0),
    "kl": flat(200.0),
  }
  assert plots.by_size(curves) == [
    ["kl"], ["discriminator", "generator"], ["lpips", "l1"]
  ]  # fmt: skip
  assert plots.by_size({"a": flat(1.0), "b": flat(0.0)}) == [["a", "b"]]
  assert plots.by_size({}) == []


def test_curves_are_finite_and_have_each_step_once():
  lines = [
    {"step": 1, "train/loss/l1": 3.0, "train/loss/total": 9.0},
    {"step": 3, "train/loss/l1": math.nan, "eval/psnr": 20.0},
    {"step": 2, "train/loss/l1": 2.0, "eval/64px/psnr": 21.0},
    {"step": 2, "train/loss/l1": 1.0, "eval/64px/psnr_other": 21.0},
  ]
  losses = plots._series(lines, "train/loss/(?!total$).+")
  assert losses == {"train/loss/l1": [(1, 3.0), (2, 1.0)]}
  assert list(plots._series(lines, r"eval/(\d+px/)?psnr")) == [
    "eval/psnr", "eval/64px/psnr"
  ]  # fmt: skip


def test_training_curves_show_losses_evaluations_and_the_floor():
  def size(*runs):
    named = {f"run $_{i}": run for i, run in enumerate(runs)}
    picture = plots.training_curves(named, measures)
    return Image.open(io.BytesIO(picture)).size

  measures = {
    "psnr": plots.Measure("PSNR, dB", False),
    "rfid": plots.Measure("rFID", True),
  }
  one = plots.Training([{"step": 1, "train/loss/l1": 1.0}], {})
  both = plots.Training(
    [*one.lines, {"step": 1, "train/loss/kl": 100.0, "eval/psnr": 20.0}],
    {"floor/psnr": 19.0, "step": 1},
  )
  nothing = plots.Training([], {})
  (width, height), (wider, higher) = size(one), size(both)
  assert wider == 2 * width and higher > 1.4 * height
  assert size(one, nothing, both) == (wider, 2 * height + higher)
