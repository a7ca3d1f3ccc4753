"""Pictures for people: grids of images, maps of errors, and curves."""

import functools
import importlib.util
import io
import itertools
import logging
import math
import pathlib
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dcae_jax import errors
from dcae_jax.runs import plain_text

_LOG = logging.getLogger(__name__)
_GAP = 4  # pixels between images
_ERROR_TOP = 64  # of 255: white in maps of errors
_LEAST_ERROR_SIDE = 256  # pixels of such a map, for the words below it
_SAME_AXIS = 5  # times that sizes of curves on it may differ
_POWERS = 10  # times that values differ on an axis of powers
_MOST_LETTERS = 48  # of a name in a plot
MOST_CHANNELS = 64  # of latents, in a picture


def grid(
  rows: Sequence[np.ndarray],
  labels: Sequence[str] | None = None,
  headings: Mapping[int, str] | None = None,
) -> np.ndarray:
  """One row per array uint8 [n, h, w, c], all of one shape.

  Labels of the rows are on the left, headings of columns, by their number,
  above. Both are broken into lines; columns grow to hold the words of headings.
  Returns uint8 [height, width, 3].
  """
  n, height, width, _ = rows[0].shape
  font = _font(max(13, height // 10))
  across, down = width + _GAP, height + _GAP
  margin = head = 0
  if labels is not None:
    most = max(3, height // _line_height(font))
    labels = [_wrapped(text, font, 12 * font.size, most) for text in labels]
    margin = 2 * _GAP + max(_width(text, font) for text in labels)
    down = max(down, _height(labels, font) + _GAP)
  headings = dict(sorted((headings or {}).items()))
  if headings:
    ends = itertools.pairwise([*headings, n])
    spans = {column: end - column for column, end in ends}
    for column, text in headings.items():
      word = max(_width(word, font) for word in text.split())
      across = max(across, -(-word // spans[column]) + 2 * _GAP)
    headings = {
      column: _wrapped(text, font, spans[column] * across - _GAP, 3)
      for column, text in headings.items()
    }
    head = _height(headings.values(), font) + _GAP
  shape = (margin + n * across + _GAP, head + len(rows) * down + _GAP)
  canvas = Image.new("RGB", shape, "white")
  draw = ImageDraw.Draw(canvas)
  for column, text in headings.items():
    left = margin + _GAP + column * across
    _write(draw, (left, head), text, font, "ld")
  for i, row in enumerate(rows):
    top = head + _GAP + i * down + (down - _GAP - height) // 2
    if labels is not None:
      _write(draw, (_GAP, top + height // 2), labels[i], font, "lm")
    for j, pixels in enumerate(row):
      left = margin + _GAP + j * across
      canvas.paste(_picture(pixels), (left, top))
  return np.asarray(canvas)


def side_by_side(
  images: Sequence[np.ndarray], captions: Sequence[str]
) -> np.ndarray:
  """Images uint8 [h, w, c] of one size in a row, a caption below each.

  Returns uint8 [height, width, 3].
  """
  height, width, _ = images[0].shape
  font = _font(max(13, min(height, width) // 24))
  across = max(width, 12 * font.size) + _GAP
  captions = [_wrapped(text, font, across - _GAP, 3) for text in captions]
  below = _height(captions, font) + 2 * _GAP
  shape = (_GAP + len(images) * across, _GAP + height + below)
  canvas = Image.new("RGB", shape, "white")
  draw = ImageDraw.Draw(canvas)
  for i, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
    left = _GAP + i * across
    canvas.paste(_picture(pixels), (left, _GAP))
    _write(draw, (left, height + 2 * _GAP), caption, font, "la")
  return np.asarray(canvas)


@functools.cache
def _font(size: int) -> Any:
  """Matplotlib's where it is installed: Pillow's own lacks accents."""
  found = importlib.util.find_spec("matplotlib")
  if found is not None and found.origin:
    fonts = pathlib.Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"
    if (file := fonts / "DejaVuSans.ttf").exists():
      return ImageFont.truetype(file, size)
  return ImageFont.load_default(size)


def _line_height(font: Any) -> int:
  return -(-5 * int(font.size) // 4)


def _height(texts: Iterable[str], font: Any) -> int:
  """Of the one with most lines, in pixels."""
  return _line_height(font) * max(text.count("\n") + 1 for text in texts)


def _width(text: str, font: Any) -> int:
  """Of its longest line, in pixels."""
  return math.ceil(max(map(font.getlength, text.split("\n"))))


def _wrapped(text: str, font: Any, width: int, most: int) -> str:
  """In lines of so many pixels; if there are too many, "…" is at the end."""
  text = plain_text.escaped(text, kept="\n\t")
  count = max(len(text), 1)
  while count > 1 and _width(textwrap.fill(text, count), font) > width:
    count = count * 9 // 10
  lines = textwrap.wrap(text, count)
  if len(lines) > most:
    lines[most - 1 :] = [lines[most - 1][: count - 1] + "…"]
  return "\n".join(lines)


def _write(
  draw: ImageDraw.ImageDraw,
  place: tuple[int, int],
  text: str,
  font: Any,
  anchor: str,
) -> None:
  """At a place of the text, as Pillow names it: a is its top, d its bottom."""
  lines, line = text.split("\n"), _line_height(font)
  x, y = place
  y -= {"a": 0, "m": 1, "d": 2}[anchor[1]] * len(lines) * line // 2
  for number, words in enumerate(lines):
    middle = y + number * line + line // 2
    draw.text((x, middle), words, "black", font, anchor[0] + "m")


def _picture(pixels: np.ndarray) -> Image.Image:
  return Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])


def reduced(image: np.ndarray, side: int) -> np.ndarray:
  """A square image uint8 [h, h, c], with `side` pixels a side at most."""
  if len(image) <= side:
    return image
  channels = [
    Image.fromarray(image[..., i]).resize((side, side), Image.Resampling.BOX)
    for i in range(image.shape[-1])
  ]
  return np.stack(channels, axis=-1)


def error_map(original: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
  """Mean absolute difference over channels, as colours from black to white.

  White is 64 of 255 or more, dark red a few. All are uint8 [h, w, c].
  """
  return _error_colors(
    np.abs(original.astype(float) - reconstruction).mean(axis=-1)
  )


def _error_colors(differences: np.ndarray) -> np.ndarray:
  scaled = 3 * np.clip(differences / _ERROR_TOP, 0, 1)[..., None]
  return np.uint8(255 * np.clip(scaled - np.arange(3), 0, 1))


def error_picture(
  original: np.ndarray, reconstruction: np.ndarray
) -> np.ndarray:
  """The map of errors above its bar of colours, uint8 [height, width, 3].

  Small ones are enlarged by a whole number, so that the words can be read.
  """
  errors = error_map(original, reconstruction)
  times = -(-_LEAST_ERROR_SIDE // errors.shape[1])
  errors = errors.repeat(times, axis=0).repeat(times, axis=1)
  height, width, _ = errors.shape
  font = _font(max(13, width // 20))
  line = _line_height(font)
  bar = height + _GAP, height + _GAP + line // 2
  canvas = Image.new("RGB", (width, bar[1] + 2 * line + _GAP), "white")
  canvas.paste(_picture(errors), (0, 0))
  colors = _error_colors(np.linspace(0, _ERROR_TOP, width))
  colors = np.broadcast_to(colors, (bar[1] - bar[0], width, 3))
  canvas.paste(_picture(np.ascontiguousarray(colors)), (0, bar[0]))
  draw = ImageDraw.Draw(canvas)
  draw.rectangle((0, bar[0], width - 1, bar[1] - 1), outline="grey")
  _write(draw, (0, bar[1]), "0", font, "la")
  _write(draw, (width // 2, bar[1]), f"{_ERROR_TOP // 2}", font, "ma")
  _write(draw, (width, bar[1]), f"{_ERROR_TOP}+", font, "ra")
  _write(
    draw, (width // 2, bar[1] + line), "mean absolute error, of 255", font, "ma"
  )
  return np.asarray(canvas)


def detailed_window(image: np.ndarray, parts: int = 4) -> tuple[slice, slice]:
  """The window of 1 / `parts` of each side that has the strongest edges.

  The image is uint8 [h, w, c]; windows lie at half steps of their size.
  """
  height, width, _ = image.shape
  size = (max(height // parts, 1), max(width // parts, 1))
  grey = image.astype(float).mean(axis=-1)
  edges = np.zeros_like(grey)
  edges[1:] += np.abs(np.diff(grey, axis=0))
  edges[:, 1:] += np.abs(np.diff(grey, axis=1))
  windows = [
    (slice(top, top + size[0]), slice(left, left + size[1]))
    for top in range(0, height - size[0] + 1, max(size[0] // 2, 1))
    for left in range(0, width - size[1] + 1, max(size[1] // 2, 1))
  ]
  return max(windows, key=lambda window: edges[window].sum())


def latent_channels(latents: np.ndarray) -> np.ndarray:
  """The first `MOST_CHANNELS` of latents [h, w, c], grey, as a grid.

  Each is scaled to its own mean plus and minus three standard deviations.
  Returns uint8 [height, width, 3].
  """
  latents = np.asarray(latents, np.float64)[..., :MOST_CHANNELS]
  mean, deviation = latents.mean(axis=(0, 1)), latents.std(axis=(0, 1))
  scaled = (latents - mean) / np.where(deviation > 0, deviation, 1.0)
  grey = np.uint8(np.clip(127.5 + scaled * 42.5, 0, 255))
  times = max(1, 64 // max(grey.shape[:2]))
  grey = grey.repeat(times, axis=0).repeat(times, axis=1)
  columns = min(16, grey.shape[-1])
  blank = -grey.shape[-1] % columns
  grey = np.pad(grey, ((0, 0), (0, 0), (0, blank)), constant_values=255)
  channels = grey.transpose(2, 0, 1)[..., None]
  return grid(
    [channels[i : i + columns] for i in range(0, len(channels), columns)]
  )


def _by_matplotlib(draw: Callable[..., bytes]) -> Callable[..., bytes]:
  """Where it is not installed, the PNG says so, and the log does.

  Curves come at the end of work that can do without them.
  """

  @functools.wraps(draw)
  def drawn(*arguments: Any, **options: Any) -> bytes:
    try:
      errors.require("matplotlib", "metrics", "a picture of curves")
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
