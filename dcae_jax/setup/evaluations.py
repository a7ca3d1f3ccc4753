"""One evaluation of an autoencoder: `result.json`, the metrics of each image in
`images_<side>px.csv`, and `pictures/`; reports are made from them.
"""

import contextlib
import csv
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dcae_jax.autoencoder import autoencoder, block_pca, latent_statistics
from dcae_jax.autoencoder.weights import conversion
from dcae_jax.data import images, sources
from dcae_jax.evaluation import fid, reconstruction
from dcae_jax.evaluation import metrics as metrics_table
from dcae_jax.evaluation.report import figures
from dcae_jax.runs import (
  metrics_writer,
  plain_text,
  progress_lines,
  versions,
  work_directory,
)
from dcae_jax.setup import (
  image_sources,
  keys,
  measuring,
  metric_networks,
  start,
)
from dcae_jax.training import sharding

_LOG = logging.getLogger(__name__)
Subject = autoencoder.Autoencoder | block_pca.BlockPCA


class Inputs(NamedTuple):
  """What all rows of a table are measured with, opened."""

  source: sources.Source
  mesh: Mesh
  metrics: metric_networks.Opened
  references: dict[int, dict[str, fid.Statistics]]  # by resolution and network
  reference_files: dict[str, dict[str, str]]  # by resolution, for the result


def open_inputs(config: ConfigDict, workdir: epath.Path) -> Inputs:
  """Opens what an evaluation reads; UserError if it does not fit."""
  mesh = sharding.create_mesh(**config.mesh)
  for resolution in config.resolutions:
    sharding.check_images(resolution, mesh)
  source = image_sources.single_source(config.source, workdir)
  images.check_not_empty(
    source, images.Decoding(max_megapixels=config.max_megapixels)
  )
  metrics = metric_networks.open_all(config.metrics, config.weights.to_dict())
  inception = metrics_table.INCEPTION
  references, files = {}, {}
  for resolution in config.resolutions if config.reference else ():
    path = config.reference.replace("{resolution}", str(resolution))
    statistics = metric_networks.load_reference(
      path, inception, metrics.metrics
    )
    references[resolution] = {inception.key: statistics}
    files[str(resolution)] = {"file": path, "sha256": statistics.sha256}
  return Inputs(source, mesh, metrics, references, files)


def record(
  subject: Subject, config: ConfigDict, inputs: Inputs, directory: epath.Path
) -> None:
  """Measures an autoencoder; the first process writes its evaluation."""
  result = {
    "name": name_of(config),
    "autoencoder": {
      "init_from": config.init_from,
      "variant": subject.variant,
      "parameters": sum(
        x.size for x in jax.tree.leaves(subject.variables["params"])
      ),
      "spatial_compression": subject.spatial_compression,
      "latent_channels": subject.latent_channels,
      "weights_sha256": conversion.fingerprint(subject.variables),
    },
    "resolutions": _measure(subject, config, inputs, directory),
    "crop": images.EVALUATION_CROP,
    "files": len(inputs.source),
    "reference": inputs.reference_files or "the originals",
    "metric_weights": inputs.metrics.used_weights,
    "config": keys.resolved(config),
    "versions": versions.versions(),
  }
  start.write_config(config, directory)
  if jax.process_index() == 0:
    metrics_writer.write_json(directory / "result.json", result)


def _measure(
  subject: Subject, config: ConfigDict, inputs: Inputs, directory: epath.Path
) -> dict[str, Any]:
  """The numbers by resolution; tables and pictures are written."""
  subject.variables = measuring.on_mesh(subject.variables, inputs.mesh)
  decoding = images.Decoding(
    subject.image_channels, max_megapixels=config.max_megapixels
  )
  reader = measuring.EvaluationImages(
    inputs.source, decoding, inputs.mesh, config, config.threads
  )
  measurement = measuring.measurement(
    subject,
    inputs.metrics,
    inputs.mesh,
    samples=config.samples,
    extremes=config.extremes,
  )
  by_resolution = {}
  for resolution in config.resolutions:
    _LOG.info(
      "%s at %d px: %d images", name_of(config), resolution, reader.total
    )
    path = directory / f"images_{resolution}px.csv"
    with (
      progress_lines.Progress(reader.total) as progress,
      _image_table(path, inputs) as add_rows,
    ):

      def on_batch(rows, progress=progress, add_rows=add_rows):
        progress.add(len(rows))
        add_rows(rows)

      result = measurement.measure(
        subject.variables,
        reader.batches(resolution),
        inputs.references.get(resolution),
        on_batch,
      )
    progress.finish()
    numbers = _numbers(result, inputs.metrics.absent, subject.shift_factor)
    numbers["images_skipped"] = reader.total - result.count
    numbers["seconds"] = progress.seconds
    if jax.process_index() == 0:
      folder = directory / "pictures" / f"{resolution}px"
      numbers["pictures"] = _write_pictures(result, folder, inputs.source)
    by_resolution[str(resolution)] = numbers
  return by_resolution


