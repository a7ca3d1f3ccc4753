"""Pictures for people: grids of images, maps of errors, latent channels."""

import functools
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dcae_jax.runs import installed, plain_text

_GAP = 4  # pixels between images
_ERROR_TOP = 64  # of 255: white in maps of errors
_LEAST_ERROR_SIDE = 256  # pixels of such a map, for the words below it
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
  if package := installed.folder("matplotlib"):
    file = package / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    if file.exists():
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
