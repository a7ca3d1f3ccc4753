"""Draws samples from a diffusion model, decodes them and measures them.

Frechet distance (as in the paper's table 3), Inception Score, precision and
recall of samples, at one or several guidance scales. What is written is not
drawn again, however often the task is killed and started.
"""

import json
import logging
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.autoencoder.weights import conversion
from dcae_jax.diffusion import sampling
from dcae_jax.evaluation import fid, samples, set_measures
from dcae_jax.evaluation import metrics as metrics_table
from dcae_jax.evaluation import prompts as prompts_lib
from dcae_jax.evaluation.report import (
  figures,
  plots,
  samples_page,
  text_table,
)
from dcae_jax.latents import decode, reader
from dcae_jax.nn import precision
from dcae_jax.runs import (
  differences,
  metrics_writer,
  outcome,
  resumable,
  versions,
  work_directory,
)
from dcae_jax.setup import denoising, keys, metric_networks, start, text
from dcae_jax.training import hardware, loop, sharding

_LOG = logging.getLogger(__name__)
_PICTURE, _PLOT, _PAGE = "samples.png", "guidance.png", "index.html"
_PICTURE_SIDE = 128  # pixels of an image in the picture, at most
_IDENTITY = "parts/identity.json"
_OF_PROMPTS = ("prompts", "prompt_file", "negative_prompt")


class _Inputs(NamedTuple):
  """What an evaluation reads, opened."""

  model: sampling.LatentDiffusion
  step: int  # of the averages
  variables: Any  # the averages, on all devices of this process
  decoder: samples.Decoder
  prompts: list[prompts_lib.Prompt]  # that are drawn, of models of captions
  choices: np.ndarray  # that are drawn
  told: text.Untold | text.Prompting  # the condition of choices
  store: reader.Latents | None  # of images for the picture
  metrics: metric_networks.Opened
  references: dict[str, fid.Statistics]  # by the network's key
  category_references: dict[str, dict[str, fid.Statistics]]


def check(config: ConfigDict) -> None:
  """Raises UserError for a config that cannot be run."""
  keys.check(config)
  ways = jax.local_device_count()
  if config.batch_size % ways:
    raise errors.UserError(
      f"config.batch_size={config.batch_size} is not divisible by {ways}, the "
      "devices of this process; use a multiple"
    )
  if config.images not in samples.IMAGES:
    known = ", ".join(map(repr, samples.IMAGES))
    raise errors.UserError(
      f"config.images={config.images!r} is not among {known}"
    )
  denoising.check_guidance("config.guidance", config.guidance)
  if not config.guidance:
    raise errors.UserError("config.guidance is empty; name at least one scale")
  _check_metrics(config)
  precision.check_dtype(config.compute_dtype)


def check_memory(config: ConfigDict, latents: int, pixels: int) -> None:
  """Raises UserError for too many samples at once.

  Args:
    config: of the evaluation.
    latents: numbers in those of a sample.
    pixels: numbers in its image.
  """
  devices = jax.local_devices()
  size = config.batch_size // len(devices)
  hardware.check_memory(
    {
      f"samples of config.batch_size={config.batch_size}": size
      * (4 * latents + pixels)
    },
    devices,
    "lower it",
  )


def _check_metrics(config: ConfigDict) -> None:
  metric_networks.check_known(config.metrics, "samples", "config.metrics")
  chosen = metrics_table.chosen(config.metrics, "samples")
  networks = metric_networks.compared(chosen)
  if networks and not config.reference:
    raise errors.UserError(
      f"config.reference is empty, and config.metrics={config.metrics} compare "
      "with it; make one with configs/reference_statistics.py, or choose others"
    )
  if len(networks) > 1 and "{network}" not in config.reference:
    raise errors.UserError(
      f"config.reference={config.reference} is one file, and config.metrics="
      f"{config.metrics} compare features of {', '.join(networks)}; put "
      "{network} into it"
    )
  for key, metric in chosen.items():
    if config.samples < metric.of_sets.least:
      raise errors.UserError(
        f"config.samples={config.samples} is below {metric.of_sets.least}, the "
        f"least for {key}; draw more, or choose other config.metrics"
      )


