"""Latents of several shapes: a store for each, read as one, by shapes in turn.

An export of images at their aspect ratios writes `HEIGHTxWIDTH/`, in pixels,
and a list of these stores beside them.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np

from dcae_jax import errors
from dcae_jax.data import batches
from dcae_jax.latents import layout, reader
from dcae_jax.runs import json_types, resumable_store, storage

FILE = "aspect_ratios.json"
_FORMAT = layout.format_of("latents_of_shapes")
_TYPES = {"format": str, "format_version": int, "stores": [str]}
# What is the same in all stores, if their latents mean the same.
_SAME = (
  "autoencoder", "scaling_factor", "shift_factor", "resolution", "classes",
  "conditions", "views", "crop",
)  # fmt: skip


def write(path: str, names: list[str]) -> None:
  """Says that all stores are there."""
  storage.Storage(path).write_json(FILE, _FORMAT | {"stores": names})


def check_place(path: str, is_one: bool, retries: int) -> None:
  """Raises UserError where a store would be mixed with those of shapes."""
  place = storage.Storage(path, retries=retries)
  of_one = resumable_store.IDENTITY, resumable_store.MANIFEST
  others = (FILE,) if is_one else of_one
  if any(place.read(file) is not None for file in others):
    kind = "several shapes" if is_one else "squares"
    raise errors.UserError(
      f"{path} holds an export of {kind}; use another config.output"
    )


def opened(
  path: str, open_store: Callable[[str, int], reader.Latents], retries: int
) -> "Store":
  """The store in a place, or the stores of several shapes as one.

  `open_store` opens a store, given its path and how many there are.

  Raises UserError if there is no finished one, or some are of others.
  """
  described = storage.Storage(path, retries=retries).read_json(FILE)
  if described is None:
    return open_store(path, 1)
  file = f"{path}/{FILE}"
  json_types.check(file, described, _TYPES, "export the latents again")
  names = described.pop("stores")
  if described != _FORMAT or not names:
    raise errors.UserError(f"{file} is no list of stores by their shapes")
  stores = [open_store(f"{path.rstrip('/')}/{x}", len(names)) for x in names]
  return LatentsOfShapes(path, stores)


class LatentsOfShapes:
  """As `reader.Latents`, but that rows are read in batches of one shape.

  Attributes:
    path: where the stores are.
    stores: of the shapes.
    manifest: what is the same in all of them; counts and shards are of all.
    shape: [h, w, c] of the latent of a square.
    classes: names, by label.
  """

  def __init__(self, path: str | os.PathLike, stores: list[reader.Latents]):
    """Raises UserError if the stores are not of one export."""
    self.path, self.stores = os.fspath(path), stores
    first, *others = (store.manifest for store in stores)
    for other, store in zip(others, stores[1:], strict=True):
      for key in _SAME:
        if other.get(key) != first.get(key):
          raise errors.UserError(
            f"{store.path} and {stores[0].path} are of different exports: "
            f"{key} is {other.get(key)} and {first.get(key)}; export the "
            "latents again"
          )
    if any(x.normalisation != stores[0].normalisation for x in stores):
      raise errors.UserError(
        "config.data.normalisation='channels' is of one store, and the latents "
        f"of each shape in {self.path} have other statistics; use 'factor'"
      )
    side = first["resolution"] // first["autoencoder"]["spatial_compression"]
    self.shape = (side, side, stores[0].shape[-1])
    self.normalisation = stores[0].normalisation
    self.classes = stores[0].classes
    manifests = [store.manifest for store in stores]
    sources = [manifest["source"] for manifest in manifests]
    fingerprints = [source["fingerprint"] for source in sources]
    self.manifest = {key: first[key] for key in _SAME} | {
      "shape": list(self.shape),
      "count": sum(manifest["count"] for manifest in manifests),
      "shards": [shard for x in manifests for shard in x["shards"]],
      "source": {
        "kind": sources[0]["kind"],
        "images": sum(source["images"] for source in sources),
        "fingerprint": hashlib.sha256(repr(fingerprints).encode()).hexdigest(),
      },
    }

  @property
  def shapes(self) -> list[tuple[int, int, int]]:
    """Those of the latents in batches, each of which has one."""
    return [store.shape for store in self.stores]

  @property
  def shards(self) -> int:
    """At most in a store."""
    return max(store.shards for store in self.stores)

  @property
  def shard_bytes(self) -> int:
    """Of a shard of each store: one of each is read in turn."""
    return sum(store.shard_bytes for store in self.stores)

  def batches(self, **options: Any) -> "Batches":
    """With the options of `Batches`."""
    return Batches(self, **options)

  def __len__(self) -> int:
    return sum(len(store) for store in self.stores)

  def check(self) -> None:
    """Raises UserError unless the arrays are those of the manifests."""
    for store in self.stores:
      store.check()

  def condition(self, name: str) -> np.ndarray:
    """Those of all images, a store after the other."""
    return np.concatenate([store.condition(name) for store in self.stores])


Store = reader.Latents | LatentsOfShapes


class Batches(batches.Batches):
  """As `reader.LatentBatches`: each batch is of one shape.

  A shape comes as often as it has rows. The order is the same for any number of
  processes.
  """

  def __init__(
    self,
    latents: LatentsOfShapes,
    *,
    seed: int,
    workers: int = 0,
    threads: int = 4,
    prepare: Mapping[str, reader.Prepare],
    **options: Any,
  ):
    """The arguments are those of `reader.LatentBatches`."""
    members, start = [], 0
    for number, store in enumerate(latents.stores):
      shifted = {
        name: functools.partial(_shifted, of_rows, start)
        for name, of_rows in prepare.items()
      }
      members.append(
        reader.LatentBatches(
          store, seed=seed + number, prepare=shifted, **options
        ).dataset
      )
      start += store.manifest["count"]
    dataset = members[0]
    if len(members) > 1:
      rows = [len(store) for store in latents.stores]
      dataset = grain.MapDataset.mix(members, rows)
    super().__init__(
      dataset,
      workers=workers,
      threads=threads,
      fingerprint=layout.fingerprint(latents.manifest),
    )


def _shifted(
  of_rows: reader.Prepare,
  start: int,
  rows: np.ndarray,
  images: np.ndarray,
  uniforms: np.ndarray,
) -> Any:
  """For the images of a store that begin at `start` among those of all."""
  return of_rows(rows, start + images, uniforms)
