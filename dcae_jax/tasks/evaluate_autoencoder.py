"""Measures autoencoders as the paper does, and writes a report.

One work directory is one evaluation: `result.json`, the metrics of each image,
pictures, `report/index.html`. Others are shown beside it: finished evaluations
are read, anything else is measured below `compared/`.
"""

import logging
import os
import pathlib
import tempfile

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.autoencoder import autoencoder, block_pca, families, network
from dcae_jax.data import decoding as image_decoding
from dcae_jax.data import images
from dcae_jax.evaluation.report import (
  comparison,
  evaluation_report,
  text_table,
)
from dcae_jax.nn import precision
from dcae_jax.runs import outcome, work_directory
from dcae_jax.setup import (
  evaluations,
  floor,
  image_sources,
  keys,
  measuring,
  metric_networks,
  models,
  start,
)

_LOG = logging.getLogger(__name__)
FLOOR = "block_pca"  # in `config.compare`


def check(config: ConfigDict) -> None:
  """Raises UserError for a config that cannot be run; reads descriptions."""
  keys.check(config)
  if config.init_from and config.variant:
    raise errors.UserError(
      f"config.init_from={config.init_from} and config.variant="
      f"{config.variant} exclude each other; leave one of them empty"
    )
  if not (config.init_from or config.variant or config.compare):
    raise errors.UserError(
      "config.init_from is empty; name a run, a folder or file of released "
      "weights, or a hub id, or a config.variant for its initial values"
    )
  measuring.check_reading(config)
  precision.check_dtype(config.dtype)
  metric_networks.check(config)
  metric_networks.check_reference(config)
  if config.init_from or config.variant:
    _check_model(config)
  for other in config.compare:
    if other == FLOOR:
      _check_floor(config)
    elif is_evaluation(other):
      evaluation_report.check(epath.Path(other).expanduser())
    else:
      _check_model(_config_of_other(config, other))


def _check_model(config: ConfigDict) -> None:
  compression, _, image_channels = _latent_size(config)
  image_decoding.check_channels(image_channels)
  models.check_sides(config.resolutions, compression)


def _check_floor(config: ConfigDict) -> None:
  if not (config.init_from or config.variant):
    raise errors.UserError(
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


def _material(
  config: ConfigDict, workdir: epath.Path | None = None
) -> floor.Material:
  """What block PCA is fitted on; UserError if it is not here."""
  decoding = images.Decoding(
    _latent_size(config)[2], max_megapixels=config.max_megapixels
  )
  if config.fit_source.kind:
    with errors.renamed("config.source", "config.fit_source"):
      weighted = image_sources.weighted_sources(config.fit_source, workdir)
    return floor.Material(weighted, decoding)
  if not work_directory.is_run(config.init_from):
    source = image_sources.single_source(config.source, workdir)
    return floor.Material([(source, 1.0)], decoding)
  try:
    return floor.of_run(config.init_from, workdir)
  except ValueError as error:
    raise errors.UserError(
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
  own.update({"init_from": path, "variant": "", "name": name, "compare": ()})
  own.space_to_channel = 1
  return own


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
  keys.check(config)
  for other in config.compare:
    if other == FLOOR:
      continue
    path = pathlib.PurePath(os.path.realpath(os.path.expanduser(other)))
    if path.is_relative_to(os.path.realpath(workdir)):
      raise errors.UserError(
        f"config.compare={other} lies in --workdir={workdir}, which is written "
        "anew; choose another --workdir"
      )
  check(config)
  tables = [f"images_{resolution}px.csv" for resolution in config.resolutions]
  start.begin(config, workdir, ("pictures", "report", "compared", *tables))
  # Made aside: until all is there, an earlier evaluation stays as it is.
  with tempfile.TemporaryDirectory(prefix="dcae_jax_evaluation_") as aside:
    made = epath.Path(aside)
    to_measure, directories = _plan(config, made)
    inputs = evaluations.open_inputs(config, workdir) if to_measure else None
    workdir.mkdir(parents=True, exist_ok=True)
    for own, part in to_measure:
      part.mkdir(parents=True, exist_ok=True)
      is_floor = own.init_from == FLOOR
      subject = _fit(config, workdir) if is_floor else _load(own)
      evaluations.record(subject, own, inputs, part)
    start.write_config(config, made)
    if jax.process_index():
      return True
    runs = evaluation_report.read(directories)
    page = evaluation_report.write(made / "report", runs)
    evaluations.publish(
      made,
      workdir,
      ("report/index.html", "report", "images_*px.csv", "pictures", "compared"),
    )
  table = text_table.markdown(comparison.table(page.runs))
  _LOG.info("\n%s\n", table)
  files = {"page": "report/index.html", "pictures": "pictures"}
  for side in config.resolutions:
    files[f"images, {side} px"] = f"images_{side}px.csv"
  outcome.say(workdir, files | {"result": "result.json"})
  return True


def _plan(
  config: ConfigDict, made: epath.Path
) -> tuple[list[tuple[ConfigDict, epath.Path]], list[epath.Path]]:
  """What is to be measured, and where; and all that the report is about."""
  to_measure, directories = [], []
  if config.init_from or config.variant:
    to_measure.append((config, made))
    directories.append(made)
  for i, other in enumerate(config.compare):
    if is_evaluation(other):
      directories.append(epath.Path(other).expanduser())
      continue
    directory = made / "compared" / f"{i}"
    to_measure.append((_config_of_other(config, other), directory))
    directories.append(directory)
  return to_measure, directories


def _fit(config: ConfigDict, workdir: epath.Path) -> block_pca.BlockPCA:
  """The floor of what is measured."""
  return floor.fit(
    _material(config, workdir),
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
