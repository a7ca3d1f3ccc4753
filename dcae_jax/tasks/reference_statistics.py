"""Mean and covariance of Inception features of images, for FID.

Writes `inception_<side>px.npz` in the layout of pytorch-fid, which evaluations
read as their `config.reference`; with features of some of the images, for
precision and recall of samples.
"""

import json
import logging

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dcae_jax.autoencoder import streaming_moments
from dcae_jax.data import images
from dcae_jax.evaluation import fid
from dcae_jax.evaluation.networks import inception
from dcae_jax.runs import metrics_writer, progress_lines
from dcae_jax.setup import image_sources, keys, measuring, start
from dcae_jax.training import sharding

_LOG = logging.getLogger(__name__)


def check(config: ConfigDict) -> None:
  """Raises ValueError for a config that cannot be run."""
  measuring.check_reading(config)
  if config.features < 0:
    raise ValueError(f"config.features={config.features} is below 0")


def run(config: ConfigDict, workdir: epath.Path) -> bool:
  """Writes one `.npz` for each resolution, and `result.json`."""
  check(config)
  files = [f"inception_{side}px.npz" for side in config.resolutions]
  start.begin(config, workdir, tuple(files))
  source = image_sources.single_source(config.source)
  decoding = images.Decoding(max_megapixels=config.max_megapixels)
  images.check_not_empty(source, decoding)
  weights = inception.load(config.weights)
  mesh = sharding.create_mesh(**config.mesh)
  for resolution in config.resolutions:
    sharding.check_images(resolution, mesh)
  start.write_config(config, workdir)
  parameters = jax.device_put(weights.parameters, sharding.replicated(mesh))

  def pooled(parameters, batch):
    pixels = batch.images.astype("float32")
    rows, _ = inception.features(parameters, pixels)
    return rows, batch.mask, batch.indices

  features = jax.jit(pooled, out_shardings=sharding.replicated(mesh))
  reader = measuring.EvaluationImages(
    source,
    decoding,
    mesh,
    batch_size=config.batch_size,
    max_images=config.max_images,
    threads=config.threads,
  )
  # Sources are in the order of their classes: all of them shall be there.
  chosen = np.linspace(
    0, reader.total - 1, min(config.features, reader.total)
  ).astype(int)
  counts = {}
  for resolution in config.resolutions:
    progress = progress_lines.Progress(reader.total)
    moments, kept = streaming_moments.Moments(inception.FEATURES), []
    for batch in reader.batches(resolution):
      rows, mask, indices = jax.device_get(features(parameters, batch))
      kept.append(rows[mask & np.isin(indices, chosen)])
      moments.update(rows[mask])
      progress.add(int(np.sum(mask)))
    progress.finish()
    covariance = moments.covariance  # refuses fewer than two images
    if moments.count < fid.FEWEST_IMAGES:
      _LOG.warning(
        "%d images, fewer than %d: distances from them order runs at best",
        moments.count, fid.FEWEST_IMAGES,
      )  # fmt: skip
    counts[str(resolution)] = moments.count
    file = workdir / f"inception_{resolution}px.npz"
    if jax.process_index() == 0:
      fid.save_statistics(file, moments.mean, covariance, np.concatenate(kept))
      _LOG.info("statistics of %d images: %s", moments.count, file)
  if jax.process_index() == 0:
    result = {
      "images": counts,
      "features": f"of {len(chosen)} images, evenly spaced",
      "crop": images.EVALUATION_CROP,
      "source": keys.resolved(config.source) | {"files": len(source)},
      "weights_sha256": weights.sha256,
      "weights_are_published": weights.is_published,
    }
    metrics_writer.write_whole(
      workdir / "result.json", json.dumps(result, indent=2)
    )
  return True
