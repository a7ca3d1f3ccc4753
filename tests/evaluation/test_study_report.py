import io

import html_pages
import numpy as np
import pytest
from PIL import Image

from dcae_jax.evaluation.report import plots, study_report

_PATH, _FLOOR = "eval/64px/psnr", "floor/64px/psnr"


def _study(**changes):
  """Two arms; the second one has one seed less, and no floor."""
  rng = np.random.default_rng(0)
  arms = {}
  for name, seeds in {"a": (0, 1, 2), "b<i>": (0, 2)}.items():
    results = {seed: {_PATH: rng.normal(20, 3)} for seed in seeds}
    lines = {
      seed: [{"step": 0, _PATH: 9.0}, {"step": 5, _PATH: 10.0 + seed}]
      for seed in seeds
    }
    records = {
      seed: {
        "seconds": 1800.0,
        "versions": {"dcae_jax": "1", "jax": "2", "devices": "1 cpu"},
      }
      for seed in seeds
    }
    arms[name] = study_report.Arm({"steps": 3}, results, lines, records)
  for result in arms["a"].results.values():
    result[_FLOOR] = 15.0
  values = {
    "title": "Title",
    "arms": arms,
    "seeds": (0, 1, 2),
    "measures": {"PSNR": _PATH},
    "pairs": (),
    "compare": "difference",
    "figure": study_report.Figure({}, (), "", ("PSNR",)),
    "published": {"rFID": {"a": 0.5}},
    "base": {"task": "train_autoencoder"},
  }
  return study_report.Study(**values | changes)


def _values(study, arm):
  results = study.arms[arm].results
  return {seed: result[_PATH] for seed, result in results.items()}


def test_statistics_are_numpys():
  study = _study()
  a, b = (_values(study, arm) for arm in ("a", "b<i>"))
  summary = study_report.summary(study)
  found = summary["arms"]["a"]["measured"][_PATH]
  numbers = np.array(list(a.values()))
  assert found["seeds"] == 3
  np.testing.assert_allclose(found["mean"], np.mean(numbers), rtol=1e-12)
  np.testing.assert_allclose(found["deviation"], np.std(numbers, ddof=1))
  assert (found["least"], found["most"]) == (min(numbers), max(numbers))
  between = summary["compared"][0]
  assert between["arms"] == ("b<i>", "a")
  paired = np.array([b[seed] - a[seed] for seed in (0, 2)])
  found = between["difference"][_PATH]
  assert found["seeds"] == 2
  np.testing.assert_allclose(found["mean"], np.mean(paired), rtol=1e-12)
  np.testing.assert_allclose(found["deviation"], np.std(paired, ddof=1))
  assert list(found["values"]) == ["0", "2"]
  assert summary["cells_unfinished"] == 1


def test_ratios_are_of_the_same_seed():
  study = _study(compare="ratio", pairs=(("a", "b<i>"),))
  a, b = (_values(study, arm) for arm in ("a", "b<i>"))
  found = study_report.summary(study)["compared"][0]["ratio"][_PATH]
  assert found["values"] == {"0": a[0] / b[0], "2": a[2] / b[2]}


def test_a_ratio_to_nothing_is_no_number():
  study = _study(compare="ratio")
  study.arms["a"].results[2][_PATH] = 0.0
  found = study_report.summary(study)["compared"][0]["ratio"][_PATH]
  assert np.isnan(found["values"]["2"]) and np.isnan(found["mean"])


def test_tables_mark_what_is_published_and_the_floor():
  header, a, b, floor = study_report.table(_study())
  assert header == ["arm", "seeds", "PSNR ↑", "published: rFID"]
  assert a[:2] == ["a", "3"] and a[3] == "0.5"
  assert b[:2] == ["b<i>", "2"] and b[3] == ""
  assert floor == ["block PCA", "", "15.00 (15.00 to 15.00)", ""]
  text = study_report.markdown(_study())
  assert "5 cells took 2.50 hours" in text
  assert "not finished: 1." in text
  page = html_pages.Page(study_report.write_page(_study()))
  assert "b&lt;i&gt;" in page.text and "b<i>" not in page.text
  assert "cells/b%3Ci%3E/2/result.json" in page.links


def test_floors_that_differ_name_their_arms():
  study = _study()
  for results in study.arms["b<i>"].results.values():
    results[_FLOOR] = 16.0
  *_, first, second = study_report.table(study)
  assert first[0] == "block PCA, a" and first[2].startswith("15.00")
  assert second[0] == "block PCA, b<i>" and second[2].startswith("16.00")


def test_a_measure_that_no_cell_has_is_absent():
  study = _study(measures={"PSNR": "eval/prsn"})
  assert study_report.table(study)[1][2] == "absent"


def test_tables_say_of_how_many_seeds_a_number_is():
  study = _study(measures={"PSNR": _PATH, "floor": _FLOOR})
  del study.arms["a"].results[1][_FLOOR]
  row = study_report.table(study)[1]
  assert row[1] == "3" and row[3] == "15.00 (15.00 to 15.00), 2 of 3"


@pytest.mark.parametrize("lines", [{}, {"both": ("a", "b<i>")}])
def test_figures_have_a_panel_for_each_measure(lines):
  study = _study(figure=study_report.Figure(lines, (8, 16), "x", ("PSNR",)))
  for data in (
    study_report.write_figure(study),
    study_report.write_curves(study),
  ):
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    assert pixels.std() > 5
  narrow = _study(published={}, figure=study.figure)
  widths = [
    Image.open(io.BytesIO(study_report.write_figure(x))).width
    for x in (study, narrow)
  ]
  assert widths[0] == 2 * widths[1]


def test_numbers_that_are_the_same_with_each_seed_are_drawn():
  study = _study()
  for result in study.arms["a"].results.values():
    result[_FLOOR] = 0.1  # of which the mean of three is more
  assert study_report.write_figure(study)


def test_names_of_arms_are_shown_as_they_are():
  arms = {"a|`\x1b": _study().arms["a"]._replace(changes={"x": "`\x1b|"})}
  study = _study(arms=arms, published={}, title="<b>\x1b")
  text = study_report.markdown(study)
  assert "\x1b" not in text
  assert r"# \<b\>\\x1b" in text and r"| a\|\`\\x1b |" in text
  assert r'- a\|\`\\x1b: `{"x": "\u0060\u001b|"}`' in text
  assert study_report.write_figure(study)  # without a warning of glyphs
  assert plots.curves({"a\x1b": {"b\x1b": [(0, 1), (1, 2)]}}, "step")
  page = study_report.write_page(study)
  assert "\x1b" not in page and r"&lt;b&gt;\x1b" in page
