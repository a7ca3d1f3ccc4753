"""Draws samples from a diffusion model, decodes them and measures them.

Frechet distance (as in the paper's table 3), Inception Score, precision and
recall of samples, at one or several guidance scales. What is written is not
drawn again, however often the task is killed and started.
"""

import json
import logging
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dcae_jax.autoencoder import autoencoder, streaming_moments
from dcae_jax.autoencoder.dcae import network as dcae
from dcae_jax.autoencoder.weights import conversion
from dcae_jax.diffusion import conditioning, sampling
from dcae_jax.evaluation import fid, sample_metrics, samples
from dcae_jax.evaluation.networks import inception, pretrained
from dcae_jax.evaluation.report import figures
from dcae_jax.latents import decode, reader
from dcae_jax.runs import differences, metrics_writer, resumable
from dcae_jax.setup import denoising, wiring
from dcae_jax.training import checkpoint, loop, sharding

_LOG = logging.getLogger(__name__)
_METRICS = ("gfid", "inception_score", "precision_recall")
_WITH_REFERENCE = ("gfid", "precision_recall")
_NEIGHBOURS = 3  # of precision and recall
_SPLITS = 10  # of the Inception Score
# Samples that each metric needs.
_LEAST = {
  "gfid": 2, "inception_score": _SPLITS, "precision_recall": _NEIGHBOURS + 1
}  # fmt: skip
_PICTURE, _PLOT = "samples.png", "guidance.png"
_PICTURE_SIDE = 128  # pixels of an image in the picture, at most
_IDENTITY = "parts/identity.json"
_MOST = 2**31 - 1
_GROWS = ("samples", "guidance")  # of the identity: what may become more


def check(config: ConfigDict) -> None:
  """Raises ValueError for numbers that no samples can be drawn with."""
  wiring.check_bounds(
    config,
    {
      "samples": (1, _MOST), "batch_size": (1, 2**20), "seed": (0, _MOST),
      "picture.classes": (0, 1000), "picture.columns": (1, 1000),
    },
  )  # fmt: skip
  ways = jax.local_device_count()
  if config.batch_size % ways:
    raise ValueError(
      f"config.batch_size={config.batch_size} is not divisible by {ways}, the "
      "devices of this process; use a multiple"
    )
  if config.images not in samples.IMAGES:
    known = ", ".join(map(repr, samples.IMAGES))
    raise ValueError(f"config.images={config.images!r} is not among {known}")
  denoising.check_guidance("config.guidance", config.guidance)
  if not config.guidance:
    raise ValueError("config.guidance is empty; name at least one scale")
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
  dcae.check_dtype(config.compute_dtype)


def run(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm | None = None
) -> bool:
  """Writes samples and `result.json`; False if SIGTERM stopped it."""
  sigterm = sigterm or loop.Sigterm(each_alone=True)
  check(config)
  model = open_model(
    config,
    checkpoint.read_run_config(config.init_from, "train_diffusion"),
  )
  description = decode.read_description(config.init_from)
  choices = model.conditioning.choices(config.classes, description)
  wiring.check_work_directory(config, workdir)
  wiring.check_nothing_foreign(
    workdir, ("parts", "images", _PICTURE, _PLOT, "manifest.json")
  )
  wiring.prepare_jax(config.compilation_cache)
  store = _open_store(config)
  network, reference = open_metrics(config)
  ae = decode.load_autoencoder(
    description,
    config.autoencoder,
    "name it with config.autoencoder",
    config.compute_dtype,
  )
  mesh = sharding.local_mesh()
  step, variables = denoising.averages(
    config.init_from, model.denoiser, sharding.replicated(mesh)
  )
  identity = _identity(config, model, variables, ae, network)
  work = resumable.Work("samples", lambda: sigterm.received)
  work.begin(
    lambda begun: _check_identity(config, workdir, identity, begun),
    lambda: _write_identity(config, workdir, identity),
  )
  drawing = samples.Drawing(
    {
      scale: model.sample_function(scale, sharding.by_rows(mesh))
      for scale in config.guidance
    },
    variables,
    ae,
    description,
    network.parameters if network else None,
    batch_size=config.batch_size,
    draw=lambda number: conditioning.drawn(
      choices,
      number,
      config.batch_size,
      None if config.classes else config.seed,
    ),
    kind=model.conditioning,
    seed=config.seed,
  )
  if not _draw_missing(config, workdir, drawing, work):
    return False
  if jax.process_index() == 0:
    result = {
      "init_from": config.init_from,
      "step": step,
      "objective": str(model.objective),
      **identity,
      "guidance": {
        f"{scale:g}": _measure(config, workdir, scale, reference)
        for scale in config.guidance
      },
      "reference": {
        "file": config.reference,
        "sha256": reference.sha256 if reference else None,
      },
      "inception_is_published": network.is_published if network else None,
      "versions": wiring.versions(),
    }
    _finish(config, workdir, result, drawing, description, choices, store, ae)
  work.wait("measured")
  return True