@contextlib.contextmanager
def _image_table(
  path: epath.Path, inputs: Inputs
) -> Iterator[Callable[[list[dict[str, float]]], None]]:
  """A function that adds rows to a CSV file, on the first process."""
  if jax.process_index():
    yield lambda rows: None
    return
  metrics = inputs.metrics.metrics
  columns = [key for key in metrics if metrics[key].of_pairs]
  with path.open("w") as file:
    writer = csv.writer(file)
    writer.writerow(("index", "name", *columns))

    def add(rows):
      for row in rows:
        name = plain_text.escaped(inputs.source.name(row["index"]))
        values = [row[column] for column in columns]
        writer.writerow((row["index"], name, *values))

    yield add


def _numbers(
  result: reconstruction.Result, absent: dict[str, str], shift_factor: float
) -> dict[str, Any]:
  """Of one resolution; a number that could not be computed is null."""
  absent = absent | result.absent
  numbers = {"images": result.count}
  for metric in absent:
    numbers |= dict.fromkeys(metrics_table.METRICS[metric].columns)
  numbers |= {k: v for k, v in result.metrics.items() if k != "latent_rms"}
  metric_networks.warn_of_few(numbers, result.count)
  factor = latent_statistics.scaling_factor(result.latents, shift_factor)
  factors = {"scaling_factor": factor, "shift_factor": shift_factor}
  return numbers | {
    "absent": absent,
    "latent": result.latents | factors,
    "histograms": result.histograms,
  }


def _write_pictures(
  result: reconstruction.Result, folder: epath.Path, source: sources.Source
) -> dict[str, Any]:
  """PNGs of the shown images; returns what they are, in groups."""
  folder.mkdir(parents=True, exist_ok=True)
  groups = {}
  for group in ("samples", "worst", "best"):
    groups[group] = []
    for x in getattr(result, group):
      stem = f"{x.index:07d}"
      metrics_writer.write_png(folder / f"{stem}.png", x.original)
      metrics_writer.write_png(
        folder / f"{stem}_reconstruction.png", x.reconstruction
      )
      row = {"index": x.index, "name": source.name(x.index)}
      groups[group].append(row | x.values)
  latents = figures.latent_channels(result.samples[0].latents)
  metrics_writer.write_png(folder / "latents.png", latents)
  return groups


def publish(
  part: epath.Path, workdir: epath.Path, names: Sequence[str]
) -> None:
  """Moves what was made aside into its place, on the first process.

  First, `names` of an earlier start are removed: a kill leaves the old result,
  the new one, or neither its `result.json` nor its `index.html`.
  """
  if jax.process_index():
    return
  work_directory.begin_anew(workdir, names)
  # Without its config, the directory would be taken for somebody else's.
  ranks = {"config.json": -1, "index.html": 1, "result.json": 2}

  def order(file):
    rank = ranks.get(file.name, 0)
    return rank, -rank * len(file.parts)  # its own config and result: outermost

  files = [file for file in pathlib.Path(part).rglob("*") if file.is_file()]
  for file in sorted(files, key=order):
    target = workdir / file.relative_to(part).as_posix()
    metrics_writer.write_whole(target, file.read_bytes())


def name_of(config: ConfigDict) -> str:
  """Of the row in the table."""
  if config.name:
    return config.name
  if config.variant:
    return f"{config.variant}, initial values"
  parts = pathlib.PurePath(config.init_from).parts
  return "/".join(parts[-2:]) or config.init_from
