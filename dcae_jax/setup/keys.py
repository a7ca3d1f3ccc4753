"""What `configs/base.py` says of keys, applied to the config of a task.

Bounds of numbers, defaults of runs made before a key was there, which keys may
change between two starts, and the values for an accelerator.
"""

import copy
import dataclasses
import json
import logging
import os
import types
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from configs import base
from dcae_jax import errors
from dcae_jax.runs import differences, json_types, places, work_directory

_LOG = logging.getLogger(__name__)
_NOTHING = types.MappingProxyType({})
_KINDS = {  # of JSON, by those of defaults
  str: str, bool: bool, int: json_types.NUMBER, float: json_types.NUMBER,
  tuple: list,
}  # fmt: skip
_PATHS = ("init_from", "latents", "path")  # of a run, which others read there


def resolved(config: ConfigDict) -> dict[str, Any]:
  """The config as JSON has it: tuples are lists."""
  return json.loads(config.to_json_best_effort())


def recorded(config: ConfigDict, workdir: epath.Path) -> dict[str, Any]:
  """The same as `config.json` has it, for those who read it elsewhere.

  Paths that are there are absolute. A run that goes on says where that was.
  """

  def named(values):
    return {
      name: named(value) if isinstance(value, dict) else absolute(name, value)
      for name, value in values.items()
    }

  def absolute(name, value):
    is_path = name in _PATHS or (name == "encoder" and "/" in value)
    return places.absolute_if_there(value) if value and is_path else value

  values, task = named(resolved(config)), base.KEYS.get(config.task)
  if task is None or not task.begins_anew:
    place = places.absolute(os.fspath(workdir))
    values[work_directory.WRITTEN_IN] = place
  return values


def check(config: ConfigDict) -> None:
  """Raises UserError for a number that is not within the bounds of its key."""
  config = resolved(config)
  values = differences.flat(config)
  for path, key in _keys(config).items():
    value = values.get(path)
    if key.least is None:
      continue
    if value is None or not value >= key.least:  # also for NaN
      raise errors.UserError(f"config.{path}={value} is below {key.least}")
    if value > key.most:
      raise errors.UserError(f"config.{path}={value} is above {key.most}")


def completed(config: dict[str, Any], run: str) -> ConfigDict:
  """The config of an earlier run, with the defaults of keys added since.

  Raises UserError, which names the run, for values of other types.
  """
  json_types.check(
    f"config.json of {run}", config, _types_of_task(config), "bring it back"
  )
  config = copy.deepcopy(config)
  known = differences.flat(config)
  for path, key in _keys(config).items():
    if path not in known:
      *groups, name = path.split(".")
      group = config
      for part in groups:
        group = group.setdefault(part, {})
      group[name] = key.default
  return ConfigDict(config)


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """What differs from an earlier run's config, and must not."""
  there, keys = differences.flat(before), _keys(now)
  for path, key in keys.items():
    there.setdefault(path, json.loads(json.dumps(key.default)))
  return [
    text
    for path, text in differences.differences(there, now).items()
    if path not in keys or not keys[path].may_change
  ]


def for_device(config: ConfigDict, backend: str) -> ConfigDict:
  """The config with the values that `on_accelerator` has for a GPU or TPU.

  Raises UserError for a key that is not there.
  """
  config = config.copy_and_resolve_references()
  here, there = differences.flat(config.to_dict()), {}
  for path, before, value in config.on_accelerator:
    if path not in here:
      raise errors.UserError(
        f"config.on_accelerator names {path!r}, which is no key"
      )
    if here[path] == before and backend != "cpu":
      there[path] = value
  if there:
    _LOG.info("for this %s: %s", backend, there)
  config.update_from_flattened_dict(there)
  config.on_accelerator = ()
  return config


def _keys(
  config: dict[str, Any], described: Mapping[str, Any] = _NOTHING
) -> dict[str, base.Key]:
  """By path: what is said of the keys of a config, and of those it lacks."""
  task = base.KEYS.get(config.get("task"))  # maybe within another one
  if task is not None:
    described = task.keys().to_dict()
  known = {}
  for name in dict.fromkeys((*described, *config)):
    key, value = described.get(name), config.get(name)
    if name == "members":  # of a source: each is a source, too
      key = dict.fromkeys(value or (), described)
    if isinstance(key, dict) or isinstance(value, dict):
      inner = _keys(value or {}, key or {})
      known |= {f"{name}.{path}": x for path, x in inner.items()}
    else:
      known[name] = key if isinstance(key, base.Key) else base.Key(key)
  if task is not None and task.begins_anew:
    known = {
      path: dataclasses.replace(key, may_change=True)
      for path, key in known.items()
    }
  return known


def _types_of_task(config: dict[str, Any]) -> dict[str, Any]:
  """What the keys of a config must be, as `json_types` has it."""
  if task := base.KEYS.get(config.get("task")):
    return _types(task.keys().to_dict())
  return {
    f"{name}?": _types_of_task(value)
    for name, value in config.items()
    if isinstance(value, dict) and "task" in value
  }


def _types(keys: Mapping[str, Any]) -> dict[str, Any]:
  expected = {}
  for name, key in keys.items():
    default = key.default if isinstance(key, base.Key) else key
    kind = _KINDS.get(type(default), json_types.ANYTHING)
    is_group = isinstance(default, dict)
    expected[f"{name}?"] = _types(default) if is_group else kind
  return expected
