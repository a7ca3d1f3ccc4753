"""The report of a study: arms side by side, with means and ranges over seeds.

Reads nothing: what the cells of the study have reached comes as plain numbers.
"""

import dataclasses
import functools
import html
import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcae_jax.evaluation import metrics as metrics_table
from dcae_jax.evaluation.report import page, plots, text_table
from dcae_jax.runs import plain_text, versions

FIGURE, CURVES = "figure.png", "over_steps.png"
_FLOOR = "block PCA"
_OURS, _THEIRS = "eval/", "floor/"  # where a run measures itself, and its floor


def _ratio(first: float, second: float) -> float:
  return first / second if second else math.nan


COMPARISONS: dict[str, Callable[[float, float], float]] = {
  "difference": operator.sub,
  "ratio": _ratio,
}


class Arm(NamedTuple):
  """What is compared; the last three are of finished cells, by seed.

  Attributes:
    changes: what differs from the study's base config.
    results: numbers by path.
    lines: of metrics.jsonl.
    records: seconds and versions.
  """

  changes: dict[str, Any]
  results: dict[int, dict[str, float]]
  lines: dict[int, Sequence[Mapping[str, float]]]
  records: dict[int, dict[str, Any]]


class Figure(NamedTuple):
  """As `config.figure` of a study."""

  lines: Mapping[str, Sequence[str]]
  ticks: Sequence[str]
  x_label: str
  over_steps: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Study:
  """A study, with the keys of its config, and its arms by name."""

  title: str
  arms: dict[str, Arm]
  seeds: tuple[int, ...]
  measures: dict[str, str]
  pairs: tuple[tuple[str, str], ...]
  compare: str
  figure: Figure
  published: dict[str, dict[str, float]]
  base: dict[str, Any]

  @property
  def compared(self) -> tuple[tuple[str, str], ...]:
    """Pairs of arms."""
    first, *others = self.arms
    return self.pairs or tuple((arm, first) for arm in others)

  @property
  def lines(self) -> Mapping[str, Sequence[str]]:
    """Arms from left to right, by the name of what joins them."""
    return self.figure.lines or {"": tuple(self.arms)}

  @property
  def unfinished(self) -> int:
    """Cells."""
    finished = sum(len(arm.results) for arm in self.arms.values())
    return len(self.arms) * len(self.seeds) - finished

  def values(self, arm: str, path: str) -> dict[int, float]:
    """By seed."""
    results = self.arms[arm].results
    return {
      seed: results[seed][path]
      for seed in self.seeds
      if path in results.get(seed, {})
    }

  def between(self, pair: tuple[str, str], path: str) -> dict[int, float]:
    """The first arm compared with the second one, seed by seed."""
    first, second = (self.values(arm, path) for arm in pair)
    compare = COMPARISONS[self.compare]
    return {
      seed: compare(first[seed], second[seed])
      for seed in first
      if seed in second
    }


def statistics(values: Mapping[int, float]) -> dict[str, Any]:
  """Of one number with several seeds; empty where there is none.

  The deviation is that of the sample, of two seeds or more.
  """
  if not values:
    return {}
  numbers = np.array(list(values.values()))
  found = {
    "seeds": len(numbers),
    "mean": float(numbers.mean()),
    "least": float(numbers.min()),
    "most": float(numbers.max()),
    "values": {str(seed): value for seed, value in values.items()},
  }
  if len(numbers) > 1:
    found["deviation"] = float(numbers.std(ddof=1))
  return found


def summary(study: Study) -> dict[str, Any]:
  """The contents of `study.json`."""
  of = lambda values: {
    path: statistics(found) for path in _paths(study) if (found := values(path))
  }
  return {
    "title": study.title,
    "cells_unfinished": study.unfinished,
    "measures": study.measures,
    "arms": {
      name: {
        "changes": arm.changes,
        "measured": of(lambda path, name=name: study.values(name, path)),
        "published": {
          what: by_arm[name]
          for what, by_arm in study.published.items()
          if name in by_arm
        },
        "cells": {str(seed): x for seed, x in arm.records.items()},
      }
      for name, arm in study.arms.items()
    },
    "compared": [
      {
        "arms": pair,
        study.compare: of(lambda path, pair=pair: study.between(pair, path)),
      }
      for pair in study.compared
    ],
    "base": study.base,
  }


