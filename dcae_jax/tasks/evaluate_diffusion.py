"""Draws samples from a diffusion model, decodes them and measures them.

As in the paper's table 3: Frechet distance, Inception Score, precision and
recall of samples, at one or several guidance scales. What is written is not
drawn again, however often the task is killed and started.
"""

import json
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import autoencoder, diffusion, samplers, weights
from dcae_jax.data import differences, latents
from dcae_jax.evaluation import fid, figures, sample_metrics
from dcae_jax.models import dcae, inception, pretrained
from dcae_jax.tasks import denoising, latent_decoding, sample_drawing, wiring
from dcae_jax.training import checkpoint, loop, metrics_writer

_LOG = logging.getLogger(__name__)
_METRICS = ("gfid", "inception_score", "precision_recall")
_WITH_REFERENCE = ("gfid", "precision_recall")
_NEIGHBOURS = 3  # of precision and recall
_SPLITS = 10  # of the Inception Score
# Samples that each metric needs.
_LEAST = {
  "gfid": 2, "inception_score": _SPLITS, "precision_recall": _NEIGHBOURS + 1
}  # fmt: skip
_PICTURE_SIDE = 128  # pixels of an image in the picture, at most
_IDENTITY = "parts/identity.json"


class _Model(NamedTuple):
  """What a training run left, and how it is sampled."""

  description: dict[str, Any]  # of its latents
  denoiser: denoising.Denoiser
  objective: diffusion.Objective
  sampler: samplers.Sampler
  sampling: ConfigDict  # what the sampler is made from


def check(config: ConfigDict) -> None:
  """Raises ValueError for numbers that no samples can be drawn with."""
  for key, least in (
    ("samples", 1), ("batch_size", 1), ("seed", 0), ("picture.classes", 0),
    ("picture.columns", 1),
  ):  # fmt: skip
    value = config
    for part in key.split("."):
      value = value[part]
    if not least <= value < 2**31:
      raise ValueError(f"config.{key}={value} is not from {least} to 2**31 - 1")
  ways = jax.local_device_count()
  if config.batch_size % ways:
    raise ValueError(
      f"config.batch_size={config.batch_size} is not divisible by {ways}, the "
      "devices of this process; use a multiple"
    )
  if config.images not in sample_drawing.IMAGES:
    known = ", ".join(map(repr, sample_drawing.IMAGES))
    raise ValueError(f"config.images={config.images!r} is not among {known}")
  names = [sample_drawing.scale_name(scale) for scale in config.guidance]
  if not names or len(set(names)) < len(names):
    raise ValueError(
      f"config.guidance={config.guidance} is empty, or names a scale twice "
      "(six digits count)"
    )
  for metric in config.metrics:
    if metric not in _METRICS:
      raise ValueError(
        f"unknown metric {metric!r} in config.metrics; known are "
        f"{', '.join(_METRICS)}"
      )
    if metric in _WITH_REFERENCE and not config.reference:
      raise ValueError(
        f"config.reference is empty, and {metric} compares with it; make one "
        "with configs/reference_statistics.py, or choose other config.metrics"
      )
    if config.samples < _LEAST[metric]:
      raise ValueError(
        f"config.samples={config.samples} is below {_LEAST[metric]}, the least "
        f"for {metric}; draw more, or choose other config.metrics"
      )
  for scale in config.guidance:
    diffusion.check_guidance(scale, None)
  dcae.check_dtype(config.compute_dtype)