def _finish(
  config: ConfigDict,
  workdir: epath.Path,
  result: dict[str, Any],
  drawing: samples.Drawing,
  description: dict[str, Any],
  choices: conditioning.Condition,
  store: reader.Latents | None,
  ae: autoencoder.Autoencoder,
) -> None:
  """Writes `result.json`, the plot and the picture."""
  for name in (_PICTURE, _PLOT):  # of an earlier start
    (workdir / name).unlink(missing_ok=True)
  metrics_writer.write_whole(
    workdir / "result.json", json.dumps(result, indent=2)
  )
  if config.metrics:
    metrics_writer.write_whole(workdir / _PLOT, _plot(result["guidance"]))
  if config.picture.classes:
    chosen = drawing.kind.shown(choices, config.picture.classes)
    picture = _picture(config, drawing, description, chosen, store, ae)
    metrics_writer.write_png(workdir / _PICTURE, picture)
  _LOG.info("%s\nin %s", _table(result["guidance"]), workdir)


def open_model(
  config: ConfigDict, trained: dict[str, Any]
) -> sampling.LatentDiffusion:
  """Of the config of a training run, and how it is sampled.

  Raises:
    ValueError: a sampler or classes that do not fit.
  """
  try:
    trained = ConfigDict(trained)
    given = {k: v for k, v in config.sampler.items() if v is not None}
    sampler = ConfigDict(trained.sampler.to_dict() | given)
    model = denoising.create(trained.model, trained.objective, sampler)
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(
      f"config.json of {config.init_from} is damaged, or of an earlier version "
      f"({error}); bring it back, or train again"
    ) from error
  model.conditioning.check_chosen(config.classes)
  return model


def _open_store(config: ConfigDict) -> reader.Latents | None:
  if not (config.picture.classes and config.picture.latents):
    return None
  store = reader.Latents(config.picture.latents)
  decode.check_same_meaning(config.init_from, store)
  return store


def open_metrics(
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
    features = reference.features
    shape = (0, inception.FEATURES) if features is None else features.shape
    if (
      shape[1:] != (inception.FEATURES,)
      or shape[0] <= _NEIGHBOURS
      or not np.isfinite(features).all()
    ):
      raise ValueError(
        f"config.reference={config.reference} has features {list(shape)} of "
        f"single images, and precision and recall need more than {_NEIGHBOURS} "
        f"times {inception.FEATURES} finite numbers; make one with "
        "configs/reference_statistics.py, or leave precision_recall out of "
        "config.metrics"
      )
  return network, reference


def _identity(
  config: ConfigDict,
  model: sampling.LatentDiffusion,
  variables: Any,
  ae: autoencoder.Autoencoder,
  network: pretrained.Pretrained | None,
) -> dict[str, Any]:
  """What samples depend on; must be the same to go on with a directory."""
  return {
    "weights_sha256": conversion.fingerprint(variables),
    "decoder_sha256": conversion.fingerprint(ae.variables),
    "compute_dtype": config.compute_dtype,
    "inception_sha256": network.sha256 if network else None,
    "sampler": str(model.sampler),
    "steps": model.steps,
    "interval": list(model.interval or ()),
    "seed": config.seed,
    "classes": list(config.classes),
    "batch_size": config.batch_size,
    "images": config.images,
    "samples": config.samples,
    "guidance": sorted(config.guidance),
  }


def _check_identity(
  config: ConfigDict, workdir: epath.Path, identity: dict[str, Any], begun: bool
) -> None:
  """Raises ValueError where a work directory holds other samples.

  Before the work has begun there, it may hold fewer.
  """
  path = workdir / _IDENTITY
  if not path.exists():
    if begun:
      raise ValueError(
        f"--workdir={workdir} is not the same place for all processes; use a "
        "bucket, or a directory that all of them share"
      )
    if (workdir / "parts").exists() and any((workdir / "parts").iterdir()):
      raise ValueError(
        f"{path} is gone, so that it is not known what the samples there are "
        "of; bring it back, or choose another --workdir"
      )
    return
  try:
    before = dict(json.loads(path.read_bytes()))
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"{path} is damaged ({error}); choose another --workdir"
    ) from error
  if not begun:
    before |= {key: identity[key] for key in _GROWS}
  differences.check_same(
    before,
    identity,
    f"--workdir={workdir} holds samples that were drawn otherwise",
    "choose another directory, or the same config to go on (inception_sha256 "
    "is None without config.metrics)",
  )
  for scale in config.guidance:
    samples.check_not_fewer(workdir, scale, config.samples, config.batch_size)


