"""Sources of images, from configs."""

import inspect
import logging
import math
import os
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.data import index, sources
from dcae_jax.data.sources import containers
from dcae_jax.runs import processes, storage

_LOG = logging.getLogger(__name__)


def weighted_sources(
  config: ConfigDict, workdir: epath.Path | None = None, min_size: int = 0
) -> list[tuple[sources.Source, float]]:
  """The members of a source config, with their weights.

  What takes long to find out of a source is kept in `indices` of the work
  directory, and shared there by all processes, which call this together; None:
  each finds it out. Images with a smaller side than `min_size` are left out
  where that is known without reading them. Raises UserError for an unknown
  kind, or a source that does not exist.
  """
  if config.kind == "mixture":
    members = list(config.members.values())
    if not members or any(member.kind == "mixture" for member in members):
      raise errors.UserError(
        "a source of kind 'mixture' needs at least one member, and none that "
        "is a mixture itself"
      )
    if config.part:
      raise errors.UserError(
        f"a source of kind 'mixture' has no part {config.part!r}; its members "
        "have: config.source.members.NAME.part"
      )
    pairs = []
    for name, member in config.members.items():
      key = f"config.source.members.{name}."
      with errors.renamed("config.source.", key):
        pairs += weighted_sources(member, workdir, min_size)
    return pairs
  if not 0 < config.weight < math.inf:
    raise errors.UserError(
      f"config.source.weight={config.weight} is not a positive number"
    )
  source = part_of(whole(config, workdir), config)
  return [(sources.at_least(source, min_size), config.weight)]


def whole(
  config: ConfigDict, workdir: epath.Path | None = None
) -> sources.Source:
  """The source of a kind, all of it, see `weighted_sources`.

  Raises UserError for an unknown kind, or a source that does not exist.
  """
  if config.kind not in sources.KINDS:
    raise errors.UserError(
      f"unknown config.source.kind={config.kind!r}; known are "
      f"{', '.join(sources.KINDS)}, mixture"
    )
  open_ = sources.KINDS[config.kind]
  parameters = dict(inspect.signature(open_).parameters)
  shared = {}
  if parameters.pop("indexed", None):
    shared["indexed"] = indexed_in(workdir)
  if "captions" not in parameters and config.captions:
    raise errors.UserError(
      f"config.source.kind={config.kind!r} has no captions; set "
      "config.source.captions=False"
    )
  values = {key: config[key] for key in parameters if key in config}
  if "columns" in values:
    values["columns"] = values["columns"].to_dict()
  return open_(**values, **_options(config, parameters), **shared)


def _options(
  config: ConfigDict, parameters: dict[str, inspect.Parameter]
) -> dict[str, Any]:
  """What `options` has for parameters that are no keys of a source.

  Raises UserError for one that the kind does not have, or that is missing.
  """
  options = config.options.to_dict()
  own = {key: x for key, x in parameters.items() if key not in config}
  for key in options:
    if key not in own:
      takes = f"it takes {', '.join(own)}" if own else "it takes none"
      raise errors.UserError(
        f"config.source.options has {key!r}, which is none of kind "
        f"{config.kind!r}; {takes}"
      )
  for key, parameter in own.items():
    if key not in options and parameter.default is inspect.Parameter.empty:
      raise errors.UserError(
        f"a source of kind {config.kind!r} needs {key}, which is no key; give "
        f"it as config.source.options=\"{{'{key}': ...}}\""
      )
  return options


def indexed_in(workdir: epath.Path | None) -> containers.Indexed:
  """Makes tables in the first process, and keeps them in a work directory.

  If it fails there, all processes raise. None: each process makes its own.
  """
  if workdir is None:
    return containers.indexed_here
  place = storage.Storage(os.fspath(workdir / "indices"))

  def indexed(name, make):
    path, data, refused = f"{place.path}/{name}.parquet", None, None
    if jax.process_index() == 0:
      try:
        data = place.read(f"{name}.parquet")
        if data is None:
          data = index.to_parquet(make())
          place.write(f"{name}.parquet", data)
        else:
          _LOG.info("%s was made by an earlier start, and is used", path)
      except (errors.UserError, OSError) as error:
        refused = error
    if processes.total(refused is not None):
      raise refused or errors.UserError(f"{path}: see the first process")
    data = data or place.read(f"{name}.parquet")
    if data is None:
      raise errors.UserError(
        f"--workdir={workdir} is not the same place for all processes: one has "
        f"no {path}; use a bucket, or a directory that all of them share"
      )
    return index.from_parquet(data, path)

  return indexed


def part_of(source: sources.Source, config: ConfigDict) -> sources.Source:
  """The part of a source that its config names."""
  if not config.part:
    return source
  parts = ("training", "held_out")
  if config.part not in parts:
    raise errors.UserError(
      f"unknown config.source.part={config.part!r}; known are "
      f"{', '.join(parts)}, and '' for all of it"
    )
  return sources.split(source, config.held_out)[parts.index(config.part)]


def single_source(
  config: ConfigDict, workdir: epath.Path | None = None, min_size: int = 0
) -> sources.Source:
  """A source that is not a mixture: evaluations have an order."""
  if config.kind == "mixture":
    raise errors.UserError(
      "images are evaluated from one source, not from a mixture"
    )
  return weighted_sources(config, workdir, min_size)[0][0]