def run(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm | None = None
) -> bool:
  """Writes samples and `result.json`; False if SIGTERM stopped it."""
  sigterm = sigterm or loop.Sigterm(each_alone=True)
  keys.check(config)
  config, prompts = _prompts(config)
  check(config)
  inputs = _open(config, workdir, prompts)
  identity = _identity(config, inputs)
  work = resumable.Work("samples", lambda: sigterm.received)
  work.begin(
    lambda begun: _check_identity(config, workdir, identity, begun),
    lambda: _write_identity(config, workdir, identity),
  )
  drawing = _drawing(config, inputs)
  if not _draw_missing(config, workdir, drawing, work):
    return False
  if jax.process_index() == 0:
    _finish(config, workdir, inputs, identity, drawing)
  work.wait("measured")
  return True


def _open(
  config: ConfigDict, workdir: epath.Path, prompts: list[prompts_lib.Prompt]
) -> _Inputs:
  """Checks the work directory, and opens everything; writes nothing."""
  trained = work_directory.read_run_config(config.init_from, "train_diffusion")
  model = open_model(config, trained)
  description = decode.read_description(config.init_from)
  chosen = config.classes
  if model.conditioning.is_text:
    chosen = [prompt.text for prompt in prompts]
  choices = model.conditioning.choices(chosen, description)
  if not prompts and model.conditioning.is_text:
    prompts = prompts_lib.of_texts(map(str, choices))
  start.begin(
    config,
    workdir,
    ("parts", "images", _PICTURE, _PLOT, _PAGE, "manifest.json"),
  )
  store = _open_store(config)
  metrics = open_metrics(config)
  references = open_references(config, metrics)
  advice = "name it with config.autoencoder"
  ae = decode.load_autoencoder(
    description, config.autoencoder, advice, config.compute_dtype
  )
  whole = sharding.replicated(sharding.local_mesh())
  step, variables = denoising.averages(config.init_from, model.denoiser, whole)
  decoder = samples.Decoder(ae, description)
  latents = math.prod(description["shape"])
  side = description["shape"][0] * ae.spatial_compression
  check_memory(config, latents, side**2 * ae.image_channels)
  told = text.Untold()
  if model.conditioning.is_text:
    mesh = sharding.create_mesh(1, -1, 1, jax.local_devices())
    of_text = keys.completed(trained, config.init_from).text
    encoder = text.of_run(of_text, description, config.text_encoder, mesh)
    told = text.Prompting(encoder, config.negative_prompt)
  return _Inputs(
    model, step, variables, decoder, prompts, choices, told, store, metrics,
    references, _category_references(config, prompts, metrics),
  )  # fmt: skip


def _prompts(
  config: ConfigDict,
) -> tuple[ConfigDict, list[prompts_lib.Prompt]]:
  """The config with its number of samples, and its prompts if it has any."""
  if config.prompts and config.prompt_file:
    raise errors.UserError(
      "config.prompts and config.prompt_file are both given; leave one empty"
    )
  prompts = prompts_lib.of_texts(config.prompts)
  if config.prompt_file:
    prompts = prompts_lib.read(config.prompt_file)
  if config.samples_per_prompt:
    if not prompts:
      raise errors.UserError(
        f"config.samples_per_prompt={config.samples_per_prompt}, and there are "
        "no prompts; name them, or set config.samples"
      )
    config = config.copy_and_resolve_references()
    config.samples = config.samples_per_prompt * len(prompts)
  return config, prompts