def _write_identity(
  config: ConfigDict, workdir: epath.Path, identity: dict[str, Any]
) -> None:
  wiring.write_config(config, workdir)
  text = json.dumps(identity, indent=2)
  metrics_writer.write_whole(workdir / _IDENTITY, text)


def _parts(config: ConfigDict, scale: float) -> list[samples.Part]:
  return samples.parts(scale, config.samples, config.batch_size)


def _draw_missing(
  config: ConfigDict,
  workdir: epath.Path,
  drawing: samples.Drawing,
  work: resumable.Work,
) -> bool:
  """Draws and writes what is not there; False if it was stopped."""
  wanted = [part for scale in config.guidance for part in _parts(config, scale)]
  missing = samples.missing(wanted, workdir, config.images)
  own = work.share(missing)
  _LOG.info(
    "%d of %d parts of %d samples are missing, %d of them for this process",
    len(missing), len(wanted), config.batch_size, len(own),
  )  # fmt: skip
  samples.fill(drawing, own, workdir, config.images, work.stopped)
  return work.all_done("drawn")


def _measure(
  config: ConfigDict,
  workdir: epath.Path,
  scale: float,
  reference: fid.Statistics | None,
) -> dict[str, float]:
  """The metrics of one scale."""
  moments = streaming_moments.Moments(inception.FEATURES)
  features, logits, squares = [], [], 0.0
  needed = ("latent_rms", *(("features", "logits") if config.metrics else ()))
  parts = _parts(config, scale)
  for record in samples.read_records(workdir, parts, needed):
    squares += float(np.sum(np.square(record["latent_rms"], dtype=np.float64)))
    if "gfid" in config.metrics:
      moments.update(record["features"])
    if "inception_score" in config.metrics:
      logits.append(record["logits"])
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
    score = sample_metrics.InceptionScore(inception.CLASSES, _SPLITS)
    logits = np.concatenate(logits)  # may come class after class
    score.update(logits[np.random.default_rng(0).permutation(len(logits))])
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
  drawing: samples.Drawing,
  description: dict[str, Any],
  condition: conditioning.Condition,
  store: reader.Latents | None,
  ae: autoencoder.Autoencoder,
) -> np.ndarray:
  """A row for each of a condition, samples at each scale side by side."""
  kind, columns = drawing.kind, config.picture.columns
  labels = kind.titles(condition, description["classes"])
  blocks, headings = [], {}
  if store is not None:
    z = store.read_unscaled(kind.like(condition, store.condition(kind.name)))
    blocks.append(decode.to_pixels(ae, z)[:, None])
    headings[0] = "training"
  for scale in config.guidance:
    headings[sum(block.shape[1] for block in blocks)] = f"guidance {scale:g}"
    repeated = jax.tree.map(lambda x: np.repeat(x, columns, 0), condition)
    pixels = drawing.images(scale, repeated)
    blocks.append(pixels.reshape(len(labels), columns, *pixels.shape[1:]))
  grid = [
    np.stack([figures.reduced(image, _PICTURE_SIDE) for image in row])
    for row in np.concatenate(blocks, axis=1)
  ]
  return figures.grid(grid, labels, headings)
