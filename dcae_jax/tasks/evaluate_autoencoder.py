"""Measures autoencoders as the paper does, and writes a report.

One work directory is one evaluation: `result.json`, the metrics of each image,
pictures, `report/index.html`. Others are shown beside it: finished evaluations
are read, anything else is measured below `compared/`.
"""

import contextlib
import csv
import functools
import importlib.metadata
import json
import logging
import pathlib
import platform
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dcae_jax import architecture, autoencoder, weights
from dcae_jax.data import images, sources
from dcae_jax.evaluation import fid, figures, html_report, reconstruction
from dcae_jax.models import dcae, efficientnet, inception, lpips, pretrained
from dcae_jax.tasks import evaluation_report, wiring
from dcae_jax.training import checkpoint, metrics_writer, sharding

_LOG = logging.getLogger(__name__)
_LPIPS_NETWORK = "alexnet"  # of the paper's tables; training uses VGG16

# What finds the weights of each metric, given a path or "".
_LOADERS: dict[str, Callable[[str], pretrained.Pretrained]] = {
  "rfid": inception.load,
  "lpips": functools.partial(lpips.pretrained, _LPIPS_NETWORK),
  "frechet_efficientnet_lite0": efficientnet.load,
}
_FEATURES = {
  "rfid": lambda parameters, x: inception.features(parameters, x)[0],
  "frechet_efficientnet_lite0": efficientnet.features,
}


class _Metrics(NamedTuple):
  """Weights of the metrics' networks, and why others are absent, by name."""

  found: dict[str, pretrained.Pretrained]
  absent: dict[str, str]
  references: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]]


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
  if not config.resolutions:
    raise ValueError("config.resolutions is empty; name at least one")
  for key, least in (
    ("batch_size", 1), ("max_images", 0), ("samples", 1), ("extremes", 0),
    ("threads", 1), ("space_to_channel", 1), ("seed", 0),
  ):  # fmt: skip
    if not config[key] >= least:
      raise ValueError(f"config.{key}={config[key]} is below {least}")
  if not config.max_megapixels > 0:
    raise ValueError(
      f"config.max_megapixels={config.max_megapixels} is not positive"
    )
  dcae.check_dtype(config.dtype)
  for metric in config.metrics:
    if metric not in _LOADERS:
      raise ValueError(
        f"unknown metric {metric!r} in config.metrics; known are "
        f"{', '.join(_LOADERS)}"
      )
  smallest = lpips.SMALLEST_SIDE[_LPIPS_NETWORK]
  if "lpips" in config.metrics and min(config.resolutions) < smallest:
    raise ValueError(
      f"image side {min(config.resolutions)} is below {smallest}, the smallest "
      "that LPIPS can be computed for; leave it out of config.metrics"
    )
  if config.init_from:
    _check_model(wiring.model_of(config.init_from), config)
  if config.variant:
    variant = architecture.check_variant(config.variant)
    compression = variant.spatial_compression * config.space_to_channel
    wiring.check_sides(config.resolutions, compression)
  for other in others:
    if is_evaluation(other):
      evaluation_report.read_result(epath.Path(other).expanduser())
    else:
      _check_model(wiring.model_of(other), config)


def _check_model(model: dict[str, Any], config: ConfigDict) -> None:
  variant = architecture.of_model(model["variant"], model["architecture"])
  compression = variant.spatial_compression * config.space_to_channel
  wiring.check_sides(config.resolutions, compression)


def compared(config: ConfigDict) -> list[str]:
  """The paths of `config.compare`: "[a,b]", or "a,b"."""
  text = config.compare.strip().removeprefix("[").removesuffix("]")
  paths = [part.strip().strip("'\"") for part in text.split(",")]
  return [path for path in paths if path]


def is_evaluation(path: str) -> bool:
  """True for the work directory of a finished evaluation."""
  directory = epath.Path(path).expanduser()
  if not (directory / "result.json").exists():
    return False
  config = checkpoint.read_config(directory / "config.json")
  return config.get("task") == "evaluate_autoencoder"