def _paths(study: Study) -> list[str]:
  """Of the measures, and of their floors."""
  paths = study.measures.values()
  return [*paths, *(floor for path in paths if (floor := _floor_of(path)))]


def _floor_of(path: str) -> str:
  if not path.startswith(_OURS):
    return ""
  return _THEIRS + path.removeprefix(_OURS)


def _column(path: str) -> metrics_table.Column | None:
  return metrics_table.columns().get(path.rpartition("/")[-1])


def _heading(name: str, path: str) -> str:
  """Of a measure, with an arrow that says which way is better."""
  column = _column(path)
  return name + (column.arrow if column else "")


def _text(path: str, value: float) -> str:
  column = _column(path)
  return column.text(value) if column else f"{value:.4g}"


def _cell(
  values: Mapping[int, float], text: Callable[[float], str], seeds: int
) -> str:
  """Mean and range; says so if some of the seeds have no such number."""
  found = statistics(values)
  if not found:
    return "absent"
  some = "" if found["seeds"] == seeds else f", {found['seeds']} of {seeds}"
  mean, least, most = (text(found[x]) for x in ("mean", "least", "most"))
  if found["seeds"] == 1:
    return f"{mean}{some}"
  return f"{mean} ({least} to {most}){some}"


def table(study: Study) -> list[list[str]]:
  """Of the arms, below a row of heads; what is published is marked as such."""
  headings = [_heading(*measure) for measure in study.measures.items()]
  published = [f"published: {what}" for what in study.published]
  rows = [["arm", "seeds", *headings, *published]]
  for name, arm in study.arms.items():
    seeds = len(arm.results)
    cells = [
      _cell(study.values(name, path), functools.partial(_text, path), seeds)
      for path in study.measures.values()
    ]
    theirs = [
      f"{by_arm[name]:.4g}" if name in by_arm else ""
      for by_arm in study.published.values()
    ]
    rows.append([name, str(seeds), *cells, *theirs])
  for label, cells in _floors(study).items():
    rows.append([label, "", *cells, *("" for _ in study.published)])
  return rows


def _floors(study: Study) -> dict[str, list[str]]:
  """Cells of each floor, by what it is called: with the arms that have it."""
  arms: dict[tuple[str, ...], list[str]] = {}
  for name in next(iter(study.lines.values())):
    cells = []
    for path in study.measures.values():
      values = study.values(name, _floor_of(path))
      text = functools.partial(_text, path)
      cells.append(_cell(values, text, len(values)) if values else "")
    if any(cells):
      arms.setdefault(tuple(cells), []).append(name)
  if len(arms) == 1:
    return {_FLOOR: list(*arms)}
  return {
    f"{_FLOOR}, {', '.join(names)}": list(cells)
    for cells, names in arms.items()
  }


def table_of_pairs(study: Study) -> list[list[str]]:
  """Of arms compared seed by seed, below a row of heads."""
  sign, symbol = {"difference": ("+", "-"), "ratio": ("", "/")}[study.compare]
  rows = [[study.compare, "seeds", *study.measures]]
  for pair in study.compared:
    between = {
      path: study.between(pair, path) for path in study.measures.values()
    }
    seeds = max(map(len, between.values()))
    cells = [
      _cell(values, lambda x: f"{x:{sign}.3g}", seeds)
      for values in between.values()
    ]
    rows.append([f" {symbol} ".join(pair), str(seeds), *cells])
  return rows


def write_figure(study: Study) -> bytes:
  """A PNG with a panel for each measure, and for what is published."""
  panels = {}
  for name, path in study.measures.items():
    lines = {
      line: plots.Line(_points(study, arms, path))
      for line, arms in study.lines.items()
    }
    arms = next(iter(study.lines.values()))
    floor = _points(study, arms, _floor_of(path))
    lines[_FLOOR] = plots.Line(floor, "--", "grey")
    panels[_heading(name, path)] = lines
  for what, by_arm in study.published.items():
    panels[f"published: {what}"] = {
      line: plots.Line(
        [
          (place, *3 * (by_arm[arm],))
          for place, arm in enumerate(arms)
          if arm in by_arm
        ],
        ":",
      )
      for line, arms in study.lines.items()
    }
  ticks = study.figure.ticks or next(iter(study.lines.values()))
  return plots.ranges(panels, study.figure.x_label, list(map(str, ticks)))


