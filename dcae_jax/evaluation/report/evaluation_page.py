"""The page of evaluations: their table, what was measured, and pictures."""

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dcae_jax.evaluation.report import comparison, distributions, page
from dcae_jax.runs import versions

_SIDES = ("left", "right")  # of a slider


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
  images: distributions.Images  # of runs with few of them
  notes: Sequence[tuple[str, str]]  # as of `comparison.notes`
  numbers: Mapping[str, Mapping[str, str]]  # files by run and what they are
  curves: str  # a picture of the losses of training; "": there are none
  sections: Sequence[Section]
  latents: Sequence[tuple[str, str]]  # title and file of pictures
  beside: Sequence[str]  # other files


def html_of(contents: Contents) -> str:
  """The whole page."""
  runs = contents.runs
  table = page.table(comparison.table(runs), comparison.kinds(runs))
  parts = [
    page.Part("Metrics", table + _notes(contents.notes)),
    page.Part("Models", _models(contents)),
  ]
  if contents.curves:
    curves = page.plot(contents.curves, "losses and metrics over steps")
    parts.append(page.Part("Training", curves))
  parts.append(
    page.Part(
      "Distribution over images", distributions.html_of(runs, contents.images)
    )
  )
  parts += [
    page.Part(
      title, f"<div class=figures>{''.join(map(_figure, figures))}</div>"
    )
    for title, figures in contents.sections
  ]
  latents = "".join(
    f"<h3>{html.escape(title)}</h3>{page.sheet(file, title, 'pixels')}"
    for title, file in contents.latents
  )
  parts.append(page.Part("Latent channels", latents + _latent_statistics(runs)))
  results = [result for _, result in runs]
  images = dict.fromkeys(map(comparison.images, results))
  computed_by = versions.in_words(result["versions"] for result in results)
  about = {
    "images": html.escape("; ".join(images)),
    "computed by": html.escape(computed_by),
  }
  if contents.beside:
    links = (page.link(file, file) for file in contents.beside)
    about["numbers"] = ", ".join(links)
  return page.document("Reconstruction by autoencoders", about, parts)


def _notes(notes: Sequence[tuple[str, str]]) -> str:
  lines = (
    f"<li><b>{html.escape(subject)}</b> {html.escape(text)}</li>"
    for subject, text in notes
  )
  return f"<ul class=notes>{''.join(lines)}</ul>" if notes else ""


def _models(contents: Contents) -> str:
  """What each row is of, and its numbers beside the page."""
  lines = {}
  for name, result in contents.runs:
    described = html.escape(comparison.model(result["autoencoder"]))
    files = contents.numbers[name].items()
    links = ", ".join(page.link(what, file) for what, file in files)
    lines[name] = f"{described}<br>{links}"
  return page.facts(lines)


def _figure(figure: Figure) -> str:
  """A column for each version, the original first: whole, crop, error.

  The original lies over another version, and a slider divides them.
  """
  versions_of = [("original", figure.image)]
  versions_of += [(x.run, x.image) for x in figure.versions]

  def choice(chosen: int) -> str:
    options = "".join(
      f"<option value='{html.escape(file)}'"
      f"{' selected' if i == chosen else ''}>{html.escape(name)}</option>"
      for i, (name, file) in enumerate(versions_of)
    )
    return f"<select aria-label='shown {_SIDES[chosen]}'>{options}</select>"

  (left, left_file), (right, right_file) = versions_of[:2]
  columns = [
    (
      f"{choice(0)} {choice(1)}"
      "<input type=range min=0 max=100 value=50 aria-label=divide>",
      f"<div class=slider>{page.picture(right_file, right, 'right')}"
      f"{page.picture(left_file, left, 'left')}</div>",
      page.picture(figure.crop, "original, crop", "pixels"),
    )
  ]
  for run, caption, *files in figure.versions:
    alts = (run, f"{run}, crop", f"{run}, error")
    pictures = map(page.picture, files, alts, ("", "pixels", ""))
    columns.append(
      (f"<b>{html.escape(run)}</b><br>{html.escape(caption)}", *pictures)
    )
  tiles = "".join(
    f"<div><p>{head}</p>{''.join(rows)}</div>" for head, *rows in columns
  )
  return (
    f"<figure style='--columns:{len(columns)}'>"
    f"<figcaption>{html.escape(figure.title)}</figcaption>"
    f"<div class=tiles>{tiles}</div></figure>"
  )


def _latent_statistics(runs: comparison.Runs) -> str:
  """Mean, deviation and RMS of each channel, folded away."""
  parts = []
  for name, result in runs:
    for size, numbers in result["resolutions"].items():
      channels = numbers["latent"]["channels"]
      columns = [channels[key] for key in ("mean", "std", "rms")]
      rows = [["channel", "mean", "std", "RMS"]]
      for i, values in enumerate(zip(*columns, strict=True)):
        rows.append([f"{i}", *(f"{value:.4g}" for value in values)])
      title = f"{name}, {size} px: statistics of each channel"
      parts.append(page.folded(title, page.table(rows)))
  return "".join(parts)
