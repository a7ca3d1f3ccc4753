"""Charts of metrics over images."""

import re

import numpy as np
import pytest

from dcae_jax.evaluation import metrics
from dcae_jax.evaluation.report import distributions

EDGES = metrics.METRICS["psnr"].of_pairs.edges


def _run(values):
  """A result with what an evaluation counts of one metric, and its images."""
  bins = np.histogram(np.clip(values, EDGES[0], EDGES[-1]), EDGES)[0]
  result = {"resolutions": {"64": {"histograms": {"psnr": bins.tolist()}}}}
  rows = [{"name": f"<{i}>", "psnr": f"{x}"} for i, x in enumerate(values)]
  return result, rows


def test_a_few_images_are_dots_with_names_and_a_mean():
  (one, rows), (two, others) = _run([20.0, 22.0, 24.0]), _run([24.0, np.inf])
  images = {("one", "64"): rows, ("two", "64"): others}
  found = distributions.html_of([("one", one), ("two", two)], images)
  assert found.count("<circle") == 5 and "<polyline" not in found
  assert "PSNR, dB ↑ at 64 px" in found
  assert "<title>&lt;1&gt;: 22</title>" in found and "inf</title>" in found
  places = [float(x) for x in re.findall(r"<circle cx=([\d.]+)", found)]
  mean = float(re.search(r"<path d='M([\d.]+) 15v18'", found)[1])
  assert (
    mean == places[1] == pytest.approx((places[0] + places[2]) / 2, abs=0.2)
  )
  assert places[2] == places[3]  # the same value of another run
  last = float(re.search(rf"<text x=([\d.]+)[^>]*>{EDGES[-1]:g}<", found)[1])
  assert places[4] == last  # as in histograms


def test_more_images_are_a_histogram_of_all_runs():
  (one, rows), (two, _) = _run([20.0, 22.0]), _run(np.linspace(20, 30, 60))
  runs = [("one", one), ("two", two)]
  found = distributions.html_of(runs, {("one", "64"): rows})
  assert found.count("<polyline") == 2 and "<circle" not in found


@pytest.mark.parametrize(
  "values",
  [(24.1, 27.3), (0.031, 0.058), (20.0, 20.0), (0.0, 0.0), (-3.0, 99.0)],
)
def test_ticks_are_few_and_round_and_hold_the_values(values):
  ticks = distributions._ticks(*values)
  assert 2 <= len(ticks) <= 7
  assert ticks[0] <= values[0] and ticks[-1] >= values[1]
  assert all(len(f"{tick:g}") <= 5 for tick in ticks)