def run(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm | None = None
) -> bool:
  """Writes samples and `result.json`; False if SIGTERM stopped it."""
  sigterm = sigterm or loop.Sigterm(each_alone=True)
  check(config)
  model = _open_model(config)
  wiring.check_work_directory(config, workdir)
  wiring.check_nothing_foreign(workdir, ("parts", "images"))
  wiring.prepare_jax(config.compilation_cache)
  store = _open_store(config, model)
  network, reference = _open_metrics(config)
  ae = latent_decoding.load_autoencoder(
    model.description,
    config.autoencoder,
    "name it with config.autoencoder",
    config.compute_dtype,
  )
  step, variables = denoising.averages(config.init_from, model.denoiser)
  identity = {
    "weights_sha256": weights.fingerprint(variables),
    "decoder_sha256": weights.fingerprint(ae.variables),
    "compute_dtype": config.compute_dtype,
    "inception_sha256": network.sha256 if network else None,
    "sampler": str(model.sampler),
    "steps": model.sampling.steps,
    "interval": list(model.sampling.interval),
    "seed": config.seed,
    "classes": list(config.classes),
    "batch_size": config.batch_size,
    "images": config.images,
  }
  _check_identity(workdir, identity)
  _, by_row = sample_drawing.shardings()
  drawing = sample_drawing.Drawing(
    {
      scale: denoising.sample_function(
        model.denoiser, model.objective, model.sampler, model.sampling, scale,
        by_row,
      )
      for scale in config.guidance
    },
    variables,
    ae,
    model.description,
    network.parameters if network else None,
    batch_size=config.batch_size,
    num_classes=model.denoiser.num_classes,
    classes=tuple(config.classes),
    seed=config.seed,
  )  # fmt: skip
  wiring.wait_for_all("samples_checked")  # before anything is written
  wiring.write_config(config, workdir)
  if jax.process_index() == 0:
    metrics_writer.write_whole(
      workdir / _IDENTITY, json.dumps(identity, indent=2)
    )
  if not _draw_missing(config, workdir, drawing, sigterm):
    return False
  if jax.process_index() == 0:
    if config.picture.classes:
      picture = _picture(config, drawing, model.description, store, ae)
      metrics_writer.write_png(workdir / "samples.png", picture)
    measured = {
      f"{scale:g}": _measure(config, workdir, scale, reference)
      for scale in config.guidance
    }
    if config.metrics:
      metrics_writer.write_whole(workdir / "guidance.png", _plot(measured))
    result = {
      "init_from": config.init_from,
      "step": step,
      "samples": config.samples,
      "guidance": measured,
      "objective": str(model.objective),
      **identity,
      "reference": {
        "file": config.reference,
        "sha256": reference.sha256 if reference else None,
      },
      "inception_is_published": network.is_published if network else None,
      "versions": wiring.versions(),
    }
    metrics_writer.write_whole(
      workdir / "result.json", json.dumps(result, indent=2)
    )
    _LOG.info("%s\nin %s", _table(measured), workdir)
  wiring.wait_for_all("samples_measured")
  return True


def _open_model(config: ConfigDict) -> _Model:
  """Reads descriptions alone."""
  trained = ConfigDict(
    checkpoint.read_run_config(config.init_from, "train_diffusion")
  )
  description = latent_decoding.read_description(config.init_from)
  sampling = config.sampler if config.sampler.kind else trained.sampler
  objective = denoising.objective(trained.objective)
  sampler = denoising.sampler(sampling, objective, config.guidance)
  denoiser = denoising.model(trained.model, objective, remat=False)
  for label in config.classes:
    if type(label) is not int or not 0 <= label < denoiser.num_classes:
      raise ValueError(
        f"class {label!r} in config.classes is not from 0 to "
        f"{denoiser.num_classes - 1}, the classes of {config.init_from}"
      )
  return _Model(description, denoiser, objective, sampler, sampling)


def _open_store(config: ConfigDict, model: _Model) -> latents.Latents | None:
  if not (config.picture.classes and config.picture.latents):
    return None
  store = latents.Latents(config.picture.latents)
  if list(store.shape) != model.description["shape"]:
    raise ValueError(
      f"config.picture.latents={store.path} has latents {list(store.shape)}, "
      f"and the model {model.description['shape']}; name the store that was "
      "trained on"
    )
  return store


def _open_metrics(
  config: ConfigDict,
) -> tuple[pretrained.Pretrained | None, fid.Statistics | None]:
  """The FID Inception and the reference, where they are needed.

  Raises:
    ValueError: one of them is not there, or not what it should be: samples are
      dear, and not drawn where they could not be measured.
  """
  if not config.metrics:
    return None, None
  network, reference = inception.load(config.weights), None
  if config.reference:
    reference = fid.load_statistics(config.reference, inception.FEATURES)
  if "precision_recall" in config.metrics:
    kept = 0 if reference.features is None else len(reference.features)
    if kept <= _NEIGHBOURS:
      raise ValueError(
        f"config.reference={config.reference} has features of {kept} single "
        f"images, and precision and recall need more than {_NEIGHBOURS}; make "
        "one with configs/reference_statistics.py, or leave precision_recall "
        "out of config.metrics"
      )
  return network, reference


def _check_identity(workdir: epath.Path, identity: dict[str, Any]) -> None:
  """Raises ValueError where a work directory holds other samples."""
  path = workdir / _IDENTITY
  if not path.exists():
    return
  found = differences.differences(json.loads(path.read_bytes()), identity)
  if found:
    raise ValueError(
      f"--workdir={workdir} holds samples that were drawn otherwise "
      f"({'; '.join(found.values())}); choose another directory"
    )


def _parts(config: ConfigDict, scale: float) -> list[sample_drawing.Part]:
  return sample_drawing.parts(scale, config.samples, config.batch_size)


