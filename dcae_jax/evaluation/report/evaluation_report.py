"""The HTML report of evaluations: reads their work directories, writes a page.

Pictures and numbers are copied: the report can be moved and opened anywhere.
"""

import csv
import io
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dcae_jax import errors
from dcae_jax.evaluation import metrics as metrics_table
from dcae_jax.evaluation.report import (
  comparison,
  distributions,
  evaluation_page,
  figures,
  plots,
)
from dcae_jax.runs import (
  json_types,
  metrics_writer,
  places,
  regular_files,
  work_directory,
)

CURVES, NUMBERS = "loss_curves.png", "numbers"
_OF_TRAINING = {"*": json_types.NUMBER}
_RESULT = {"name": str, "autoencoder": {"init_from": str}, "resolutions": dict}


class Run(NamedTuple):
  """One evaluation: a name that no other one has, its result, its directory."""

  name: str
  slug: str
  result: dict[str, Any]
  directory: epath.Path

  def picture(self, size: str, index: int, suffix: str) -> np.ndarray:
    """Uint8 [h, w, 1 or 3]."""
    folder = self.directory / "pictures" / f"{size}px"
    file = folder / f"{index:07d}{suffix}.png"
    return metrics_writer.read_png(file)

  def rows(self, size: str, group: str) -> dict[int, dict[str, Any]]:
    """Name and metrics of the shown images, by their index."""
    pictures = self.result["resolutions"][size]["pictures"]
    return {row["index"]: row for row in pictures[group]}

  def images(self, size: str) -> list[dict[str, str]]:
    """Name and metrics of all images, as their table has them."""
    data = regular_files.checked(self.directory / f"images_{size}px.csv")
    return list(csv.DictReader(io.StringIO(data.read_text("utf-8"))))


def check(directory: epath.Path) -> None:
  """Raises UserError unless a report can be made of a finished evaluation."""
  with tempfile.TemporaryDirectory(prefix="dcae_jax_report_") as aside:
    try:
      write(epath.Path(aside) / "report", read([directory]))
    except Exception as error:  # whatever may have been damaged there
      reason = " ".join(str(error).split())
      raise errors.UserError(
        f"{directory} is not a whole evaluation ({type(error).__name__}: "
        f"{reason}); run it again"
      ) from error


def write(
  report: epath.Path,
  runs: Sequence[Run],
  notes: Sequence[tuple[str, str]] = (),
  beside: Sequence[str] = (),
) -> evaluation_page.Contents:
  """Writes the report of evaluations into a directory.

  `notes`, as of `comparison.notes`, are on what is not among the runs, `beside`
  files that the caller adds.
  """
  named = [(run.name, run.result) for run in runs]
  for folder in ("pictures", NUMBERS):
    (report / folder).mkdir(parents=True)
  sizes = dict.fromkeys(
    size for run in runs for size in run.result["resolutions"]
  )
  sections, latents = [], []
  for size in sizes:
    with_size = [run for run in runs if size in run.result["resolutions"]]
    sections += _sections(report, size, with_size)
    latents += [_latents(report, size, run) for run in with_size]
  few = {
    (run.name, size): run.images(size)
    for run in runs
    for size, numbers in run.result["resolutions"].items()
    if numbers["images"] < distributions.FEWEST_IN_BINS
  }
  contents = evaluation_page.Contents(
    named,
    few,
    [*notes, *comparison.notes(named)],
    {run.name: _copy_numbers(report, run) for run in runs},
    _write_curves(report, runs),
    sections,
    latents,
    beside,
  )
  metrics_writer.write_whole(
    report / "index.html", evaluation_page.html_of(contents)
  )
  return contents


def _copy_numbers(report: epath.Path, run: Run) -> dict[str, str]:
  """Copies the result and the tables of images; files by what they are."""
  copied = {}
  tables = [f"images_{size}px.csv" for size in run.result["resolutions"]]
  for name in ("result.json", *tables):
    copied[name] = f"{NUMBERS}/{run.slug}_{name}"
    source = regular_files.checked(run.directory / name)
    (report / copied[name]).write_bytes(source.read_bytes())
  return copied


