"""Measures autoencoders as the paper does, and writes a report.

One work directory is one evaluation: `result.json`, the metrics of each image,
pictures, `report/index.html`. Others are shown beside it: finished evaluations
are read, anything else is measured below `compared/`.
"""

import contextlib
import csv
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dcae_jax.autoencoder import (
  autoencoder,
  block_pca,
  families,
  latent_statistics,
  network,
)
from dcae_jax.autoencoder.weights import conversion
from dcae_jax.data import decoding as image_decoding
from dcae_jax.data import images, sources
from dcae_jax.evaluation import fid, reconstruction
from dcae_jax.evaluation.report import evaluation_report, figures, page
from dcae_jax.nn import precision
from dcae_jax.runs import (
  metrics_writer,
  progress_lines,
  versions,
  work_directory,
)
from dcae_jax.setup import (
  floor,
  image_sources,
  keys,
  measuring,
  metric_networks,
  models,
  start,
)
from dcae_jax.training import sharding

_LOG = logging.getLogger(__name__)
FLOOR = "block_pca"  # in `config.compare`


def check(config: ConfigDict) -> None:
  """Raises ValueError for a config that cannot be run; reads descriptions."""
  others = compared(config)
  if config.init_from and config.variant:
    raise ValueError(
      f"config.init_from={config.init_from} and config.variant="
      f"{config.variant} exclude each other; leave one of them empty"
    )
  if not (config.init_from or config.variant or others):
    raise ValueError(
      "config.init_from is empty; name a run, a folder or file of released "
      "weights, or a hub id, or a config.variant for its initial values"
    )
  measuring.check_reading(config)
  keys.check(config)
  precision.check_dtype(config.dtype)
  metric_networks.check(config)
  metric_networks.check_reference(config)
  if config.init_from:
    _check_model(config.init_from, config)
  if config.variant:
    variant = families.check_variant(config.variant)
    compression = variant.spatial_compression * config.space_to_channel
    models.check_sides(config.resolutions, compression)
  for other in others:
    if other == FLOOR:
      _check_floor(config)
    elif is_evaluation(other):
      evaluation_report.check(epath.Path(other).expanduser())
    else:
      _check_model(other, _config_of_other(config, other))


def _check_model(path: str, config: ConfigDict) -> None:
  variant, channels = models.variant_of(path)
  image_decoding.check_channels(channels)
  compression = variant.spatial_compression * config.space_to_channel
  models.check_sides(config.resolutions, compression)


def _check_floor(config: ConfigDict) -> None:
  if not (config.init_from or config.variant):
    raise ValueError(
      f"config.compare={config.compare} names {FLOOR}, whose latents have the "
      "size of those of config.init_from or config.variant; set one of them"
    )
  block_pca.shape(*_latent_size(config))
  _material(config)


def _latent_size(config: ConfigDict) -> tuple[int, int, int]:
  """Spatial compression, latent channels, image channels."""
  if config.init_from:
    variant, channels = models.variant_of(config.init_from)
  else:
    variant, channels = families.check_variant(config.variant), 3
  p = config.space_to_channel
  return (
    variant.spatial_compression * p,
    variant.latent_channels * p**2,
    channels,
  )


def _material(config: ConfigDict) -> floor.Material:
  """What block PCA is fitted on.

  Raises:
    ValueError: it is not here.
  """
  decoding = images.Decoding(
    _latent_size(config)[2], max_megapixels=config.max_megapixels
  )
  if config.fit_source.kind:
    return floor.Material(
      image_sources.weighted_sources(config.fit_source), decoding
    )
  if not work_directory.is_run(config.init_from):
    return floor.Material(
      [(image_sources.single_source(config.source), 1.0)], decoding
    )
  try:
    return floor.of_run(config.init_from)
  except ValueError as error:
    raise ValueError(
      f"{FLOOR} cannot be fitted on what {config.init_from} was trained on "
      f"({error}); name other images with config.fit_source"
    ) from error


def _name_of_floor(config: ConfigDict) -> str:
  if config.fit_source.kind or work_directory.is_run(config.init_from):
    return floor.NAME
  return f"{floor.NAME} (fitted on these images)"


def _config_of_other(config: ConfigDict, path: str) -> ConfigDict:
  """The evaluation of one that is compared: as it is, by its own name."""
  name = _name_of_floor(config) if path == FLOOR else ""
  own = config.copy_and_resolve_references()
  with own.unlocked():
    own.update({"init_from": path, "variant": "", "name": name, "compare": ""})
    own.space_to_channel = 1
  return own


def compared(config: ConfigDict) -> list[str]:
  """The paths of `config.compare`: "[a,b]", or "a,b"."""
  text = config.compare.strip().removeprefix("[").removesuffix("]")
  paths = [part.strip().strip("'\"") for part in text.split(",")]
  return [path for path in paths if path]


def is_evaluation(path: str) -> bool:
  """True for the work directory of a finished evaluation."""
  if path == FLOOR:
    return False
  directory = epath.Path(path).expanduser()
  if not (directory / "result.json").exists():
    return False
  config = work_directory.read_config(directory / "config.json")
  return config.get("task") == "evaluate_autoencoder"


