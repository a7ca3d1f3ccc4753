"""Finished runs and their floor side by side, on a page and for documents.

The page is that of evaluations; for other documents there are a picture, a
table in Markdown and the loss curves.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.autoencoder import autoencoder, block_pca
from dcae_jax.data import decoding
from dcae_jax.evaluation import metrics as metrics_table
from dcae_jax.evaluation.report import (
  evaluation_page,
  evaluation_report,
  figures,
  text_table,
)
from dcae_jax.runs import metrics_writer, plain_text, work_directory
from dcae_jax.setup import (
  evaluations,
  floor,
  keys,
  measuring,
  metric_networks,
  models,
  start,
)

_LOG = logging.getLogger(__name__)
_PICTURE, _CURVES = "reconstructions.png", evaluation_report.CURVES
_TABLES = ("report.md", "report.json")
_WRITTEN = (
  "index.html", *_TABLES, "pictures", evaluation_report.NUMBERS, _PICTURE,
  _CURVES,
)  # fmt: skip


def check(config: ConfigDict, runs_are_pending: bool = False) -> None:
  """Raises ValueError for a config that cannot be run; touches no file."""
  keys.check(config)
  if not config.runs:
    raise errors.UserError(
      "config.runs is empty; name the work directories to report, such as "
      "{'ours': 'runs/f64/phase3'}"
    )
  for text in (*config.runs, *config.runs.values()):
    if not isinstance(text, str):
      raise errors.UserError(
        f"config.runs: {text!r} is no text; write names and paths, such as "
        "{'ours': 'runs/f64/phase3'}"
      )
  measuring.check_reading(config)
  metric_networks.check(config)
  metric_networks.check_reference(config)
  if runs_are_pending:
    return
  for run in config.runs.values():
    work_directory.read_run_config(run)
    variant, channels = models.variant_of(run)
    decoding.check_channels(channels)
    models.check_sides(config.resolutions, variant.spatial_compression)


def run(config: ConfigDict, workdir: epath.Path) -> bool:
  """Writes index.html, report.md, report.json and their pictures.

  Evaluates the averages of each run's last checkpoint, and block PCA with
  latents of the size of the first run's, fitted on what that run was trained
  on.
  """
  check(config)
  start.begin(config, workdir, _WRITTEN)
  inputs = evaluations.open_inputs(config, workdir)
  directories, notes = [], []
  with tempfile.TemporaryDirectory(prefix="dcae_jax_report_") as aside:
    for own, subject in _subjects(config, workdir, notes):
      directories.append(epath.Path(aside) / f"{len(directories)}")
      directories[-1].mkdir()
      evaluations.record(subject, own, inputs, directories[-1])
    if jax.process_index():
      return True
    runs = evaluation_report.read(directories)
    made = epath.Path(aside) / "report"
    contents = evaluation_report.write(made, runs, notes, _TABLES)
    numbers = _numbers(runs)
    picture = _picture(runs, f"{config.resolutions[-1]}")
    metrics_writer.write_png(made / _PICTURE, picture)
    metrics_writer.write_whole(
      made / "report.json", json.dumps(numbers, indent=2)
    )
    table = text_table.of_metrics(numbers)
    metrics_writer.write_whole(
      made / "report.md", _markdown(table, contents, config.resolutions[-1])
    )
    start.write_config(config, made)
    evaluations.publish(made, workdir, _WRITTEN)
  _LOG.info(
    "held-out images:\n\n%s\n\npicture: %s\npage: %s\nreport: %s",
    table, workdir / _PICTURE, workdir / "index.html", workdir / "report.md",
  )  # fmt: skip
  return True


def _subjects(
  config: ConfigDict, workdir: epath.Path, notes: list[tuple[str, str]]
) -> Iterator[tuple[ConfigDict, evaluations.Subject]]:
  """The floor and the runs, each with the config of its evaluation.

  Args:
    config: of the report.
    workdir: of it.
    notes: gets one on the floor, where there is none.
  """

  def own(**changes):
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
      copy.update(changes)
    return copy

  try:
    fitted = _floor(config, workdir)
  except ValueError as error:  # such as images of another machine
    notes.append((floor.NAME, f"is absent: {error}"))
    _LOG.warning("%s is absent: %s", floor.NAME, error)
  else:
    yield own(name=floor.NAME, init_from="", dtype="float32"), fitted
  for name, run in config.runs.items():
    dtype = work_directory.read_run_config(run)["model"]["dtype"]
    # Latents are decoded as they are: the scaling factor does not matter.
    subject = autoencoder.load(run, scaling_factor=1.0, dtype=dtype)
    yield own(name=name, init_from=run, dtype=dtype), subject


def _floor(config: ConfigDict, workdir: epath.Path) -> block_pca.BlockPCA:
  run = next(iter(config.runs.values()))
  variant, _ = models.variant_of(run)
  return floor.fit(
    floor.of_run(run, workdir),
    variant.spatial_compression,
    variant.latent_channels,
    config.resolutions,
    threads=config.threads,
  )


def _picture(runs: Sequence[evaluation_report.Run], size: str) -> np.ndarray:
  """The originals, and a row of reconstructions for each run."""
  indices = list(runs[0].rows(size, "samples"))
  rows = [
    np.stack([run.picture(size, i, suffix) for i in indices])
    for run, suffix in [(runs[0], ""), *((x, "_reconstruction") for x in runs)]
  ]
  return figures.grid(rows, ["original", *(run.name for run in runs)])


def _numbers(
  runs: Sequence[evaluation_report.Run],
) -> dict[str, dict[str, dict[str, float]]]:
  """The metrics that could be computed, by run and resolution."""
  return {
    run.name: {
      size: {
        key: found[key]
        for key in metrics_table.columns()
        if found.get(key) is not None
      }
      | {"latent_rms": found["latent"]["rms"]}
      for size, found in run.result["resolutions"].items()
    }
    for run in runs
  }


def _markdown(
  table: str, contents: evaluation_page.Contents, shown: int
) -> str:
  notes = "".join(
    f"{plain_text.markdown(f'{subject} {text}')}.\n\n"
    for subject, text in contents.notes
  )
  pictures = f"![reconstructions]({_PICTURE})\n"
  if contents.curves:
    pictures += f"\n![loss curves]({contents.curves})\n"
  return (
    "# Reconstruction of held-out photographs\n\n"
    "Averaged weights of each run's last checkpoint; means over images. The "
    "floor is\na linear projection of blocks of pixels with latents of the "
    "same size, fitted on\nthe training images.\n\n"
    f"{table}\n\n{notes}At {shown} px, originals above:\n\n"
    f"{pictures}"
  )
