"""Sources of images, from configs."""

import inspect
import math

from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.data import sources


def weighted_sources(
  config: ConfigDict, min_size: int = 0
) -> list[tuple[sources.Source, float]]:
  """The members of a source config, with their weights.

  Images with a smaller side than `min_size` are left out where that is known
  without reading them. Raises UserError for an unknown kind, or a source that
  does not exist.
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
        pairs += weighted_sources(member, min_size)
    return pairs
  if not 0 < config.weight < math.inf:
    raise errors.UserError(
      f"config.source.weight={config.weight} is not a positive number"
    )
  source = sources.at_least(part_of(whole(config), config), min_size)
  return [(source, config.weight)]


def whole(config: ConfigDict) -> sources.Source:
  """The source of a kind, all of it.

  Raises UserError for an unknown kind, or a source that does not exist.
  """
  if config.kind not in sources.KINDS:
    raise errors.UserError(
      f"unknown config.source.kind={config.kind!r}; known are "
      f"{', '.join(sources.KINDS)}, mixture"
    )
  open_ = sources.KINDS[config.kind]
  needed = [x for x in inspect.signature(open_).parameters if x != "indexed"]
  if missing := [key for key in needed if key not in config]:
    raise errors.UserError(
      f"source kind {config.kind!r} needs {', '.join(missing)}, not among the "
      f"keys of a source: {', '.join(config)}"
    )
  if "captions" not in needed and config.captions:
    raise errors.UserError(
      f"config.source.kind={config.kind!r} has no captions; set "
      "config.source.captions=False"
    )
  values = {key: config[key] for key in needed}
  if "columns" in values:
    values["columns"] = values["columns"].to_dict()
  return open_(**values)


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


def single_source(config: ConfigDict, min_size: int = 0) -> sources.Source:
  """A source that is not a mixture: evaluations have an order."""
  if config.kind == "mixture":
    raise errors.UserError(
      "images are evaluated from one source, not from a mixture"
    )
  return weighted_sources(config, min_size)[0][0]