def run(config: ConfigDict, workdir: epath.Path) -> bool:
  """Evaluates `init_from`, and what it is compared with; writes the report."""
  for other in compared(config):
    if other == FLOOR:
      continue
    path = pathlib.PurePath(os.path.abspath(os.path.expanduser(other)))
    if path.is_relative_to(os.path.abspath(workdir)):
      raise ValueError(
        f"config.compare={other} lies in --workdir={workdir}, which is written "
        "anew; choose another --workdir"
      )
  check(config)
  tables = [f"images_{resolution}px.csv" for resolution in config.resolutions]
  start.begin(config, workdir, ("pictures", "report", "compared", *tables))
  to_measure, directories = _plan(config, workdir)
  if to_measure:
    mesh = sharding.create_mesh(**config.mesh)
    for resolution in config.resolutions:
      sharding.check_images(resolution, mesh)
    source = image_sources.single_source(config.source)
    decoding = images.Decoding(max_megapixels=config.max_megapixels)
    images.check_not_empty(source, decoding)
    metrics = metric_networks.with_references(
      metric_networks.open_all(config.metrics, config.weights.to_dict()), config
    )
  workdir.mkdir(parents=True, exist_ok=True)
  # Made aside: until all is there, an earlier evaluation stays as it is.
  with tempfile.TemporaryDirectory(prefix="dcae_jax_evaluation_") as aside:
    for i, (own, directory) in enumerate(to_measure):
      part = epath.Path(aside) / f"{i}"
      part.mkdir()
      ae = _fit(config) if own.init_from == FLOOR else _load(own)
      _evaluate(ae, own, part, mesh, source, metrics)
      _publish(part, directory, replaced="pictures")
    start.write_config(config, workdir)
    if jax.process_index():
      return True
    part = epath.Path(aside) / "report"
    table = evaluation_report.write(part, directories)
    _publish(part, workdir / "report", replaced="pictures")
    _LOG.info("\n%s\n\nreport: %s", table, workdir / "report" / "index.html")
  return True


def _publish(part: epath.Path, directory: epath.Path, replaced: str) -> None:
  """Moves what was made aside; `result.json` comes last, on process 0."""
  if jax.process_index():
    return
  (directory / "result.json").unlink(missing_ok=True)
  if directory.exists():
    for table in directory.glob("images_*px.csv"):
      table.unlink()
  if (directory / replaced).exists():
    (directory / replaced).rmtree()
  files = [file for file in pathlib.Path(part).rglob("*") if file.is_file()]
  for file in sorted(files, key=lambda file: file.name == "result.json"):
    target = directory / file.relative_to(part).as_posix()
    metrics_writer.write_whole(target, file.read_bytes())


def _plan(
  config: ConfigDict, workdir: epath.Path
) -> tuple[list[tuple[ConfigDict, epath.Path]], list[epath.Path]]:
  """What is to be measured, and where; and all that the report is about."""
  to_measure, directories = [], []
  if config.init_from or config.variant:
    to_measure.append((config, workdir))
    directories.append(workdir)
  for i, other in enumerate(compared(config)):
    if is_evaluation(other):
      directories.append(epath.Path(other).expanduser())
      continue
    directory = workdir / "compared" / f"{i}"
    to_measure.append((_config_of_other(config, other), directory))
    directories.append(directory)
  return to_measure, directories


def _evaluate(
  ae: autoencoder.Autoencoder | block_pca.BlockPCA,
  config: ConfigDict,
  workdir: epath.Path,
  mesh: Mesh,
  source: sources.Source,
  metrics: metric_networks.Opened,
) -> None:
  """One autoencoder: `result.json`, `images_*.csv`, `pictures/`."""
  described = {
    "init_from": config.init_from,
    "variant": ae.variant,
    "parameters": sum(x.size for x in jax.tree.leaves(ae.variables["params"])),
    "spatial_compression": ae.spatial_compression,
    "latent_channels": ae.latent_channels,
    "weights_sha256": conversion.fingerprint(ae.variables),
  }
  variables = ae.variables = measuring.on_mesh(ae.variables, mesh)
  reader = measuring.EvaluationImages(
    source,
    images.Decoding(ae.image_channels, max_megapixels=config.max_megapixels),
    mesh,
    batch_size=config.batch_size,
    max_images=config.max_images,
    threads=config.threads,
  )
  networks = measuring.networks_of(ae, metrics)
  evaluation = measuring.Evaluation(
    networks,
    reader,
    mesh,
    samples=config.samples,
    extremes=config.extremes,
    references=metrics.references,
  )
  name = name_of(config)
  by_resolution = {}
  for resolution in config.resolutions:
    _LOG.info("%s at %d px: %d images", name, resolution, reader.total)
    progress = progress_lines.Progress(reader.total)
    columns = ("psnr", "ssim", *(["lpips"] if networks.lpips else []))
    path = workdir / f"images_{resolution}px.csv"
    with _image_table(path, source, columns) as add_rows:

      def on_batch(rows, progress=progress, add_rows=add_rows):
        progress.add(len(rows))
        add_rows(rows)

      result = evaluation.measure(variables, resolution, on_batch)
    progress.finish()
    found = _numbers(result, metrics, ae.shift_factor)
    found["images_skipped"] = reader.total - result.count
    found["seconds"] = progress.seconds
    if jax.process_index() == 0:
      folder = workdir / "pictures" / f"{resolution}px"
      found["pictures"] = _write_pictures(result, folder, source)
    by_resolution[str(resolution)] = found
  start.write_config(config, workdir)
  if jax.process_index():
    return
  result = {
    "name": name,
    "autoencoder": described,
    "resolutions": by_resolution,
    "crop": images.EVALUATION_CROP,
    "files": len(source),
    "reference": metrics.reference_files or "the originals",
    "metric_weights": {
      metric: {
        "file": found.file,
        "sha256": found.sha256,
        "is_published": found.is_published,
      }
      for metric, found in metrics.found.items()
    },
    "config": keys.resolved(config),
    "versions": versions.versions(),
  }
  metrics_writer.write_whole(
    workdir / "result.json", json.dumps(result, indent=2)
  )


