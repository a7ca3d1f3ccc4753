"""How metrics are distributed over images: charts in HTML, one for each.

Fewer than 50 images are dots, each with its name; bins would hold one or two of
them. More are a histogram.
"""

import html
import math
from collections.abc import Mapping, Sequence

from dcae_jax.evaluation import metrics as metrics_table
from dcae_jax.evaluation.report import comparison

FEWEST_IN_BINS = 50  # images of each run
_COLOURS = 6  # of the page's style, --0, --1, ...
_WIDTH, _HEIGHT = 320, 120
_ROW = 34  # pixels of a run's dots and its name
# Rows of images_*px.csv, by run and resolution.
Images = Mapping[tuple[str, str], Sequence[Mapping[str, str]]]


def html_of(runs: comparison.Runs, images: Images) -> str:
  """A small chart per resolution and metric, with all runs that have it."""
  charts = []
  sizes = dict.fromkeys(
    size for _, result in runs for size in result["resolutions"]
  )
  for size in sizes:
    for key, metric in metrics_table.METRICS.items():
      bins = {
        name: result["resolutions"][size]["histograms"][key]
        for name, result in runs
        if key in result["resolutions"].get(size, {}).get("histograms", {})
      }
      if not bins:
        continue
      colours = {name: _colour(i) for i, (name, _) in enumerate(runs)}
      edges = metric.of_pairs.edges.tolist()
      if all((name, size) in images for name in bins):
        dots = {
          name: [(x["name"], float(x[key])) for x in images[name, size]]
          for name in bins
        }
        chart = _dots(dots, edges[-1], colours)
      else:
        chart = _histogram(bins, edges, colours)
      title = html.escape(f"{metric.columns[key].title} at {size} px")
      charts.append(f"<div><b>{title}</b>{chart}</div>")
  keys = " ".join(
    f"<span style='color:{_colour(i)}'>■</span> {html.escape(name)}"
    for i, (name, _) in enumerate(runs)
  )
  legend = "A dot is an image, a stroke the mean of a row. " if images else ""
  return f"<p>{legend}{keys}</p><div class=charts>{''.join(charts)}</div>"


def _colour(run: int) -> str:
  return f"var(--{run % _COLOURS})"


def _dots(
  images: Mapping[str, Sequence[tuple[str, float]]],
  last: float,
  colours: Mapping[str, str],
) -> str:
  """A row for each run: a dot for each image's value, a line at their mean.

  What is beyond the last value that histograms have, as of images that are the
  same, is there.
  """
  shown = {
    run: [(name, value, min(value, last)) for name, value in of_run]
    for run, of_run in images.items()
  }
  values = [x for of_run in shown.values() for *_, x in of_run]
  ticks = _ticks(min(values), max(values))
  first, span = ticks[0], ticks[-1] - ticks[0]

  def place(value):
    return _WIDTH * (value - first) / span

  height = _ROW * len(shown)
  parts = [
    f"<path d='M{place(tick):.1f} 0V{height}' style='stroke:var(--line)'/>"
    f"<text x={place(tick):.1f} y={height + 14} text-anchor=middle>{tick:g}"
    "</text>"
    for tick in ticks
  ]
  for row, (run, of_run) in enumerate(shown.items()):
    middle = _ROW * row + 24
    mean = place(sum(x for *_, x in of_run) / len(of_run))
    parts.append(
      f"<g style='fill:{colours[run]};stroke:{colours[run]}'>"
      f"<path d='M{mean:.1f} {middle - 9}v18' stroke-width=2 />"
    )
    parts += [
      f"<circle cx={place(x):.1f} cy={middle} r=4 fill-opacity=.35>"
      f"<title>{html.escape(name)}: {value:.4g}</title></circle>"
      for name, value, x in of_run
    ]
    parts.append(f"</g><text y={middle - 12}>{html.escape(_short(run))}</text>")
  return _svg(parts, height)


def _histogram(
  images: Mapping[str, Sequence[int]],
  edges: Sequence[float],
  colours: Mapping[str, str],
) -> str:
  """Steps over the bins that any run has images in, as parts of the run."""
  used = [i for bins in images.values() for i, n in enumerate(bins) if n]
  first, last = max(min(used) - 1, 0), min(max(used) + 2, len(edges) - 1)
  top = max(max(bins) / sum(bins) for bins in images.values())
  parts = [f"<path d='M0 {_HEIGHT}H{_WIDTH}' style='stroke:var(--faint)'/>"]
  for run, bins in images.items():
    points = []
    for j in range(first, last):
      y = _HEIGHT - _HEIGHT * bins[j] / sum(bins) / top
      for k in (j, j + 1):
        x = _WIDTH * (k - first) / (last - first)
        points.append(f"{x:.1f},{y:.1f}")
    parts.append(
      f"<polyline points='{' '.join(points)}' fill=none stroke-width=1.5 "
      f"style='stroke:{colours[run]}'/>"
    )
  y = _HEIGHT + 14
  parts += [
    f"<text y={y}>{edges[first]:g}</text>",
    f"<text x={_WIDTH} y={y} text-anchor=end>{edges[last]:g}</text>",
  ]
  return _svg(parts, _HEIGHT)


def _svg(parts: Sequence[str], height: int) -> str:
  """With room for a line of text below."""
  return (
    f"<svg viewBox='-14 -2 {_WIDTH + 28} {height + 20}' width={_WIDTH}>"
    f"{''.join(parts)}</svg>"
  )


def _ticks(low: float, high: float) -> list[float]:
  """Round numbers: the first is not above the least value, the last not below.

  Between values are two to five of their steps.
  """
  span = (high - low) or abs(high) or 1.0
  power = math.floor(math.log10(span))
  steps = (n * 10.0**k for k in (power, power - 1) for n in (5, 2, 1))
  step = next(step for step in steps if span >= 2 * step)
  first = math.floor(low / step)
  last = max(math.ceil(high / step), first + 1)
  return [step * i for i in range(first, last + 1)]


def _short(name: str) -> str:
  return name if len(name) <= 44 else f"{name[:21]}…{name[-22:]}"