def _draw_missing(
  config: ConfigDict,
  workdir: epath.Path,
  drawing: sample_drawing.Drawing,
  sigterm: loop.Sigterm,
) -> bool:
  """Draws and writes what is not there; False if it was stopped."""
  wanted = [part for scale in config.guidance for part in _parts(config, scale)]
  missing = [part for part in wanted if not part.record(workdir).exists()]
  wiring.wait_for_all("samples_plan")  # nobody writes before all have looked
  own = missing[jax.process_index() :: jax.process_count()]
  _LOG.info(
    "%d of %d parts of %d samples are missing, %d of them for this process",
    len(missing), len(wanted), config.batch_size, len(own),
  )  # fmt: skip
  sample_drawing.fill(
    drawing, own, workdir, config.images, lambda: sigterm.received
  )
  if sigterm.received:
    _LOG.info("SIGTERM: stopped; run again to go on")
    if jax.process_count() > 1:
      wiring.leave(0)
    return False
  wiring.wait_for_all("samples_drawn")
  return True


def _measure(
  config: ConfigDict,
  workdir: epath.Path,
  scale: float,
  reference: fid.Statistics | None,
) -> dict[str, float]:
  """The metrics of one scale."""
  moments = fid.Moments(inception.FEATURES)
  score = sample_metrics.InceptionScore(inception.CLASSES, _SPLITS)
  features, squares = [], 0.0
  for record in sample_drawing.read_records(workdir, _parts(config, scale)):
    squares += float(np.sum(np.square(record["latent_rms"], dtype=np.float64)))
    if "gfid" in config.metrics:
      moments.update(record["features"])
    if "inception_score" in config.metrics:
      score.update(record["logits"])
    if "precision_recall" in config.metrics:
      features.append(record["features"])
  found = {"latent_rms": (squares / config.samples) ** 0.5}
  if "gfid" in config.metrics:
    if config.samples < fid.FEWEST_IMAGES:
      _LOG.warning(
        "gFID of %d samples, fewer than %d: the number orders runs at best",
        config.samples, fid.FEWEST_IMAGES,
      )  # fmt: skip
    found["gfid"] = fid.frechet_distance(
      moments.mean, moments.covariance, reference.mean, reference.covariance
    )
  if "inception_score" in config.metrics:
    mean, deviation = score.compute()
    found |= {"inception_score": mean, "inception_score_deviation": deviation}
  if "precision_recall" in config.metrics:
    precision, recall = sample_metrics.precision_recall(
      reference.features, np.concatenate(features), _NEIGHBOURS
    )
    found |= {"precision": precision, "recall": recall}
  return found


def _plot(measured: dict[str, dict[str, float]]) -> bytes:
  """Each metric over the guidance scale."""
  points = sorted((float(scale), found) for scale, found in measured.items())
  titles = {
    "gFID": ("gfid",),
    "Inception Score": ("inception_score",),
    "precision and recall": ("precision", "recall"),
  }
  panels = {
    title: {
      name: [(scale, found[name]) for scale, found in points]
      for name in names
      if name in points[0][1]
    }
    for title, names in titles.items()
  }
  panels = {title: lines for title, lines in panels.items() if lines}
  return figures.curves(panels, "guidance scale", marker="o")


def _table(measured: dict[str, dict[str, float]]) -> str:
  names = list(next(iter(measured.values())))
  lines = [["guidance", *names]]
  for scale, found in measured.items():
    lines.append([scale, *(f"{found[name]:.4g}" for name in names)])
  return "\n".join("  ".join(f"{x:>15}" for x in line) for line in lines)


def _picture(
  config: ConfigDict,
  drawing: sample_drawing.Drawing,
  description: dict[str, Any],
  store: latents.Latents | None,
  ae: autoencoder.Autoencoder,
) -> np.ndarray:
  """A row for each of some classes, samples at each scale side by side."""
  names = description["classes"]
  count, columns = config.picture.classes, config.picture.columns
  known = sorted(set(config.classes)) or range(drawing.num_classes)
  spread = np.linspace(0, len(known) - 1, min(count, len(known)))
  chosen = [known[int(i)] for i in spread]
  blocks, headings = [], {}
  if store is not None:
    rows = [np.flatnonzero(store.labels() == label)[:1] for label in chosen]
    z = store.read_unscaled(np.concatenate(rows))
    blocks.append(latent_decoding.to_pixels(ae, z)[:, None])
    headings[0] = "training"
  for scale in config.guidance:
    headings[len(blocks) and sum(b.shape[1] for b in blocks)] = (
      f"guidance {scale:g}"
    )
    pixels = drawing.images(scale, np.repeat(chosen, columns))
    blocks.append(pixels.reshape(len(chosen), columns, *pixels.shape[1:]))
  labels = [
    pathlib.PurePath(names[i]).stem[:16] if names else f"{i}" for i in chosen
  ]
  grid = [
    np.stack([figures.reduced(image, _PICTURE_SIDE) for image in row])
    for row in np.concatenate(blocks, axis=1)
  ]
  return figures.grid(grid, labels, headings)