def run(config: ConfigDict, workdir: epath.Path) -> bool:
  """Evaluates `init_from`, and what it is compared with; writes the report."""
  check(config)
  wiring.check_work_directory(config, workdir)
  wiring.check_nothing_foreign(workdir, ("pictures", "report", "compared"))
  wiring.prepare_jax(config.compilation_cache)
  to_measure, directories = _plan(config, workdir)
  if to_measure:
    mesh = sharding.create_mesh(**config.mesh)
    source = wiring.single_source(config.source)
    decoding = images.Decoding(max_megapixels=config.max_megapixels)
    images.check_not_empty(source, decoding)
    metrics = _open_metrics(config)
  wiring.write_config(config, workdir)
  for own, directory in to_measure:
    wiring.write_config(own, directory)
    _evaluate(own, directory, mesh, source, metrics)
  if jax.process_index() == 0:
    table = evaluation_report.write(workdir, directories)
    _LOG.info("\n%s\n\nreport: %s", table, workdir / "report" / "index.html")
  return True


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
    own = config.copy_and_resolve_references()
    with own.unlocked():
      own.update({"init_from": other, "variant": "", "name": "", "compare": ""})
    directory = workdir / "compared" / f"{i}"
    to_measure.append((own, directory))
    directories.append(directory)
  return to_measure, directories


def _open_metrics(config: ConfigDict) -> _Metrics:
  """Weights and reference statistics; what is absent is named, with the cure.

  Raises:
    ValueError: a file that is not what it should be.
  """
  found, absent, references = {}, {}, {}
  for metric in config.metrics:
    try:
      found[metric] = _LOADERS[metric](config.weights[metric])
    except pretrained.AbsentWeightsError as error:
      absent[metric] = str(error)
      _LOG.warning("%s is absent: %s", metric, error)
  if config.reference and "rfid" not in config.metrics:
    raise ValueError(
      f"config.reference={config.reference} is for rfid, which is not among "
      "config.metrics"
    )
  for resolution in config.resolutions if config.reference else ():
    path = config.reference.replace("{resolution}", str(resolution))
    if path == config.reference and len(config.resolutions) > 1:
      raise ValueError(
        f"config.reference={path} is one file for several resolutions; put "
        "{resolution} into it, or evaluate one resolution"
      )
    statistics = fid.load_statistics(path, inception.FEATURES)
    references[resolution] = {"rfid": statistics}
  return _Metrics(found, absent, references)


