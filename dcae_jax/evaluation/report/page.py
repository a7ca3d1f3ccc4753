"""The evaluation's report: one static HTML page, beside the pictures it shows.

It opens from disk and asks no network for anything.
"""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dcae_jax.evaluation import metrics as metrics_table
from dcae_jax.evaluation.report import comparison
from dcae_jax.runs import plain_text

_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#57534e")


class Version(NamedTuple):
  """One run's reconstruction of an image; files relative to the page."""

  run: str
  caption: str
  image: str
  crop: str
  error: str


class Figure(NamedTuple):
  """An image and its reconstructions; files relative to the page."""

  title: str
  image: str
  crop: str
  versions: list[Version]


class Section(NamedTuple):
  """Figures under a heading."""

  title: str
  figures: list[Figure]


class Contents(NamedTuple):
  """What the page shows; files relative to it."""

  runs: comparison.Runs
  notes: Sequence[tuple[str, str]]  # as of `comparison.notes`
  curves: str  # a picture of the losses of training; "": there are none
  sections: Sequence[Section]
  latents: Sequence[tuple[str, str]]  # title and file of pictures


def page(contents: Contents) -> str:
  """The whole page."""
  runs = contents.runs
  curves = []
  if contents.curves:
    picture = image(contents.curves, "losses over steps", "curves")
    curves = ["<h2>Losses of training</h2>", picture]
  body = [
    "<h1>Reconstruction by autoencoders</h1>",
    table(comparison.table(runs)),
    _notes(contents.notes),
    *curves,
    "<h2>Distribution over images</h2>",
    _histograms(runs),
    "<h2>Pictures</h2>",
    _LEGEND,
    *(_section(section) for section in contents.sections),
    "<h2>Latent channels</h2>",
    *(
      f"<h3>{html.escape(title)}</h3>" + image(file, "latents", "latents")
      for title, file in contents.latents
    ),
    _latent_statistics(runs),
    "<h2>How it was measured</h2>",
    *(
      f"<details><summary>{html.escape(name)}</summary><pre>"
      f"{html.escape(_description(result))}</pre></details>"
      for name, result in runs
    ),
  ]
  return document("Reconstruction by autoencoders", body, _SCRIPT)


def document(title: str, body: Sequence[str], script: str = "") -> str:
  """A page with parts of HTML, one below the other.

  Control characters, which names of files may hold, become escapes.
  """
  whole = (
    "<!doctype html>\n<html lang=en><meta charset=utf-8>"
    "<meta name=viewport content='width=device-width, initial-scale=1'>"
    f"<title>{html.escape(title)}</title><style>{_STYLE}</style>\n"
    + "\n".join(body)
    + f"\n<script>{script}</script></html>\n"
  )
  return plain_text.escaped(whole, kept="\n\t")


def table(rows: Sequence[Sequence[str]]) -> str:
  """The first row is heads."""
  header, *rows = rows
  head = "".join(f"<th>{html.escape(cell)}" for cell in header)
  body = "".join(
    f"<tr>{''.join(f'<td>{html.escape(cell)}' for cell in row)}</tr>"
    for row in rows
  )
  return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _notes(notes: Sequence[tuple[str, str]]) -> str:
  lines = (
    f"<li><b>{html.escape(subject)}</b> {html.escape(text)}</li>"
    for subject, text in notes
  )
  return f"<ul class=notes>{''.join(lines)}</ul>" if notes else ""


def _section(section: Section) -> str:
  figures = "".join(map(_figure, section.figures))
  return f"<h3>{html.escape(section.title)}</h3>{figures}"


def image(file: str, alt: str, of_class: str) -> str:
  """A picture beside the page."""
  file, alt = (html.escape(text, quote=True) for text in (file, alt))
  return f"<img class={of_class} loading=lazy src='{file}' alt='{alt}'>"


def _figure(figure: Figure) -> str:
  """A slider between two versions; crops and errors beside it."""
  versions = [("original", figure.image)]
  versions += [(version.run, version.image) for version in figure.versions]

  def choice(chosen: int) -> str:
    options = "".join(
      f"<option value='{html.escape(file, quote=True)}'"
      f"{' selected' if i == chosen else ''}>{html.escape(name)}</option>"
      for i, (name, file) in enumerate(versions)
    )
    return f"<select>{options}</select>"

  (left, left_file), (right, right_file) = versions[:2]
  slider = (
    f"<div class=slider>{image(right_file, right, 'right')}"
    f"{image(left_file, left, 'left')}</div>"
    "<input type=range min=0 max=100 value=50 aria-label=divide>"
  )
  crop = image(figure.crop, "original, crop", "pixels")
  tiles = [(f"{choice(0)} {choice(1)}", slider), ("<b>original</b>", crop)]
  for version in figure.versions:
    name, caption = html.escape(version.run), html.escape(version.caption)
    crop = image(version.crop, f"{version.run}, crop", "pixels")
    error = image(version.error, f"{version.run}, error", "pixels")
    tiles.append((f"<b>{name}</b><br>{caption}", crop))
    tiles.append((f"<b>{name}</b><br>error", error))
  tiles = "".join(f"<div><p>{text}</p>{tile}</div>" for text, tile in tiles)
  return (
    f"<figure><figcaption>{html.escape(figure.title)}</figcaption>"
    f"<div class=tiles>{tiles}</div></figure>"
  )


