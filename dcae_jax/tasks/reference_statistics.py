"""Mean and covariance of networks' features of images, for FID and its like.

Writes `inception_<side>px.npz` in the layout of pytorch-fid, which evaluations
read as their `config.reference`; with features of some of the images, for
precision and recall of samples.
"""

import logging
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.autoencoder import streaming_moments
from dcae_jax.data import images
from dcae_jax.evaluation import fid
from dcae_jax.evaluation import metrics as metrics_table
from dcae_jax.runs import metrics_writer, progress_lines
from dcae_jax.setup import image_sources, keys, measuring, start
from dcae_jax.training import loop, sharding

_LOG = logging.getLogger(__name__)


def check(config: ConfigDict) -> None:
  """Raises UserError for a config that cannot be run."""
  keys.check(config)
  measuring.check_reading(config)
  known = metrics_table.describing_networks()
  for key in config.networks:
    if key not in known:
      raise errors.UserError(
        f"unknown network {key!r} in config.networks; known are "
        f"{', '.join(known)}"
      )


def run(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm | None = None
) -> bool:
  """Writes an `.npz` for each network and resolution, and `result.json`.

  False if SIGTERM, which the caller listens to, stopped it.
  """
  check(config)
  names = {
    (key, side): f"{key}_{side}px.npz"
    for key in config.networks
    for side in config.resolutions
  }
  start.begin(config, workdir, tuple(names.values()))
  source = image_sources.single_source(config.source, workdir, config.min_size)
  decoding = images.Decoding(
    min_size=config.min_size, max_megapixels=config.max_megapixels
  )
  images.check_not_empty(source, decoding)
  known, weights = metrics_table.describing_networks(), {}
  for key in config.networks:
    is_inception = key == metrics_table.INCEPTION.key
    weights[key] = known[key].load(config.weights if is_inception else "")
  mesh = sharding.create_mesh(**config.mesh)
  for resolution in config.resolutions:
    sharding.check_images(resolution, mesh)
  start.write_config(config, workdir)
  reader = measuring.EvaluationImages(
    source, decoding, mesh, config, config.threads, bytes_per_value=1
  )
  # Evenly spaced: sources are in the order of their classes.
  number = min(config.features, reader.total)
  chosen = np.linspace(0, reader.total - 1, number).astype(int)
  counts = {}
  for (key, side), name in names.items():
    network, parameters = known[key], weights[key].parameters
    described = _described(network, parameters, reader, side, mesh)
    moments, kept = streaming_moments.Moments(network.features), []
    for rows, indices in described:
      if sigterm and sigterm.received:
        return False
      moments.update(rows)
      kept.append(rows[np.isin(indices, chosen)])
    features = np.concatenate(kept)
    covariance = moments.covariance  # refuses fewer than two images
    if moments.count < fid.FEWEST_IMAGES:
      _LOG.warning(
        "%d images, fewer than %d: distances from them order runs at best",
        moments.count, fid.FEWEST_IMAGES,
      )  # fmt: skip
    counts[str(side)] = moments.count
    if jax.process_index() == 0:
      fid.save_statistics(workdir / name, moments.mean, covariance, features)
      _LOG.info("statistics of %d images: %s", moments.count, workdir / name)
  if jax.process_index() == 0:
    result = {
      "images": counts,
      "features": f"of {len(chosen)} images, evenly spaced",
      "crop": images.EVALUATION_CROP,
      "source": keys.resolved(config.source) | {"files": len(source)},
      "weights": {
        key: {"sha256": x.sha256, "is_published": x.is_published}
        for key, x in weights.items()
      },
    }
    metrics_writer.write_json(workdir / "result.json", result)
  return True


def _described(
  network: metrics_table.Network,
  parameters: dict[str, np.ndarray],
  reader: measuring.EvaluationImages,
  resolution: int,
  mesh: Mesh,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Features [n, d] of all images, batch by batch, and their indices [n]."""
  whole = sharding.replicated(mesh)

  def describe(parameters, batch):
    pixels = batch.images.astype("float32")
    features = network.describe(parameters, pixels)["features"]
    return features, batch.mask, batch.indices

  described = jax.jit(describe, out_shardings=whole)
  parameters = jax.device_put(parameters, whole)
  with progress_lines.Progress(reader.total) as progress:
    for batch in reader.batches(resolution):
      rows, mask, indices = jax.device_get(described(parameters, batch))
      yield rows[mask], indices[mask]
      progress.add(int(np.sum(mask)))
  progress.finish()
