"""Pictures for people: grids of images, and loss curves."""

import functools
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dcae_jax import errors
from dcae_jax.runs import plain_text

_LOG = logging.getLogger(__name__)
_GAP = 4  # pixels between images
MOST_CHANNELS = 64  # of latents, in a picture


def grid(
  rows: Sequence[np.ndarray],
  labels: Sequence[str] | None = None,
  headings: Mapping[int, str] | None = None,
) -> np.ndarray:
  """One row per array uint8 [n, h, w, c], all of one shape.

  Labels of the rows, maybe of several lines, are on the left, headings of
  columns, by their number, above. Returns uint8 [height, width, 3].
  """
  n, height, width, _ = rows[0].shape
  font = ImageFont.load_default(size=max(11, height // 10))
  margin = head = 0
  if labels is not None:
    lines = [line for label in labels for line in label.splitlines()]
    widest = max((int(font.getlength(line)) for line in lines), default=0)
    margin = widest + 2 * _GAP
  if headings is not None:
    head = 2 * int(font.size)
  shape = (
    margin + n * (width + _GAP) + _GAP,
    head + len(rows) * (height + _GAP) + _GAP,
  )
  canvas = Image.new("RGB", shape, "white")
  draw = ImageDraw.Draw(canvas)
  for column, text in (headings or {}).items():
    left = margin + _GAP + column * (width + _GAP)
    draw.text((left, head // 2), text, fill="black", font=font, anchor="lm")
  for i, row in enumerate(rows):
    top = head + _GAP + i * (height + _GAP)
    if labels is not None:
      middle = top + height // 2
      draw.text((_GAP, middle), labels[i], fill="black", font=font, anchor="lm")
    for j, pixels in enumerate(row):
      left = margin + _GAP + j * (width + _GAP)
      canvas.paste(_picture(pixels), (left, top))
  return np.asarray(canvas)


def side_by_side(
  images: Sequence[np.ndarray], captions: Sequence[str]
) -> np.ndarray:
  """Images uint8 [h, w, c] of one size in a row, a caption below each.

  Returns uint8 [height, width, 3].
  """
  height, width, _ = images[0].shape
  font = ImageFont.load_default(size=max(12, min(height, width) // 24))
  needed = max(int(font.getlength(caption)) for caption in captions)
  column = max(width, needed) + _GAP
  line = 2 * int(font.size)
  shape = (_GAP + len(images) * column, _GAP + height + line)
  canvas = Image.new("RGB", shape, "white")
  draw = ImageDraw.Draw(canvas)
  for i, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
    left = _GAP + i * column
    canvas.paste(_picture(pixels), (left, _GAP))
    middle = _GAP + height + line // 2
    draw.text((left, middle), caption, fill="black", font=font, anchor="lm")
  return np.asarray(canvas)


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
  difference = np.abs(original.astype(float) - reconstruction).mean(axis=-1)
  scaled = 3 * np.clip(difference / 64, 0, 1)[..., None]
  return np.uint8(255 * np.clip(scaled - np.arange(3), 0, 1))


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


def loss_curves(
  runs: Mapping[str, Sequence[Mapping[str, float]]], metrics: Sequence[str]
) -> bytes:
  """A PNG with a panel per run and a curve per metric that it has, over steps.

  `runs` are lines of metrics.jsonl, by name.
  """
  panels = {
    name: {
      metric: [(x["step"], x[metric]) for x in lines if metric in x]
      for metric in metrics
    }
    for name, lines in runs.items()
  }
  return curves(panels, "step")


@_by_matplotlib
def curves(
  panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
  x_label: str,
  marker: str = "",
) -> bytes:
  """A PNG with a panel per title, and a curve per name of points (x, y)."""
  figure, axes = _panels(len(panels), len(panels))
  for panel, (title, lines) in zip(axes, panels.items(), strict=True):
    for name, points in lines.items():
      if points:
        xs, ys = zip(*points, strict=True)
        label = plain_text.escaped(name)  # fonts lack what controls terminals
        panel.plot(xs, ys, label=label, linewidth=1, marker=marker)
    panel.set_title(plain_text.escaped(title))
    panel.set_xlabel(x_label)
    panel.grid(alpha=0.3)
    if panel.lines:
      panel.legend(fontsize="small")
  return _png(figure)


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
  figure, axes = _panels(len(panels), 3)
  for panel, (title, lines) in zip(axes, panels.items(), strict=False):
    for number, (name, line) in enumerate(lines.items()):
      if not line.points:
        continue
      xs, means, least, most = np.transpose(line.points)
      style = {
        "label": plain_text.escaped(name),
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
    panel.set_title(plain_text.escaped(title), fontsize="medium")
    panel.set_xlabel(x_label)
    panel.grid(alpha=0.3)
    if ticks:
      ticks = list(map(plain_text.escaped, ticks))
      turned = max(map(len, ticks)) > 5
      panel.set_xticks(range(len(ticks)), ticks, rotation=30 if turned else 0)
      panel.margins(x=0.1)
    if any(name and line.points for name, line in lines.items()):
      panel.legend(fontsize="small")
  for panel in axes[len(panels) :]:
    panel.remove()
  return _png(figure)


def _panels(number: int, columns: int) -> tuple[Any, Any]:
  """A figure, and at least so many axes."""
  from matplotlib.backends import backend_agg  # slow to import; reports only
  from matplotlib.figure import Figure

  columns = min(number, columns)
  rows = -(-number // columns)
  figure = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
  backend_agg.FigureCanvasAgg(figure)
  return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def _png(figure: Any) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=120)
  return buffer.getvalue()