def _points(
  study: Study, arms: Sequence[str], path: str
) -> list[tuple[float, float, float, float]]:
  """Place, mean, least and most of each arm that has any."""
  points = []
  for place, arm in enumerate(arms):
    if found := statistics(study.values(arm, path)):
      points.append((place, found["mean"], found["least"], found["most"]))
  return points


def write_curves(study: Study) -> bytes:
  """A PNG with a panel for each measure that is shown over steps."""
  panels = {}
  for name in study.figure.over_steps:
    path = study.measures[name]
    panels[_heading(name, path)] = {
      arm: plots.Line(_over_steps(found.lines.values(), path))
      for arm, found in study.arms.items()
    }
  return plots.ranges(panels, "step")


def _over_steps(
  lines: Iterable[Sequence[Mapping[str, float]]], path: str
) -> list[tuple[float, float, float, float]]:
  """Step, mean, least and most over seeds."""
  values: dict[int, list[float]] = {}
  for of_seed in lines:
    for line in of_seed:
      if path in line:
        values.setdefault(int(line["step"]), []).append(line[path])
  return [
    (step, float(np.mean(found)), min(found), max(found))
    for step, found in sorted(values.items())
  ]


def _conditions(study: Study) -> list[str]:
  """Sentences on what was computed, and by what."""
  records = [x for arm in study.arms.values() for x in arm.records.values()]
  if not records:
    return ["No cell is finished."]
  hours = sum(record["seconds"] for record in records) / 3600
  computed = versions.in_words(record["versions"] for record in records)
  sentences = [
    "Means over seeds, with the least and the most.",
    f"{len(records)} cells took {hours:.2f} hours in all, by the clock of "
    f"each, without starts that were stopped ({computed}).",
  ]
  if study.unfinished:
    sentences.append(f"Cells that are not finished: {study.unfinished}.")
  return sentences


def markdown(study: Study) -> str:
  """The contents of `study.md`."""
  parts = [
    f"# {plain_text.markdown(study.title or 'Study')}",
    " ".join(_conditions(study)),
    text_table.markdown(table(study)),
  ]
  if study.compared:
    parts += ["Seed by seed:", text_table.markdown(table_of_pairs(study))]
  parts.append(f"![measures of each arm]({FIGURE})")
  if study.figure.over_steps:
    parts.append(f"![measures over steps]({CURVES})")
  differing = [
    f"- {plain_text.markdown(name)}: `{_code(arm.changes)}`"
    for name, arm in study.arms.items()
    if arm.changes
  ]
  parts += ["What differs between arms:", "\n".join(differing)]
  return "\n\n".join(parts) + "\n"


def _code(value: Any) -> str:
  """JSON without the sign that ends code in Markdown."""
  return json.dumps(value).replace("`", "\\u0060")


def write_page(study: Study) -> str:
  """The HTML report."""
  figure = page.plot(FIGURE, "measures of each arm")
  parts = [page.Part("Arms", page.table(table(study)) + figure)]
  if study.compared:
    parts.append(page.Part("Seed by seed", page.table(table_of_pairs(study))))
  if study.figure.over_steps:
    curves = page.plot(CURVES, "measures over steps")
    parts.append(page.Part("Over steps", curves))
  cells = {
    name: ", ".join(
      page.link(f"seed {seed}", f"cells/{name}/{seed}/result.json")
      for seed in arm.records
    )
    for name, arm in study.arms.items()
  }
  parts.append(page.Part("Cells", page.facts(cells)))
  described = {name: arm.changes for name, arm in study.arms.items()}
  changes = ""
  for name, config in (described | {"all arms": study.base}).items():
    text = html.escape(json.dumps(config, indent=2, ensure_ascii=False))
    changes += page.folded(name, f"<pre>{text}</pre>")
  parts.append(page.Part("What differs between arms", changes))
  about = {
    "conditions": html.escape(" ".join(_conditions(study))),
    "numbers": ", ".join(page.link(x, x) for x in ("study.json", "study.md")),
  }
  return page.document(study.title or "Study", about, parts)