def _write_curves(report: epath.Path, runs: Sequence[Run]) -> str:
  """Panels for each training run among them; "" if there is none."""
  trainings = {}
  for run in runs:
    init_from = run.result["autoencoder"]["init_from"]
    path = places.found(init_from, os.fspath(run.directory))
    directory = epath.Path(path).expanduser()
    file, result = directory / "metrics.jsonl", directory / "result.json"
    if init_from and file.exists():
      ended = {}
      if result.exists():
        ended = work_directory.read_result(result, _OF_TRAINING)
      lines = metrics_writer.read_lines(file)
      trainings[run.name] = plots.Training(lines, ended)
  if not trainings:
    return ""
  measures = {
    key: plots.Measure(column.title, is_log=column.better == "lower")
    for key, column in metrics_table.columns().items()
  }
  curves = plots.training_curves(trainings, measures)
  (report / CURVES).write_bytes(curves)
  return CURVES


def _latents(report: epath.Path, size: str, run: Run) -> tuple[str, str]:
  """Copies the picture of a run's latents; returns its title and file."""
  file = f"pictures/{size}px_{run.slug}_latents.png"
  source = run.directory / "pictures" / f"{size}px" / "latents.png"
  metrics_writer.write_png(report / file, metrics_writer.read_png(source))
  shown = run.result["resolutions"][size]["pictures"]["samples"][0]
  channels = run.result["autoencoder"]["latent_channels"]
  title = f"{run.name}, {size} px: {_short(shown['name'])}"
  if channels > figures.MOST_CHANNELS:
    title += f", the first {figures.MOST_CHANNELS} of {channels} channels"
  return title, file


def _short(name: str) -> str:
  """The end of a path."""
  return "/".join(name.split("/")[-2:])


def read(directories: Sequence[epath.Path]) -> list[Run]:
  """Finished evaluations, with names that tell them apart."""
  runs = []
  for i, directory in enumerate(directories):
    path = directory / "result.json"
    result = work_directory.read_result(path, _RESULT)
    name, taken = result["name"], {run.name for run in runs}
    if name in taken:
      name = f"{name} ({i + 1})"
    slug = f"{i}_{re.sub('[^A-Za-z0-9]+', '-', name).strip('-')[:40]}"
    runs.append(Run(name, slug, result, directory))
  return runs


def _caption(values: Mapping[str, float]) -> str:
  """The metrics of one image."""
  return ", ".join(
    f"{metric.label} {metric.columns[key].text(values[key])}"
    for key, metric in metrics_table.METRICS.items()
    if metric.of_pairs and key in values
  )


def _sections(
  report: epath.Path, size: str, runs: list[Run]
) -> list[evaluation_page.Section]:
  """The samples, together where runs share them; each run's extremes."""
  sections = [
    evaluation_page.Section(
      f"Images at {size} px", _samples(report, size, runs)
    )
  ]
  for group in ("worst", "best"):
    for run in runs:
      rows = run.rows(size, group)
      made = [_figure(report, size, index, [(run, rows)]) for index in rows]
      of = f" of {run.name}" if len(runs) > 1 else ""
      title = f"{group.capitalize()} PSNR{of} at {size} px"
      if made:
        sections.append(evaluation_page.Section(title, made))
  return sections


def _samples(
  report: epath.Path, size: str, runs: list[Run]
) -> list[evaluation_page.Figure]:
  """Runs share a figure where their originals are the same, bit for bit."""
  rows = [run.rows(size, "samples") for run in runs]
  made = []
  for index in dict.fromkeys(index for of_run in rows for index in of_run):
    groups = {}
    for run, of_run in zip(runs, rows, strict=True):
      if index in of_run:
        original = run.picture(size, index, "")
        key = original.shape, original.tobytes()
        groups.setdefault(key, []).append((run, of_run))
    made += [_figure(report, size, index, x) for x in groups.values()]
  return made


def _figure(
  report: epath.Path,
  size: str,
  index: int,
  versions: list[tuple[Run, dict[int, dict[str, Any]]]],
) -> evaluation_page.Figure:
  """Writes the pictures of one image."""
  first, rows = versions[0]
  original = first.picture(size, index, "")
  window = figures.detailed_window(original)
  stem = f"pictures/{size}px_{index:07d}_{first.slug}"

  def save(name: str, pixels: np.ndarray) -> str:
    metrics_writer.write_png(report / name, pixels)
    return name

  made = []
  for run, values in versions:
    pixels = run.picture(size, index, "_reconstruction")
    prefix = f"{stem}_{run.slug}"
    made.append(
      evaluation_page.Version(
        run.name,
        _caption(values[index]),
        save(f"{prefix}.png", pixels),
        save(f"{prefix}_crop.png", pixels[window]),
        save(f"{prefix}_error.png", figures.error_picture(original, pixels)),
      )
    )
  return evaluation_page.Figure(
    _short(rows[index]["name"]),
    save(f"{stem}.png", original),
    save(f"{stem}_crop.png", original[window]),
    made,
  )