def _evaluate(
  config: ConfigDict,
  workdir: epath.Path,
  mesh: Mesh,
  source: sources.Source,
  metrics: _Metrics,
) -> None:
  """One autoencoder: `result.json`, `images_*.csv`, `pictures/`."""
  ae = _load(config)
  described = {
    "init_from": config.init_from,
    "variant": ae.variant,
    "parameters": sum(x.size for x in jax.tree.leaves(ae.variables["params"])),
    "spatial_compression": ae.spatial_compression,
    "latent_channels": ae.latent_channels,
    "weights_sha256": weights.fingerprint(ae.variables),
  }
  placed = sharding.shardings(ae.variables, mesh)
  # From the host: one device's arrays cannot be sent to other processes.
  ae.variables = jax.device_get(ae.variables)
  variables = ae.variables = jax.device_put(ae.variables, placed)
  reader = wiring.EvaluationImages(
    source,
    images.Decoding(ae.image_channels, max_megapixels=config.max_megapixels),
    mesh,
    batch_size=config.batch_size,
    max_images=config.max_images,
    threads=config.threads,
  )
  networks = _networks(ae, metrics)
  evaluation = wiring.Evaluation(
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
    progress = wiring.Progress(reader.total)
    columns = ("psnr", "ssim", *(["lpips"] if networks.lpips else []))
    path = workdir / f"images_{resolution}px.csv"
    with _image_table(path, source, columns) as add_rows:

      def on_batch(rows, progress=progress, add_rows=add_rows):
        progress.add(len(rows))
        add_rows(rows)

      result = evaluation.measure(variables, resolution, on_batch)
    progress.finish()
    found = _numbers(result, metrics)
    found["images_skipped"] = reader.total - result.count
    found["seconds"] = progress.seconds
    if jax.process_index() == 0:
      folder = workdir / "pictures" / f"{resolution}px"
      found["pictures"] = _write_pictures(result, folder, source)
    by_resolution[str(resolution)] = found
  if jax.process_index():
    return
  result = {
    "name": name,
    "autoencoder": described,
    "resolutions": by_resolution,
    "crop": images.EVALUATION_CROP,
    "source": wiring.resolved(config.source) | {"files": len(source)},
    "reference": config.reference or "the originals",
    "dtype": config.dtype,
    "metric_weights": {
      metric: {
        "file": found.file,
        "sha256": found.sha256,
        "is_published": found.is_published,
      }
      for metric, found in metrics.found.items()
    },
    "versions": _versions(),
  }
  metrics_writer.write_whole(
    workdir / "result.json", json.dumps(result, indent=2)
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
  variant = architecture.check_variant(config.variant)
  model = architecture.create(variant)
  side = model.spatial_compression
  variables = jax.jit(model.init)(
    jax.random.key(config.seed), jnp.zeros((1, side, side, 3), jnp.float32)
  )
  return autoencoder.Autoencoder(
    variant,
    {"batch_stats": {}} | variables,
    dtype=config.dtype,
    space_to_channel=config.space_to_channel,
  )


def _networks(
  ae: autoencoder.Autoencoder, metrics: _Metrics
) -> reconstruction.Networks:
  perceptual = None
  if "lpips" in metrics.found:
    perceptual = functools.partial(lpips.distance, network=_LPIPS_NETWORK)
  return reconstruction.Networks(
    functools.partial(ae.apply, method="encode"),
    functools.partial(ae.apply, method="decode"),
    perceptual,
    {name: f for name, f in _FEATURES.items() if name in metrics.found},
    {name: found.parameters for name, found in metrics.found.items()},
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
        values = [row[column] for column in columns]
        writer.writerow((row["index"], source.name(row["index"]), *values))

    yield add


def _numbers(
  result: reconstruction.Result, metrics: _Metrics
) -> dict[str, Any]:
  """Of one resolution; a metric that could not be computed is null."""
  absent = metrics.absent | result.absent
  found = {"images": result.count} | {name: None for name in absent}
  found |= {k: v for k, v in result.metrics.items() if k != "latent_rms"}
  distances = [
    name for name in html_report.DISTANCES if found.get(name) is not None
  ]
  if distances and result.count < fid.FEWEST_IMAGES:
    _LOG.warning(
      "%s of %d images, fewer than %d: the covariance does not have full rank, "
      "so that the number orders runs at best",
      ", ".join(distances), result.count, fid.FEWEST_IMAGES,
    )  # fmt: skip
  return found | {
    "absent": absent,
    "latent": result.latents,
    "histograms": result.histograms,
  }


def _write_pictures(
  result: reconstruction.Result, folder: epath.Path, source: sources.Source
) -> dict[str, Any]:
  """PNGs of the shown images; returns what they are, in groups."""
  groups = {
    "samples": result.samples, "worst": result.worst, "best": result.best
  }  # fmt: skip
  shown = {}
  for group, pictures in groups.items():
    shown[group] = []
    for picture in pictures:
      stem = folder / f"{picture.index:07d}"
      files = [f"{stem}.png", f"{stem}_reconstruction.png"]
      folder.mkdir(parents=True, exist_ok=True)
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


def _versions() -> dict[str, str]:
  names = ("jax", "jaxlib", "flax", "numpy", "pillow")
  found = {name: importlib.metadata.version(name) for name in names}
  device = jax.devices()[0]
  return found | {
    "python": platform.python_version(),
    "devices": f"{jax.device_count()} {device.device_kind}",
  }


def name_of(config: ConfigDict) -> str:
  """Of the row in the table."""
  if config.name:
    return config.name
  if config.variant:
    return f"{config.variant}, initial values"
  return "/".join(pathlib.PurePath(config.init_from).parts[-2:])