def _fit(config: ConfigDict) -> block_pca.BlockPCA:
  """The floor of what is measured."""
  return floor.fit(
    _material(config),
    *_latent_size(config)[:2],
    config.resolutions,
    threads=config.threads,
  )


def _load(config: ConfigDict) -> autoencoder.Autoencoder:
  """The averages of a run, released weights, or initial values."""
  if config.init_from:
    # Latents are decoded as they are: the scaling factor does not matter.
    return autoencoder.load(
      config.init_from,
      scaling_factor=1.0,
      dtype=config.dtype,
      space_to_channel=config.space_to_channel,
    )
  variant = families.check_variant(config.variant)
  model = families.create(variant)
  initial = jax.jit(lambda key: network.initial_variables(model, 3, key))
  return autoencoder.Autoencoder(
    variant,
    initial(jax.random.key(config.seed)),
    dtype=config.dtype,
    space_to_channel=config.space_to_channel,
  )


@contextlib.contextmanager
def _image_table(
  path: epath.Path, source: sources.Source, columns: tuple[str, ...]
) -> Iterator[Callable[[list[dict[str, float]]], None]]:
  """A function that adds rows to a CSV file, on the first process."""
  if jax.process_index():
    yield lambda rows: None
    return
  with path.open("w") as file:
    writer = csv.writer(file)
    writer.writerow(("index", "name", *columns))

    def add(rows):
      for row in rows:
        name = source.name(row["index"]).encode("utf-8", "backslashreplace")
        values = [row[column] for column in columns]
        writer.writerow((row["index"], name.decode(), *values))

    yield add


def _numbers(
  result: reconstruction.Result,
  metrics: metric_networks.Opened,
  shift_factor: float,
) -> dict[str, Any]:
  """Of one resolution; a metric that could not be computed is null."""
  absent = metrics.absent | result.absent
  found = {"images": result.count} | {name: None for name in absent}
  found |= {k: v for k, v in result.metrics.items() if k != "latent_rms"}
  distances = [name for name in page.DISTANCES if found.get(name) is not None]
  if distances and result.count < fid.FEWEST_IMAGES:
    _LOG.warning(
      "%s of %d images, fewer than %d: the number orders runs at best",
      ", ".join(distances), result.count, fid.FEWEST_IMAGES,
    )  # fmt: skip
  latent = dict(result.latents)
  latent["scaling_factor"] = latent_statistics.scaling_factor(
    latent, shift_factor
  )
  return found | {
    "absent": absent,
    "latent": latent | {"shift_factor": shift_factor},
    "histograms": result.histograms,
  }


def _write_pictures(
  result: reconstruction.Result, folder: epath.Path, source: sources.Source
) -> dict[str, Any]:
  """PNGs of the shown images; returns what they are, in groups."""
  groups = {
    "samples": result.samples, "worst": result.worst, "best": result.best
  }  # fmt: skip
  folder.mkdir(parents=True, exist_ok=True)
  shown = {}
  for group, pictures in groups.items():
    shown[group] = []
    for picture in pictures:
      stem = folder / f"{picture.index:07d}"
      files = [f"{stem}.png", f"{stem}_reconstruction.png"]
      for file, pixels in zip(
        files, (picture.original, picture.reconstruction), strict=True
      ):
        metrics_writer.write_png(epath.Path(file), pixels)
      shown[group].append(
        {"index": picture.index, "name": source.name(picture.index)}
        | picture.values
      )
  latents = figures.latent_channels(result.samples[0].latents)
  metrics_writer.write_png(folder / "latents.png", latents)
  return shown


def name_of(config: ConfigDict) -> str:
  """Of the row in the table."""
  if config.name:
    return config.name
  if config.variant:
    return f"{config.variant}, initial values"
  parts = pathlib.PurePath(config.init_from).parts
  return "/".join(parts[-2:]) or config.init_from
