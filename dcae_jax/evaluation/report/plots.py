"""Plots by matplotlib: curves of training, panels of curves, ranges.

Where it is not installed, a picture that says so takes their place.
"""

import functools
import io
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dcae_jax import errors
from dcae_jax.runs import installed, plain_text

_LOG = logging.getLogger(__name__)
_SAME_AXIS = 5  # times that sizes of curves on it may differ
_POWERS = 10  # times that values differ on an axis of powers
_MOST_LETTERS = 48  # of a name in a plot


def _by_matplotlib(draw: Callable[..., bytes]) -> Callable[..., bytes]:
  """Where it is not installed, the PNG says so, and the log does.

  Curves come at the end of work that can do without them.
  """

  @functools.wraps(draw)
  def drawn(*arguments: Any, **options: Any) -> bytes:
    try:
      installed.require("matplotlib", "metrics", "a picture of curves")
    except errors.UserError as error:
      _LOG.warning("%s", error)
      font, buffer = ImageFont.load_default(size=16), io.BytesIO()
      size = (int(font.getlength(str(error))) + 32, 48)
      canvas = Image.new("RGB", size, "white")
      ImageDraw.Draw(canvas).text((16, 14), str(error), "black", font)
      canvas.save(buffer, format="png")
      return buffer.getvalue()
    return draw(*arguments, **options)

  return drawn


class Training(NamedTuple):
  """A run's metrics.jsonl, and its result.json; {} until it has ended."""

  lines: Sequence[Mapping[str, float]]
  result: Mapping[str, float]


class Measure(NamedTuple):
  """Of an evaluation.

  Attributes:
    title: of its panel.
    is_log: its axis is of powers, where its values differ by as much.
  """

  title: str
  is_log: bool


