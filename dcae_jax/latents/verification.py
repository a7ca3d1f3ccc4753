"""Whether a latent store is whole: its arrays against its manifest."""

from collections.abc import Callable
from typing import Any

import numpy as np

from dcae_jax import errors
from dcae_jax.latents import layout
from dcae_jax.runs import storage


def check_arrays(place: storage.Storage, manifest: dict[str, Any]) -> None:
  """Raises UserError unless arrays and numbers fit.

  Of each shard the first rows are read, which tell shards from each other.
  """
  arrays, problems = _open_arrays(place, manifest)
  problems += _wrong_count(manifest)
  if not problems:
    problems += _exchanged(place, manifest, arrays)
  if not 0 < manifest["scaling_factor"] < np.inf:
    problems.append(f"the scaling factor is {manifest['scaling_factor']}")
  if problems:
    raise errors.UserError(f"{place.path} is damaged: {'; '.join(problems)}")


def _exchanged(
  place: storage.Storage, manifest: dict[str, Any], arrays: dict[str, Any]
) -> list[str]:
  """Shards that do not begin as the manifest says, or cannot be read."""
  beginnings, start = [], 0
  for shard, record in enumerate(manifest["shards"]):
    stop = start + min(record["rows"], layout.CHUNK_ROWS)
    # Written before shards had it, a store is only looked through by `verify`.
    for view, checksum in record.get("first_sha256", {}).items():
      what = f"shard {shard} of {view}"
      rows = arrays[view][start:stop].read()
      beginnings.append((what, checksum, rows))
    start += record["rows"]

  def read(rows):
    with place.errors():
      return rows.result()

  return [
    problem
    for what, checksum, rows in beginnings
    for problem in _compared(what, checksum, read, rows)
  ]


def verify(
  place: storage.Storage,
  manifest: dict[str, Any],
  on_rows: Callable[[int], None] = lambda count: None,
) -> list[str]:
  """Reads all of a finished store; returns what is wrong with it.

  Shapes against the manifest, and the checksum of each shard of each array.
  """
  arrays, problems = _open_arrays(place, manifest)
  strings = {"keys", *_strings(place, manifest)}
  for key, checksum in manifest["metadata_sha256"].items():
    problems += _compared(key, checksum, place.read, key)

  def read_rows(name, rows):
    with place.errors():
      return arrays[name][rows].read().result()

  start = 0
  for shard, record in enumerate(manifest["shards"]):
    stop = start + record["rows"]
    for name, checksum in record["sha256"].items():
      what = f"shard {shard} of {name} (rows {start} to {stop - 1})"
      if name in strings:
        key = f"{name}/c/{shard}"
        problems += _compared(what, checksum, place.read, key)
      elif name in arrays:
        rows = slice(start, stop)
        problems += _compared(what, checksum, read_rows, name, rows)
    on_rows(record["rows"])
    start = stop
  return problems + _wrong_count(manifest)


def _compared(
  what: str, checksum: str, read: Callable[..., Any], *arguments: Any
) -> list[str]:
  """What is wrong with a part of the store, if anything is."""
  try:
    part = read(*arguments)
  except OSError as error:
    return [f"{what} cannot be read: {error}"]
  if part is None:
    return [f"{what} is missing"]
  if layout.sha256(part) != checksum:
    return [f"{what} does not have the checksum of the manifest"]
  return []


def _open_arrays(
  place: storage.Storage, manifest: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
  """Arrays of the shapes that they should have, and what is wrong."""
  arrays, problems = {}, []
  strings = _strings(place, manifest)
  for name in (*manifest["views"], *manifest["conditions"]):
    if name in strings:
      continue
    try:
      array = place.open_array(name)
    except OSError as error:
      problems.append(f"{name} cannot be opened: {error}")
      continue
    is_view = name in manifest["views"]
    of_row = manifest["shape"] if is_view else array.shape[1:]
    expected = (manifest["count"], *of_row)
    if tuple(array.shape) == expected:
      arrays[name] = array
    else:
      problems.append(
        f"{name} has the shape {tuple(array.shape)}, not {expected}"
      )
  return arrays, problems


def _strings(place: storage.Storage, manifest: dict[str, Any]) -> list[str]:
  """The conditions that are strings."""
  conditions = manifest["conditions"]
  return [name for name in conditions if layout.is_of_strings(place, name)]


def _wrong_count(manifest: dict[str, Any]) -> list[str]:
  rows = sum(shard["rows"] for shard in manifest["shards"])
  if rows == manifest["count"]:
    return []
  return [f"the shards have {rows} rows, and the manifest {manifest['count']}"]