def _histograms(runs: comparison.Runs) -> str:
  """A small chart per resolution and metric, one line per run."""
  charts = []
  sizes = dict.fromkeys(
    size for _, result in runs for size in result["resolutions"]
  )
  for size in sizes:
    for key, metric in metrics_table.METRICS.items():
      lines = [
        (name, result["resolutions"][size]["histograms"][key])
        for name, result in runs
        if key in result["resolutions"].get(size, {}).get("histograms", {})
      ]
      if lines:
        edges = metric.of_pairs.edges.tolist()
        charts.append(_chart(f"{metric.label}, {size} px", lines, edges))
  keys = "".join(
    f"<span style='color:{_COLOURS[i % len(_COLOURS)]}'>■ "
    f"{html.escape(name)}</span> "
    for i, (name, _) in enumerate(runs)
  )
  return f"<p>{keys}</p><div class=charts>{''.join(charts)}</div>"


def _chart(
  title: str, lines: Sequence[tuple[str, list[int]]], edges: list[float]
) -> str:
  """Steps over the bins that any run has images in, as parts of the run."""
  width, height = 320, 120
  used = [i for _, bins in lines for i, n in enumerate(bins) if n]
  first, last = max(min(used) - 1, 0), min(max(used) + 2, len(edges) - 1)
  top = max(max(bins) / sum(bins) for _, bins in lines)
  paths = []
  for i, (_, bins) in enumerate(lines):
    points = []
    for j in range(first, last):
      y = height - height * bins[j] / sum(bins) / top
      for k in (j, j + 1):
        x = width * (k - first) / (last - first)
        points.append(f"{x:.1f},{y:.1f}")
    colour = _COLOURS[i % len(_COLOURS)]
    paths.append(
      f"<polyline points='{' '.join(points)}' fill=none stroke='{colour}' "
      "stroke-width=1.5 />"
    )
  return (
    f"<div><b>{html.escape(title)}</b>"
    f"<svg viewBox='-2 -2 {width + 4} {height + 18}' width={width}>"
    f"<path d='M0 {height}H{width}' stroke='#999'/>{''.join(paths)}"
    f"<text y={height + 14}>{edges[first]:g}</text>"
    f"<text x={width} y={height + 14} text-anchor=end>{edges[last]:g}</text>"
    "</svg></div>"
  )


def _latent_statistics(runs: comparison.Runs) -> str:
  """Mean, deviation and RMS of each channel, folded away."""
  parts = []
  for name, result in runs:
    for size, numbers in result["resolutions"].items():
      channels = numbers["latent"]["channels"]
      columns = (channels[key] for key in ("mean", "std", "rms"))
      rows = "".join(
        f"<tr><td>{i}<td>{mean:.4g}<td>{std:.4g}<td>{rms:.4g}</tr>"
        for i, (mean, std, rms) in enumerate(zip(*columns, strict=True))
      )
      parts.append(
        f"<details><summary>{html.escape(name)}, {size} px: statistics of each "
        "channel</summary><table><tr><th>channel<th>mean<th>std<th>RMS</tr>"
        f"{rows}</table></details>"
      )
  return "".join(parts)


def _description(result: Mapping[str, Any]) -> str:
  """Everything but the numbers and files that the page shows elsewhere."""
  shown = {k: v for k, v in result.items() if k != "resolutions"}
  return json.dumps(shown, indent=2, ensure_ascii=False)


_LEGEND = (
  "<p class=notes>Drag the slider between two versions. Beside them are a "
  "crop, a quarter of each side, and the error, the mean over channels: black "
  "is 0, white 64 of 255 or more.</p>"
)
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1200px;
padding:0 1rem;color:#1c1917}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.2rem}h3{font-size:1rem;margin-top:1.6rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #d6d3d1}
th{vertical-align:bottom}td{white-space:nowrap}
th:first-child,td:first-child{text-align:left}
.notes{color:#57534e;font-size:.9rem;overflow-wrap:anywhere}
figure{margin:0 0 1.6rem}
figcaption{font-weight:600;overflow-wrap:anywhere}
.tiles{display:grid;gap:0 .8rem;
grid-template-columns:repeat(auto-fill,minmax(min(250px,100%),1fr))}
.tiles p{font-size:.8rem;height:2.8em;overflow:hidden;margin:.4rem 0}
.tiles select{max-width:48%}
.tiles img{width:100%;display:block}
.pixels,.latents{image-rendering:pixelated}
.slider{position:relative}
.left{position:absolute;top:0;left:0;clip-path:inset(0 50% 0 0)}
input{width:100%;margin:.3rem 0 0}
.charts{display:flex;flex-wrap:wrap;gap:1.2rem;font-size:.85rem}
.charts div{width:320px}
.latents,.curves{max-width:100%}
svg text{font-size:11px;fill:#57534e}
pre{white-space:pre-wrap;font-size:.8rem;overflow-wrap:anywhere}
"""
_SCRIPT = """
for(const figure of document.querySelectorAll('figure')){
const left=figure.querySelector('.left'),right=figure.querySelector('.right');
const [a,b]=figure.querySelectorAll('select');
figure.querySelector('input').addEventListener('input',e=>{
left.style.clipPath=`inset(0 ${100-e.target.value}% 0 0)`});
a.addEventListener('change',()=>{left.src=a.value});
b.addEventListener('change',()=>{right.src=b.value});}
"""