@_by_matplotlib
def training_curves(
  runs: Mapping[str, Training], measures: Mapping[str, Measure]
) -> bytes:
  """A PNG with a row of panels for each run: its losses, then evaluations.

  Losses of different size have panels of their own, one above the other. Of the
  measures, those that a run has are shown, with its floor if it knows that.
  """
  losses = [
    _series(run.lines, "train/loss/(?!total$).+") for run in runs.values()
  ]
  groups = [by_size(found) or [[]] for found in losses]
  names = dict.fromkeys(key for found in losses for key in found)
  colors = {key: f"C{i}" for i, key in enumerate(names)}
  evaluated = [
    {
      measure: found
      for key, measure in measures.items()
      if (found := _series(run.lines, rf"eval/(\d+px/)?{key}"))
    }
    for run in runs.values()
  ]
  across = min(max(map(len, evaluated)), 3)
  heights = [
    max(1.9 * len(of_losses) + 0.6, 2.9 * -(-len(found) // 3))
    for of_losses, found in zip(groups, evaluated, strict=True)
  ]
  figure = _figure(3.6 * (1 + across), sum(heights))
  parts = figure.subfigures(len(runs), 1, squeeze=False, height_ratios=heights)
  for i, (name, run) in enumerate(runs.items()):
    part = parts[i, 0]
    part.suptitle(_escaped(name), fontweight="bold")
    places = part.add_gridspec(1, 1 + across)
    left = places[0].subgridspec(len(groups[i]), 1)
    for row, group in enumerate(groups[i]):
      panel = part.add_subplot(left[row])
      for key in group:
        name_of_loss = key.removeprefix("train/loss/")
        _plot(panel, losses[i][key], name_of_loss, color=colors[key])
      panel.set_title("" if row else "losses of training")
      _finish(panel, is_log=True)
    if not evaluated[i]:
      continue
    right = places[1:].subgridspec(-(-len(evaluated[i]) // across), across)
    for place, (measure, found) in zip(
      right, evaluated[i].items(), strict=False
    ):
      panel = part.add_subplot(place)
      for number, (key, points) in enumerate(found.items()):
        _plot(panel, points, key, marker="o", color=f"C{number}")
        floor = key.replace("eval/", "floor/", 1)
        if floor in run.result:
          style = {"color": f"C{number}", "linestyle": "--", "linewidth": 1}
          panel.axhline(run.result[floor], label=floor, **style)
      panel.set_title(measure.title)
      _finish(panel, measure.is_log)
  return _png(figure)


def _series(
  lines: Sequence[Mapping[str, float]], pattern: str
) -> dict[str, list[tuple[float, float]]]:
  """Points (step, value) of each key that is like a pattern.

  Of a step that was done twice, the last one; none that is not finite.
  """
  found: dict[str, dict[float, float]] = {}
  for line in lines:
    for key, value in line.items():
      if re.fullmatch(pattern, key) and math.isfinite(value):
        found.setdefault(key, {})[line["step"]] = value
  return {key: sorted(points.items()) for key, points in found.items()}


def by_size(
  curves: Mapping[str, Sequence[tuple[float, float]]],
) -> list[list[str]]:
  """Names of curves in groups that can share an axis, the largest first.

  The size of a curve is what a tenth of its values exceed: it may begin high.
  """
  sizes = {
    name: float(np.quantile(np.abs([y for _, y in points]), 0.9))
    for name, points in curves.items()
  }
  groups: list[list[str]] = []
  for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
    if not groups or 0 < sizes[name] * _SAME_AXIS < sizes[groups[-1][0]]:
      groups.append([])
    groups[-1].append(name)
  return groups


@_by_matplotlib
def curves(
  panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
  x_label: str,
) -> bytes:
  """A PNG with a panel per title, and a curve per name of points (x, y)."""
  figure, axes = _panels(len(panels))
  for panel, (title, lines) in zip(axes, panels.items(), strict=False):
    for name, points in lines.items():
      if points:
        _plot(panel, points, name, marker="o")
    panel.set_title(_escaped(title))
    _finish(panel, x_label=x_label)
  return _png(figure)


def _plot(
  panel: Any, points: Sequence[tuple[float, float]], name: str, **style: Any
) -> None:
  """A curve; one of a single point is a dot."""
  marker = style.pop("marker", "o" if len(points) == 1 else "")
  xs, ys = zip(*points, strict=True)
  panel.plot(
    xs, ys, label=_escaped(name), linewidth=1, marker=marker, ms=4, **style
  )


def _finish(panel: Any, is_log: bool = False, x_label: str = "step") -> None:
  """Axes, grid and legend of a panel that has its curves."""
  from matplotlib import ticker

  values = np.concatenate([[], *(line.get_ydata() for line in panel.lines)])
  if is_log and len(values) and 0 < values.min() * _POWERS <= values.max():
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(ticker.NullFormatter())
  else:
    panel.ticklabel_format(axis="y", useOffset=False)
  if x_label == "step":
    panel.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
  panel.set_xlabel(x_label)
  panel.grid(alpha=0.3)
  if panel.lines:
    panel.legend(fontsize="small")


class Line(NamedTuple):
  """Of a panel.

  Attributes:
    points: x, mean, least and most.
    style: of matplotlib's lines.
    color: "": the next one.
  """

  points: Sequence[tuple[float, float, float, float]]
  style: str = "-"
  color: str = ""


@_by_matplotlib
def ranges(
  panels: Mapping[str, Mapping[str, Line]],
  x_label: str,
  ticks: Sequence[str] = (),
) -> bytes:
  """A PNG with a panel per title, and a line per name with its ranges.

  With names of places, `ticks`, as bars at the places 0, 1, ...; else as bands.
  A line without a name has no line, only bars.
  """
  figure, axes = _panels(len(panels))
  for panel, (title, lines) in zip(axes, panels.items(), strict=False):
    for number, (name, line) in enumerate(lines.items()):
      if not line.points:
        continue
      xs, means, least, most = np.transpose(line.points)
      style = {
        "label": _escaped(name),
        "color": line.color or f"C{number % 10}",
        "linestyle": line.style if name else "none",
      }
      if ticks:
        # A mean of equal numbers may be rounded to beyond them.
        bars = np.maximum((means - least, most - means), 0)
        panel.errorbar(xs, means, bars, marker="o", ms=4, capsize=4, **style)
      else:
        panel.plot(xs, means, linewidth=1, **style)
        panel.fill_between(
          xs, least, most, color=style["color"], alpha=0.2, linewidth=0
        )
    panel.set_title(_escaped(title), fontsize="medium")
    panel.set_xlabel(x_label)
    panel.grid(alpha=0.3)
    if ticks:
      ticks = list(map(_escaped, ticks))
      turned = max(map(len, ticks)) > 5
      panel.set_xticks(range(len(ticks)), ticks, rotation=30 if turned else 0)
      panel.margins(x=0.1)
    if any(name and line.points for name, line in lines.items()):
      panel.legend(fontsize="small")
  return _png(figure)


def _escaped(text: str) -> str:
  """Without what controls terminals, which fonts lack; long ones shortened.

  A dollar would begin a formula.
  """
  text = plain_text.escaped(text)
  if len(text) > _MOST_LETTERS:
    text = f"{text[: _MOST_LETTERS // 2]}…{text[-_MOST_LETTERS // 2 :]}"
  return text.replace("$", r"\$")


def _panels(number: int) -> tuple[Any, Any]:
  """A figure and its axes, in rows of three at most."""
  columns = 2 if number == 4 else min(number, 3)
  rows = -(-number // columns)
  figure = _figure(4.5 * columns, 3.2 * rows)
  axes = figure.subplots(rows, columns, squeeze=False).flatten()
  for panel in axes[number:]:
    panel.remove()
  return figure, axes[:number]


def _figure(width: float, height: float) -> Any:
  """Empty, of so many inches."""
  from matplotlib.backends import backend_agg  # slow to import; reports only
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), layout="constrained")
  backend_agg.FigureCanvasAgg(figure)
  return figure


def _png(figure: Any) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=120)
  return buffer.getvalue()
