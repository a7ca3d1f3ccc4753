"""Runs side by side and their floor: a picture, a table, the loss curves."""

import json
import logging

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax.autoencoder import autoencoder, block_pca
from dcae_jax.data import decoding, images, sources
from dcae_jax.evaluation import fid, reconstruction
from dcae_jax.evaluation.report import figures, page, text_table
from dcae_jax.runs import metrics_writer, work_directory
from dcae_jax.setup import (
  floor,
  image_sources,
  measuring,
  metric_networks,
  models,
  start,
)
from dcae_jax.training import sharding

_LOG = logging.getLogger(__name__)
_CURVES = (
  "train/loss/l1", "train/loss/lpips", "train/loss/generator",
  "train/loss/discriminator",
)  # fmt: skip

Results = dict[str, dict[int, reconstruction.Result]]


def check(config: ConfigDict, runs_are_pending: bool = False) -> None:
  """Raises ValueError for a config that cannot be run; touches no file."""
  if not config.runs:
    raise ValueError(
      "config.runs is empty; name the work directories to report"
    )
  if not config.resolutions:
    raise ValueError("config.resolutions is empty; name at least one")
  for key in ("batch_size", "samples", "threads"):
    if not config[key] >= 1:
      raise ValueError(f"config.{key}={config[key]} is below 1")
  metric_networks.check(config)
  if runs_are_pending:
    return
  for run in config.runs.values():
    work_directory.read_run_config(run)
    variant, channels = models.variant_of(run)
    decoding.check_channels(channels)
    models.check_sides(config.resolutions, variant.spatial_compression)


def run(config: ConfigDict, workdir: epath.Path) -> bool:
  """Writes report.md, report.json and the two PNGs into `workdir`.

  Evaluates the averages of each run's last checkpoint, and block PCA with
  latents of the size of the first run's, fitted on what that run was trained
  on.
  """
  check(config)
  start.begin(config, workdir)
  source = image_sources.single_source(config.source)
  images.check_not_empty(source, images.Decoding())
  metrics = metric_networks.open_all(config.metrics)
  start.write_config(config, workdir)
  first = next(iter(config.runs.values()))
  absent = dict(metrics.absent)
  results = {}
  try:
    fitted = _floor(config, first)
  except ValueError as error:  # such as images of another machine
    absent[floor.NAME] = str(error)
    _LOG.warning("%s is absent: %s", floor.NAME, error)
  else:
    results[floor.NAME] = _evaluate(config, fitted, source, metrics)
  for name, run in config.runs.items():
    results[name] = _evaluate(config, _load(run), source, metrics)
  if jax.process_index() == 0:
    _write(config, workdir, results, absent)
  return True


def _load(run: str) -> autoencoder.Autoencoder:
  dtype = work_directory.read_run_config(run)["model"]["dtype"]
  # Latents are decoded as they are: the scaling factor does not matter.
  return autoencoder.load(run, scaling_factor=1.0, dtype=dtype)


def _floor(config: ConfigDict, run: str) -> block_pca.BlockPCA:
  variant, _ = models.variant_of(run)
  return floor.fit(
    floor.of_run(run),
    variant.spatial_compression,
    variant.latent_channels,
    config.resolutions,
    threads=config.threads,
  )


def _evaluate(
  config: ConfigDict,
  ae: autoencoder.Autoencoder | block_pca.BlockPCA,
  source: sources.Source,
  metrics: metric_networks.Opened,
) -> dict[int, reconstruction.Result]:
  mesh = sharding.create_mesh(-1, 1, 1)
  reader = measuring.EvaluationImages(
    source,
    images.Decoding(ae.image_channels),
    mesh,
    batch_size=config.batch_size,
    max_images=config.max_images,
    threads=config.threads,
  )
  evaluation = measuring.Evaluation(
    measuring.networks_of(ae, metrics), reader, mesh, samples=config.samples
  )
  variables = measuring.on_mesh(ae.variables, mesh)
  return {
    resolution: evaluation.measure(variables, resolution)
    for resolution in config.resolutions
  }


def _write(
  config: ConfigDict,
  workdir: epath.Path,
  results: Results,
  absent: dict[str, str],
) -> None:
  shown = config.resolutions[-1]
  first = next(iter(results.values()))
  rows = [first[shown].rows[0]]
  rows += [found[shown].rows[1] for found in results.values()]
  picture = figures.grid(rows, ["original", *results])
  metrics_writer.write_png(workdir / "reconstructions.png", picture)
  lines = {
    name: metrics_writer.read_lines(
      epath.Path(run).expanduser() / "metrics.jsonl"
    )
    for name, run in config.runs.items()
  }
  curves = figures.loss_curves(lines, _CURVES)
  (workdir / "loss_curves.png").write_bytes(curves)
  numbers = {
    name: {size: result.metrics for size, result in found.items()}
    for name, found in results.items()
  }
  metrics_writer.write_whole(
    workdir / "report.json", json.dumps(numbers, indent=2)
  )
  table = text_table.of_metrics(numbers)
  for found in first.values():
    absent |= found.absent
  notes = [f"{name} is absent: {why}." for name, why in absent.items()]
  few = first[shown].count
  if few < fid.FEWEST_IMAGES and set(page.DISTANCES) & set(
    first[shown].metrics
  ):
    notes.append(
      f"Fréchet distances of {few} images, fewer than {fid.FEWEST_IMAGES}, "
      "order rows at best."
    )
  metrics_writer.write_whole(
    workdir / "report.md", _markdown(table, notes, shown)
  )
  _LOG.info(
    "held-out images:\n\n%s\n\npicture: %s\nreport: %s",
    table, workdir / "reconstructions.png", workdir / "report.md",
  )  # fmt: skip


def _markdown(table: str, notes: list[str], shown: int) -> str:
  return (
    "# Reconstruction of held-out photographs\n\n"
    "Averaged weights of each run's last checkpoint; means over images. The "
    "floor is\na linear projection of blocks of pixels with latents of the "
    "same size, fitted on\nthe training images.\n\n"
    f"{table}\n\n"
    + "".join(f"{note}\n\n" for note in notes)
    + f"At {shown} px, originals above:\n\n"
    "![reconstructions](reconstructions.png)\n\n"
    "![loss curves](loss_curves.png)\n"
  )
