"""From config to the preparation of record shards."""

import dataclasses
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.data import batches, preparation
from dcae_jax.setup import image_sources, keys


def check(config: ConfigDict) -> None:
  """Raises UserError for a config that cannot be run."""
  keys.check(config)
  encoding(config)
  with errors.renamed("config.data.", "config."):
    batches.check_workers(config.workers)


def encoding(config: ConfigDict) -> preparation.Encoding:
  return preparation.Encoding(
    config.encoding,
    config.shorter_side,
    config.quality,
    config.max_megapixels,
  )


def description(encoding: preparation.Encoding) -> dict[str, Any]:
  """What the manifest says of it."""
  if not encoding.kind:
    return {"kind": "the files as they are"}
  return dataclasses.asdict(encoding)


def members(
  config: ConfigDict, workdir: epath.Path
) -> tuple[list[preparation.Member], list[str]]:
  """What is prepared, and the names of all classes, by label."""
  source = config.source
  is_mixture = source.kind == "mixture"
  splits = list(source.members) if is_mixture else [source.split]
  opened = [x for x, _ in image_sources.weighted_sources(source, workdir)]
  lists = [list(x.classes) for x in opened]
  labels = [None] * len(lists)
  classes = lists[0]
  if any(names != classes for names in lists):
    if not all(lists):
      raise errors.UserError(
        "some members of config.source have names of classes, and some have "
        "numbers alone; prepare them apart from each other"
      )
    classes = sorted(set().union(*lists))
    numbers = {name: i for i, name in enumerate(classes)}
    labels = [tuple(map(numbers.get, names)) for names in lists]
  members = map(preparation.Member, opened, splits, labels)
  return list(members), classes