def _drawing(config: ConfigDict, inputs: _Inputs) -> samples.Drawing:
  model, placed = inputs.model, sharding.by_rows(sharding.local_mesh())
  known = metrics_table.known("samples").items()
  described = {
    key: m for key, m in known if m.network.key in inputs.metrics.weights
  }
  order = samples.Order(
    model.conditioning,
    inputs.choices,
    [prompt.metadata for prompt in inputs.prompts],
    at_random=not (inputs.prompts or config.classes),
    batch_size=config.batch_size,
    seed=config.seed,
  )
  return samples.Drawing(
    {scale: model.sample_function(scale, placed) for scale in config.guidance},
    inputs.told,
    inputs.variables,
    inputs.decoder,
    described,
    inputs.metrics.parameters,
    order,
  )


def _finish(
  config: ConfigDict,
  workdir: epath.Path,
  inputs: _Inputs,
  identity: dict[str, Any],
  drawing: samples.Drawing,
) -> None:
  """Writes `result.json`, the plot, the picture and the page of them."""
  measured, absent = {}, dict(inputs.metrics.absent)
  prompts = set_measures.describe_prompts(
    inputs.metrics.metrics,
    inputs.metrics.weights,
    [prompt.text for prompt in inputs.prompts],
  )
  for scale in config.guidance:
    measured[f"{scale:g}"], reasons = _measure(
      config, workdir, scale, inputs, prompts
    )
    absent |= {f"{k} at guidance {scale:g}": v for k, v in reasons.items()}
  result = {
    "init_from": config.init_from,
    "step": inputs.step,
    "objective": str(inputs.model.objective),
    **identity,
    "guidance": measured,
    "absent": absent,
    "reference": {
      network: {"file": _reference(config, network), "sha256": x.sha256}
      for network, x in inputs.references.items()
    },
    "metric_weights": inputs.metrics.used_weights,
    "versions": versions.versions(),
  }
  if inputs.metrics.metrics:
    metrics_writer.write_whole(workdir / _PLOT, _plot(measured))
  if config.picture.classes:
    picture = _picture(config, inputs, drawing)
    metrics_writer.write_png(workdir / _PICTURE, picture)
  table = _table(measured)
  page = samples_page.html_of(
    result,
    table,
    _PLOT if inputs.metrics.metrics else "",
    _PICTURE if config.picture.classes else "",
  )
  metrics_writer.write_whole(workdir / _PAGE, page)
  metrics_writer.write_json(workdir / "result.json", result)
  _LOG.info("\n%s\n", text_table.markdown(table))
  outcome.say(
    workdir,
    {
      "page": _PAGE,
      "images": "images",
      "picture": _PICTURE,
      "over guidance": _PLOT,
      "result": "result.json",
    },
  )


def open_model(
  config: ConfigDict, trained: dict[str, Any]
) -> sampling.LatentDiffusion:
  """Of the config of a training run; UserError if the sampler does not fit."""
  named = work_directory.naming_plugins(config.init_from, trained)
  try:
    trained = keys.completed(trained, config.init_from)
    given = {k: v for k, v in config.sampler.items() if v is not None}
    sampler = ConfigDict(trained.sampler.to_dict() | given)
    with named:
      model = denoising.create(trained.model, trained.objective, sampler)
  except (AttributeError, KeyError, TypeError) as error:
    raise errors.UserError(
      f"config.json of {config.init_from} is damaged, or of an earlier version "
      f"({error}); bring it back, or train again"
    ) from error
  is_text = model.conditioning.is_text
  wrong = ("classes",) if is_text else _OF_PROMPTS
  for key in wrong:
    if config[key]:
      raise errors.UserError(
        f"config.{key}={config[key]!r} is not for {trained.model.variant}, "
        f"which learned {model.conditioning.name}"
      )
  if not is_text:
    metric_networks.check_without_prompts(config.metrics, "config.metrics")
  if config.images == "geneval" and not is_text:
    raise errors.UserError(
      "config.images=geneval is a layout of prompts, and "
      f"{trained.model.variant} learned {model.conditioning.name}"
    )
  model.conditioning.check_chosen(config.prompts if is_text else config.classes)
  return model


