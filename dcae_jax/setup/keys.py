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

from dcae_jax import errors
from dcae_jax.runs import (
  config_files,
  differences,
  installed,
  json_types,
  places,
  work_directory,
)

with config_files.importable():
  from configs import base

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
  """Raises UserError for keys that a task does not have, or that are missing.

  And for values of another form than that of their key, numbers that are not
  within its bounds, or paths in buckets without what reads these.
  """
  config = resolved(config)
  _check_names(config, None, "", config)
  values = differences.flat(config)
  for path, value in values.items():
    for text in value if isinstance(value, list) else [value]:
      if isinstance(text, str) and text.startswith("gs://"):
        installed.require("gcsfs", "gcs", f"config.{path}={text}")
  for path, key in _keys(config).items():
    value = values.get(path)
    if not _has_form(value, json.loads(json.dumps(key.form))):
      raise _wrong_form(path, value, key)
    if key.least is None:
      continue
    if value is None or not value >= key.least:  # also for NaN
      raise errors.UserError(f"config.{path}={value} is below {key.least}")
    if value > key.most:
      raise errors.UserError(f"config.{path}={value} is above {key.most}")


def _check_names(
  config: dict[str, Any],
  described: Mapping[str, Any] | None,
  prefix: str,
  whole: dict[str, Any],
) -> None:
  """Of a group of the whole config, which is described; None: by its task."""
  if config.get("task") in base.KEYS:
    described = base.KEYS[config["task"]].keys().to_dict()
  elif described is None:  # stages, each of a task
    is_stage = lambda x: isinstance(x, dict) and "task" in x
    described = {"task": None, "plugins": base.PLUGINS}
    described |= {k: None for k, x in config.items() if is_stage(x)}
  for name in list(config):
    if name not in described:
      del config[name]
      config_files.check_key(f"{prefix}{name}", "", whole)
  if missing := [name for name in described if name not in config]:
    group = f"config.{prefix}".removesuffix(".")
    raise errors.UserError(
      f"{group} lacks {', '.join(missing)}; change single keys of it, such as "
      f"--{group}.{(*config, *missing)[0]}=VALUE"
    )
  for name, value in config.items():
    # Each member of a source is a source, too.
    of_members = name == "members" and isinstance(value, dict)
    for member, x in value.items() if of_members else [("", value)]:
      path = f"{prefix}{name}.{member}".removesuffix(".")
      inner = described if of_members else described[name]
      if inner is not None and isinstance(x, dict) != isinstance(inner, dict):
        raise _wrong_form(path, x, inner)
      if isinstance(x, dict) and inner != {}:
        _check_names(x, inner, f"{path}.", whole)


def _wrong_form(path: str, value: Any, described: Any) -> errors.UserError:
  right = f"write it as {getattr(described, 'form', described)!r} is"
  if isinstance(described, dict):
    right = f"it is a group of {', '.join(described)}"
  return errors.UserError(
    f"config.{path}={value!r} is of the wrong form; {right}"
  )


def _has_form(value: Any, form: Any) -> bool:
  """Whether a value is like another one, as JSON has them."""
  if isinstance(form, list):
    is_list = isinstance(value, list)
    return is_list and all(_has_form(x, y) for x in value for y in form[:1])
  if type(form) is float:
    return type(value) in (int, float)
  return form is None or type(value) is type(form)


def completed(config: dict[str, Any], run: str) -> ConfigDict:
  """The config of an earlier run, with the defaults of keys added since.

  Raises UserError, which names the run, for values of other types.
  """
  json_types.check(
    f"config.json of {run}", config, _types_of_task(config), "bring it back"
  )
  config = copy.deepcopy(config)
  _add_groups(config, {})
  known = differences.flat(config)
  for path, key in _keys(config).items():
    if path not in known:
      *groups, name = path.split(".")
      group = config
      for part in groups:
        group = group.setdefault(part, {})
      group[name] = key.default
  return ConfigDict(config)


def _add_groups(config: dict[str, Any], described: dict[str, Any]) -> None:
  """Those that the config of a run from before there were them has not."""
  if task := base.KEYS.get(config.get("task")):
    described = task.keys().to_dict()
  for name, key in described.items():
    if isinstance(key, dict):
      config.setdefault(name, {})
  for name, value in config.items():
    if isinstance(value, dict):
      inner = described.get(name, {})
      if name == "members":  # of a source: each is a source, too
        inner = dict.fromkeys(value, described)
      _add_groups(value, inner)


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """What differs from an earlier run's config, and must not."""
  keys = _keys(now)
  there, here = differences.flat(before), differences.flat(now)
  for path, key in keys.items():
    there.setdefault(path, json.loads(json.dumps(key.default)))
  return [
    text
    for path, text in differences.differences(there, now).items()
    if path not in keys or not _may_differ(keys[path], there[path], here[path])
  ]


def _may_differ(key: base.Key, before: Any, now: Any) -> bool:
  return key.may_change or (key.is_decided and key.default in (before, now))


def change(group: ConfigDict, changes: Any, name: str) -> None:
  """Changes keys of a config; an empty group of it may get any.

  Raises UserError, which has the name of the changes, for a key that is not
  there, or a value of another kind.
  """
  if not isinstance(changes, ConfigDict):
    raise errors.UserError(f"{name}={changes!r} is no group of keys")
  is_free = not group
  with group.unlocked():
    for key, value in changes.items():
      if key not in group and not is_free:
        advice = errors.meant(key, group)
        raise errors.UserError(f"{name}.{key} is no key of the run; {advice}")
      if key in group and isinstance(group[key], ConfigDict):
        change(group[key], value, f"{name}.{key}")
        continue
      try:
        group[key] = value
      except TypeError as error:
        raise errors.UserError(f"{name}.{key}: {error}") from error


def for_device(config: ConfigDict, backend: str) -> ConfigDict:
  """The config with the values that `on_accelerator` has for a GPU or TPU.

  Raises UserError for a key that is not there.
  """
  config = config.copy_and_resolve_references()
  here, there = differences.flat(config.to_dict()), {}
  for triple in config.on_accelerator:
    if not isinstance(triple, tuple | list) or len(triple) != 3:
      raise errors.UserError(
        f"config.on_accelerator={config.on_accelerator} is not a tuple of "
        "triples such as ('batch_size', 8, 32): key, value, value there"
      )
    path, before, value = triple
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
  elif "task" in config:
    described = {"plugins": base.PLUGINS}
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
