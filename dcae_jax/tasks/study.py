"""Runs a study: every arm with every seed, and what they reach side by side.

A cell is an arm with a seed: a run in `cells/ARM/SEED` that other tasks read
like any other. Several processes, on several machines, may run one study: a
cell is computed by the one that holds its lease.
"""

import importlib
import logging
import time
from collections.abc import Iterator

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.evaluation.report import study_report, text_table
from dcae_jax.runs import (
  exclusive,
  lease,
  metrics_writer,
  outcome,
  storage,
  versions,
)
from dcae_jax.setup import start
from dcae_jax.setup import study as study_lib
from dcae_jax.training import loop

_LOG = logging.getLogger(__name__)
_PATIENCE = 5  # seconds between looks at the cells of others
_REPORT = "report"  # the lease of who writes it


def run(config: ConfigDict, workdir: epath.Path) -> bool:
  """Runs, or goes on with, all cells; False if SIGTERM ended it early.

  Writes study.json, study.md, index.html and figures after each cell. A cell
  that fails is named at the end, and tried again at the next start.

  Raises:
    UserError: arms that cannot be, or cells that failed.
  """
  if jax.process_count() > 1:
    raise errors.UserError(
      "a study runs in one process; start it several times, with the same "
      "--workdir, to compute several cells at once"
    )
  cells = study_lib.cells(config, workdir)
  written = ("study.json", "study.md", "index.html")
  figures = (study_report.FIGURE, study_report.CURVES)
  start.begin(config, workdir, written + figures)
  start.write_config(config, workdir)
  sigterm = loop.Sigterm()
  work = _Work(config, cells, workdir)
  for cell, held in work.claimed(sigterm):
    with held:
      finished = work.compute(cell, held, sigterm)
    if not finished:
      _LOG.info("stopped in cell %s; run again to go on", cell.name)
      return False
    work.report(waits=False)
  if sigterm.received:
    return False
  _LOG.info("\n%s\n", work.report())
  outcome.say(
    workdir,
    {
      "runs": "cells",
      "page": "index.html",
      "report": "study.md",
      "numbers": "study.json",
      "figure": study_report.FIGURE,
      "curves": study_report.CURVES,
    },
  )
  if work.failed:
    failures = "; ".join(f"{x}: {why}" for x, why in work.failed.items())
    raise errors.UserError(
      f"{len(work.failed)} of {len(cells)} cells failed ({failures}); the "
      "others are reported; run again to try them again"
    )
  return True


class _Work:
  """The cells, and which of them are done, here or elsewhere."""

  def __init__(
    self, config: ConfigDict, cells: list[study_lib.Cell], workdir: epath.Path
  ):
    self._config, self._workdir = config, workdir
    self._cells = {cell.name: cell for cell in cells}
    self._leases = lease.Leases(storage.Storage(f"{workdir}/leases"))
    self._versions = versions.versions()  # of the code that runs here
    self._seconds: dict[str, float] = {}  # of finished cells
    self.failed: dict[str, str] = {}  # why, by cell

  def claimed(
    self, sigterm: loop.Sigterm
  ) -> Iterator[tuple[study_lib.Cell, lease.Lease]]:
    """The next cell that nobody else computes, until all are finished.

    Waits while others compute what is left: they may die, or something may
    start from what they compute.
    """
    said = ""
    while not sigterm.received and (open_cells := self._open()):
      ready = [
        name
        for name in open_cells
        if self._cells[name].before <= self._seconds.keys()
      ]
      if not ready:
        for name in open_cells:
          self.failed[name] = "what it starts from failed"
        return
      taken = self._take(ready)
      running = [name for name in ready if self._leases.owner(name)]
      progress = self._progress(len(running))
      if taken is not None:
        _LOG.info("%s; now %s", progress, taken[0].name)
        yield taken
      else:
        if running and progress != said:
          _LOG.info("%s; waiting for %s", progress, self._owners(running))
        said = progress
        time.sleep(_PATIENCE)

  def _open(self) -> list[str]:
    """Names of cells that have neither finished nor failed here."""
    names = []
    for name, cell in self._cells.items():
      if name not in self._seconds and name not in self.failed:
        record = cell.record()
        if record is None:
          names.append(name)
        else:
          self._seconds[name] = record["seconds"]
    return names

  def _take(
    self, names: list[str]
  ) -> tuple[study_lib.Cell, lease.Lease] | None:
    for name in names:
      cell = self._cells[name]
      held = self._leases.take(name)
      if held is None:
        continue
      if cell.record() is None:
        return cell, held
      held.release()  # finished since we looked
    return None

  def compute(
    self, cell: study_lib.Cell, held: lease.Lease, sigterm: loop.Sigterm
  ) -> bool:
    """Runs a cell, or what is left of it; False if SIGTERM ended it early."""
    began = time.monotonic()
    task = importlib.import_module(f"dcae_jax.tasks.{cell.config.task}")
    try:
      cell.check_goes_on()
      with exclusive.held(str(cell.workdir)):
        finished = task.run(cell.config, cell.workdir, sigterm)
    except (
      errors.UserError,
      FloatingPointError,
      jax.errors.JaxRuntimeError,  # such as too little memory
    ) as error:
      self.failed[cell.name] = errors.first_line(error)
      _LOG.error("cell %s failed: %s", cell.name, error)
      return True
    finally:
      jax.clear_caches()  # else programs of all cells stay in memory
    if finished and not held.lost:
      cell.finish(seconds=time.monotonic() - began, versions=self._versions)
    return finished

  def report(self, waits: bool = True) -> str:
    """Writes what finished cells have reached; returns the table.

    One process at a time does so; others wait, or leave it to that one.
    """
    held = self._leases.take(_REPORT)
    while held is None:
      if not waits:
        return ""
      time.sleep(_PATIENCE)
      held = self._leases.take(_REPORT)
    with held:
      study = study_lib.report(self._config, list(self._cells.values()))
      files = {
        study_report.FIGURE: study_report.write_figure(study),
        "study.md": study_report.markdown(study),
        "index.html": study_report.write_page(study),
      }
      if study.figure.over_steps:
        files[study_report.CURVES] = study_report.write_curves(study)
      for name, contents in files.items():
        metrics_writer.write_whole(self._workdir / name, contents)
      metrics_writer.write_json(
        self._workdir / "study.json", study_report.summary(study)
      )
    return text_table.markdown(study_report.table(study))

  def _progress(self, running: int) -> str:
    """Cells done, running and left, and the time that these will take."""
    done, total = len(self._seconds), len(self._cells)
    left = total - done - running
    text = f"{done} of {total} cells done, {running} running, {left} left"
    if not done:
      return text
    mean = sum(self._seconds.values()) / done
    minutes = mean * (total - done) / max(running, 1) / 60
    return f"{text}, about {minutes:.0f} min"

  def _owners(self, names: list[str]) -> str:
    return ", ".join(f"{x} ({self._leases.owner(x)})" for x in names)