def _open_store(config: ConfigDict) -> reader.Latents | None:
  if not (config.picture.classes and config.picture.latents):
    return None
  store = reader.Latents(config.picture.latents)
  decode.check_same_meaning(config.init_from, store)
  return store


def open_metrics(config: ConfigDict) -> metric_networks.Opened:
  """The metrics, with their weights.

  Raises UserError if none of them has its weights: samples that could not be
  measured are not drawn.
  """
  weights = {"gfid": config.weights, "clip_score": config.clip_weights}
  metrics = metric_networks.open_all(config.metrics, weights, "samples")
  if metrics.absent and not metrics.metrics:
    raise errors.UserError("; ".join(dict.fromkeys(metrics.absent.values())))
  return metrics


def open_references(
  config: ConfigDict, metrics: metric_networks.Opened
) -> dict[str, fid.Statistics]:
  """What the metrics compare with, by the network's key.

  Raises UserError for a file that is not there, or has other contents.
  """
  return {
    key: metric_networks.load_reference(
      _reference(config, key), network, metrics.metrics
    )
    for key, network in metric_networks.compared(metrics.metrics).items()
  }


def _reference(config: ConfigDict, network: str) -> str:
  return config.reference.replace("{network}", network)


def _category_references(
  config: ConfigDict,
  prompts: list[prompts_lib.Prompt],
  metrics: metric_networks.Opened,
) -> dict[str, dict[str, fid.Statistics]]:
  """By category and network; none unless they are asked for.

  Raises UserError for prompts without categories.
  """
  path = config.category_reference
  if not path:
    return {}
  categories = sorted({prompt.category for prompt in prompts} - {""})
  if not categories or "{category}" not in path:
    raise errors.UserError(
      f"config.category_reference={path} wants {{category}} in it, and prompts "
      "with categories, as MJHQ-30K has"
    )
  return {
    category: {
      key: metric_networks.load_reference(
        path.replace("{category}", category).replace("{network}", key),
        network,
        metrics.metrics,
      )
      for key, network in metric_networks.compared(metrics.metrics).items()
    }
    for category in categories
  }


def _identity(config: ConfigDict, inputs: _Inputs) -> dict[str, Any]:
  """What must be the same to go on with a directory."""
  weights = {f"{k}_sha256": w.sha256 for k, w in inputs.metrics.weights.items()}
  return {
    "weights_sha256": conversion.fingerprint(inputs.variables),
    "decoder_sha256": conversion.fingerprint(
      inputs.decoder.autoencoder.variables
    ),
    "compute_dtype": config.compute_dtype,
    "inception_sha256": None,
    **weights,
    "sampler": str(inputs.model.sampler),
    "steps": inputs.model.steps,
    "interval": list(inputs.model.interval or ()),
    "seed": config.seed,
    "classes": list(config.classes),
    "batch_size": config.batch_size,
    "images": config.images,
    "samples": config.samples,
    "guidance": sorted(config.guidance),
  } | inputs.told.identity(inputs.choices)


