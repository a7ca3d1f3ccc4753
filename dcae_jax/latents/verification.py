"""Whether a latent store is whole: its arrays against its manifest."""

from collections.abc import Callable
from typing import Any

import numpy as np

from dcae_jax import errors
from dcae_jax.latents import layout
from dcae_jax.runs import storage


def check_arrays(place: storage.Storage, manifest: dict[str, Any]) -> None:
  """Raises UserError unless arrays and numbers fit; reads no row."""
  _, problems = _open_arrays(place, manifest)
  problems += _wrong_count(manifest)
  if not 0 < manifest["scaling_factor"] < np.inf:
    problems.append(f"the scaling factor is {manifest['scaling_factor']}")
  if problems:
    raise errors.UserError(f"{place.path} is damaged: {'; '.join(problems)}")


def verify(
  place: storage.Storage,
  manifest: dict[str, Any],
  on_rows: Callable[[int], None] = lambda count: None,
) -> list[str]:
  """Reads all of a finished store; returns what is wrong with it.

  Shapes against the manifest, and the checksum of each shard of each array.
  """
  arrays, problems = _open_arrays(place, manifest)
  for key, checksum in manifest["metadata_sha256"].items():
    problem = _compared(lambda key=key: place.read(key), checksum)
    problems += [f"{key} {problem}"] if problem else []
  start = 0
  for shard, record in enumerate(manifest["shards"]):
    rows = slice(start, start + record["rows"])

    def read(name, shard=shard, rows=rows):
      if name == "keys":
        return place.read(f"keys/c/{shard}")
      with place.errors():
        return arrays[name][rows].read().result()

    for name, checksum in record["sha256"].items():
      if name != "keys" and name not in arrays:
        continue
      problem = _compared(lambda name=name, read=read: read(name), checksum)
      if problem:
        where = f"shard {shard} of {name} (rows {start} to {rows.stop - 1})"
        problems.append(f"{where} {problem}")
    on_rows(record["rows"])
    start = rows.stop
  return problems + _wrong_count(manifest)


def _compared(
  read: Callable[[], np.ndarray | bytes | None], checksum: str
) -> str | None:
  """What is wrong with a part of the store, if anything is."""
  try:
    part = read()
  except OSError as error:
    return f"cannot be read: {error}"
  if part is None:
    return "is missing"
  if layout.sha256(part) != checksum:
    return "does not have the checksum of the manifest"
  return None


def _open_arrays(
  place: storage.Storage, manifest: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
  """Arrays of the shapes that they should have, and what is wrong."""
  arrays, problems = {}, []
  for name in (*manifest["views"], *manifest["conditions"]):
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


def _wrong_count(manifest: dict[str, Any]) -> list[str]:
  rows = sum(shard["rows"] for shard in manifest["shards"])
  if rows == manifest["count"]:
    return []
  return [f"the shards have {rows} rows, and the manifest {manifest['count']}"]
