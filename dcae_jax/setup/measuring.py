"""Measuring autoencoders on images, for training, reports and evaluations."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.data import batches, images, sources
from dcae_jax.evaluation import reconstruction
from dcae_jax.setup import metric_networks
from dcae_jax.training import hardware, sharding

_LARGEST_SIDE = 2**14  # pixels


def check_reading(config: ConfigDict) -> None:
  """Raises UserError for numbers that no images can be read with."""
  if not config.resolutions:
    raise errors.UserError("config.resolutions is empty; name at least one")
  for side in config.resolutions:
    if type(side) is not int or not 1 <= side <= _LARGEST_SIDE:
      raise errors.UserError(
        f"image side {side!r} in config.resolutions is not a whole number from "
        f"1 to {_LARGEST_SIDE}"
      )


class EvaluationImages:
  """Centre crops of a source in batches over the devices of a mesh."""

  def __init__(
    self,
    source: sources.Source,
    decoding: images.Decoding,
    mesh: Mesh,
    config: ConfigDict,
    threads: int,
    bytes_per_value: int = 3,
  ):
    """Opens nothing yet; UserError if batches surely do not fit the devices.

    Args:
      source: of the images.
      decoding: how they are read.
      mesh: whose devices get them.
      config: with the keys `resolutions`, `batch_size`, which is rounded up to
        what the mesh divides, and `max_images`.
      threads: of the loader.
      bytes_per_value: of images, at least: as they are, and of what a decoder
        makes.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    self.total = sources.limited(source, config.max_images)
    batch_size = -(-min(config.batch_size, self.total) // ways) * ways
    side = max(config.resolutions)
    values = batch_size * side**2 * decoding.channels // mesh.size
    hardware.check_memory(
      {f"{batch_size} images of {side} px": bytes_per_value * values},
      mesh.devices.flat,
      "lower the batch_size or the resolutions of the evaluation",
    )
    self.skipped = images.Skipped()
    self._source, self._decoding, self._mesh = source, decoding, mesh
    self._reading = batches.Reading(
      batch_size // jax.process_count(),
      jax.process_index(),
      jax.process_count(),
      threads=threads,
    )

  def batches(self, resolution: int) -> Iterator[reconstruction.Batch]:
    """All images, in order, as squares of that side."""
    for batch in images.evaluation_batches(
      self._source,
      self._decoding,
      resolution,
      self._reading,
      max_images=self.total,
      skipped=self.skipped,
    ):
      images_of_batch = sharding.put_images(batch.pop("images"), self._mesh)
      rows = sharding.put_rows(batch, self._mesh)
      yield reconstruction.Batch(images_of_batch, rows["mask"], rows["indices"])


def measurement(
  autoencoder: Any,
  opened: metric_networks.Opened,
  mesh: Mesh,
  *,
  samples: int,
  extremes: int = 0,
) -> reconstruction.Measurement:
  """Measures whatever has an `apply` with the methods of autoencoders."""
  networks = reconstruction.Networks(
    functools.partial(autoencoder.apply, method="encode"),
    functools.partial(autoencoder.apply, method="decode"),
    opened.metrics,
    opened.parameters,
  )
  return reconstruction.Measurement(
    networks, sharding.replicated(mesh), samples=samples, extremes=extremes
  )


def on_mesh(variables: Any, mesh: Mesh) -> Any:
  """An autoencoder's variables, sharded over the mesh."""
  # From the host: one device's arrays cannot be sent to other processes.
  placed = sharding.shardings(variables, mesh)
  return jax.device_put(jax.device_get(variables), placed)