def _check_identity(
  config: ConfigDict, workdir: epath.Path, identity: dict[str, Any], begun: bool
) -> None:
  """Raises UserError if a work directory holds other samples.

  Before the work has begun, it may hold fewer of them, or of other scales.
  """
  path = workdir / _IDENTITY
  if not path.exists():
    if begun:
      raise errors.UserError(
        f"--workdir={workdir} is not the same place for all processes; use a "
        "bucket, or a directory that all of them share"
      )
    if (workdir / "parts").exists() and any((workdir / "parts").iterdir()):
      raise errors.UserError(
        f"{path} is gone, which tells what the samples there are of; bring it "
        "back, or choose another --workdir"
      )
    return
  try:
    before = dict(json.loads(path.read_bytes()))
  except (ValueError, TypeError) as error:
    raise errors.UserError(
      f"{path} is damaged ({error}); choose another --workdir"
    ) from error
  if not begun:
    before |= {key: identity[key] for key in ("samples", "guidance")}
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
  left = ("parts/.*.tmp", "parts/*/.*.tmp", "images/*/.*.tmp")  # by a kill
  work_directory.begin_anew(workdir, (_PICTURE, _PLOT, _PAGE, *left))
  start.write_config(config, workdir)
  metrics_writer.write_json(workdir / _IDENTITY, identity)


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
  missing = samples.missing(wanted, workdir, config.images, drawing.order)
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
  inputs: _Inputs,
  prompts: set_measures.Described,
) -> tuple[dict[str, Any], dict[str, str]]:
  """The numbers of one scale, and why others are absent by metric.

  Those of the prompts of a category, where they are asked for, have its name.
  """
  metrics, squares = inputs.metrics.metrics, 0.0
  sets = set_measures.SetMeasures(metrics, inputs.references)
  of_categories = {
    category: set_measures.SetMeasures(metrics, references)
    for category, references in inputs.category_references.items()
  }
  categories = np.array([prompt.category for prompt in inputs.prompts])
  parts = _parts(config, scale)
  records = samples.read_records(workdir, parts, metrics)
  for part, record in zip(parts, records, strict=True):
    squares += float(np.sum(np.square(record.latent_rms, dtype=np.float64)))
    drawn = np.arange(part.first, part.last) % max(len(inputs.prompts), 1)
    texts = jax.tree.map(lambda x, drawn=drawn: x[drawn], prompts)
    sets.update(part.rows, record.described, prompts=texts)
    for category, of_category in of_categories.items():
      rows = np.flatnonzero(categories[drawn] == category)
      images, texts_of_rows = jax.tree.map(
        lambda x, rows=rows: x[rows], (record.described, texts)
      )
      of_category.update(len(rows), images, prompts=texts_of_rows)
  numbers, absent = sets.compute()
  metric_networks.warn_of_few(numbers, config.samples)
  numbers = {"latent_rms": (squares / config.samples) ** 0.5} | numbers
  if of_categories:
    numbers["categories"] = {
      name: of_category.compute()[0]
      for name, of_category in of_categories.items()
    }
  return numbers, absent


def _plot(measured: dict[str, dict[str, float]]) -> bytes:
  """Each metric over the guidance scale."""
  points = sorted((float(scale), x) for scale, x in measured.items())
  panels = {
    metric.label: {
      column.title: [(scale, x[key]) for scale, x in points if key in x]
      for key, column in metric.columns.items()
      if column.better != "neither"
    }
    for metric in metrics_table.known("samples").values()
    if any(key in x for _, x in points for key in metric.columns)
  }
  return plots.curves(panels, "guidance scale")


def _table(measured: dict[str, dict[str, float]]) -> list[list[str]]:
  columns = metrics_table.columns_of(measured.values())
  titles = [column.title for column in columns.values()]
  rows = [["guidance", "latent RMS", *titles]]
  for scale, values in measured.items():
    numbers = [column.text(values.get(key)) for key, column in columns.items()]
    rows.append([scale, f"{values['latent_rms']:.4g}", *numbers])
  return rows


def _picture(
  config: ConfigDict, inputs: _Inputs, drawing: samples.Drawing
) -> np.ndarray:
  """A row for each of some conditions, samples at each scale side by side."""
  kind, columns = inputs.model.conditioning, config.picture.columns
  condition = kind.shown(inputs.choices, config.picture.classes)
  ae, description = inputs.decoder
  labels = kind.titles(condition, description["classes"])
  blocks, headings = [], {}
  if inputs.store is not None:
    rows = kind.like(condition, inputs.store.condition(kind.name))
    z = inputs.store.read_unscaled(np.maximum(rows, 0))
    pixels = decode.to_pixels(ae, z)
    pixels[rows < 0] = 255  # nothing like it was learned
    blocks.append(pixels[:, None])
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
