"""From config to the objects below `setup/`: model, sources, work directory."""

import importlib.metadata
import json
import logging
import math
import os
import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dcae_jax.autoencoder import families
from dcae_jax.autoencoder.dcae import network as dcae
from dcae_jax.autoencoder.weights import released
from dcae_jax.data import decoding, sources
from dcae_jax.evaluation import image_metrics
from dcae_jax.runs import differences, metrics_writer, storage
from dcae_jax.training import checkpoint

_LOG = logging.getLogger(__name__)
# What makes parameters of one model fit another.
MODEL_KEYS = (
  "variant", "architecture", "image_channels", "residual_autoencoding"
)  # fmt: skip
# What may change between two starts in one work directory: it does not change
# what is computed, or only how far it goes and, with a schedule that ends with
# the run, the rate from there on.
_MAY_CHANGE = (
  "steps", "log_every", "log_seconds", "compilation_cache", "profile",
  "model.scan",
  "checkpoint", "evaluation", "report", "data.workers", "data.threads",
  "data.prefetch", "data.cache_megabytes", "data.retries", "lpips.path",
  "samples", "sampler", "latents", "autoencoder",
)  # fmt: skip
# Keys that were added later, by path or by last name, with what the runs did
# whose config.json lacks them; None: it makes no difference to those.
_ADDED_LATER = {
  "optimizer.kind": "adamw",
  "optimizer.adam_learning_rate": None,
  "optimizer.schedule": "constant",
  "optimizer.decay_steps": None,
  "optimizer.final_rate": None,
  "optimizer.decay_all": False,
  "discriminator.learning_rate": 0.0,
  "initial_branch_scale": 1.0,
  "part": "",
  "held_out": 0.1,
  "on_accelerator": [],
}
# What results name the versions of.
_PACKAGES = (
  "dcae_jax", "jax", "jaxlib", "flax", "numpy", "pillow", "tensorstore"
)  # fmt: skip
# Tasks that make all anew, or find out themselves what they can go on with.
_MADE_ANEW = (
  "report", "reconstruct", "evaluate_autoencoder", "reference_statistics",
  "export_latents", "inspect_latents", "evaluate_diffusion",
  "export_and_diffuse",
)  # fmt: skip


def check_bounds(
  config: ConfigDict, bounds: Mapping[str, tuple[float, float]]
) -> None:
  """Raises ValueError for a number that is not from the least to the most.

  Keys of `bounds` may be paths, `optimizer.beta1`.
  """
  for key, (least, most) in bounds.items():
    value = config
    for part in key.split("."):
      value = value[part]
    if not least <= value <= most:  # also for NaN
      raise ValueError(f"config.{key}={value} is not from {least} to {most}")


def model(config: ConfigDict) -> families.Model:
  """The autoencoder of `config.model`."""
  dcae.check_dtype(config.dtype)
  return families.create(
    families.of_model(config.variant, config.architecture.to_dict()),
    image_channels=config.image_channels,
    residual_autoencoding=config.residual_autoencoding,
    rematerialisation=config.rematerialisation,
    scan=config.scan,
    dtype=config.dtype,
  )


def model_of(source: str) -> dict[str, Any]:
  """The model's part of the config of a run or of released weights.

  Raises:
    ValueError: `source` is neither, or what it holds is damaged.
  """
  if checkpoint.is_run(source):
    model = checkpoint.read_run_config(source)["model"]
    return {key: model[key] for key in MODEL_KEYS}
  found = released.find(source)
  name, settings = families.name_of(found.variant), {}
  if name == "custom":
    settings = families.to_config(found.variant, found.image_channels, 1.0)
  return dict(
    zip(MODEL_KEYS, (name, settings, found.image_channels, True), strict=True)
  )


def variant_of(source: str) -> tuple[families.Variant, int]:
  """The architecture of a run or of released weights, and image channels.

  Raises:
    ValueError: `source` is neither, or what it holds is damaged.
  """
  model = model_of(source)
  variant = families.of_model(model["variant"], model["architecture"])
  return variant, model["image_channels"]


def with_model(config: ConfigDict) -> ConfigDict:
  """The config, with the model of `init_from` where it names none."""
  if config.model.variant:
    return config
  if not config.init_from:
    known = ", ".join(families.VARIANTS)
    raise ValueError(
      f"config.model.variant is empty; name one of {known}, or set "
      "config.init_from, whose model is taken then"
    )
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model.update(model_of(config.init_from))
  return config


def for_device(config: ConfigDict, backend: str) -> ConfigDict:
  """The config with the values that `on_accelerator` has for a GPU or TPU.

  Raises:
    ValueError: they are for a key that is not there.
  """
  config = config.copy_and_resolve_references()
  here, changes = differences.flat(config.to_dict()), {}
  for key, before, there in config.on_accelerator:
    if key not in here:
      raise ValueError(f"config.on_accelerator names {key!r}, which is no key")
    if here[key] == before and backend != "cpu":
      changes[key] = there
  if changes:
    _LOG.info("for this %s: %s", backend, changes)
  config.update_from_flattened_dict(changes)
  config.on_accelerator = ()
  return config


def weighted_sources(
  config: ConfigDict,
) -> list[tuple[sources.Source, float]]:
  """The members of a source config, with their weights.

  Raises:
    ValueError: an unknown kind, or a source that does not exist.
  """
  if config.kind == "mixture":
    members = list(config.members.values())
    if not members or any(member.kind == "mixture" for member in members):
      raise ValueError(
        "a source of kind 'mixture' needs at least one member, and none that "
        "is a mixture itself"
      )
    if config.get("part"):  # runs from before it have none
      raise ValueError(
        f"a source of kind 'mixture' has no part {config.part!r}; its members "
        "have: config.data.source.members.NAME.part"
      )
    return [pair for member in members for pair in weighted_sources(member)]
  if not 0 < config.weight < math.inf:
    raise ValueError(f"source weight {config.weight} is not a positive number")
  return [(part_of(_whole_source(config), config), config.weight)]


def _whole_source(config: ConfigDict) -> sources.Source:
  if config.kind == "folder":
    return sources.folder(config.path)
  if config.kind == "embedded":
    return sources.embedded(config.split)
  if config.kind == "tfds":
    return sources.TensorFlowDataset(config.name, config.split, config.path)
  raise ValueError(
    f"unknown source kind {config.kind!r}; known are folder, tfds, embedded, "
    "mixture"
  )


def part_of(source: sources.Source, config: ConfigDict) -> sources.Source:
  """The part of a source that its config names."""
  if not config.get("part"):  # runs from before it have none
    return source
  parts = ("training", "held_out")
  if config.part not in parts:
    raise ValueError(
      f"unknown part {config.part!r} of a source; known are "
      f"{', '.join(parts)}, and '' for all of it"
    )
  return sources.split(source, config.held_out)[parts.index(config.part)]


def single_source(config: ConfigDict) -> sources.Source:
  """A source that is not a mixture: evaluations have an order."""
  if config.kind == "mixture":
    raise ValueError("images are evaluated from one source, not from a mixture")
  return weighted_sources(config)[0][0]


def check_resolutions(resolutions: tuple[int, ...], config: ConfigDict) -> None:
  """Raises ValueError for sides that cannot be encoded or evaluated."""
  decoding.check_channels(config.image_channels)
  check_sides(resolutions, model(config).spatial_compression)


def check_sides(resolutions: tuple[int, ...], compression: int) -> None:
  """Raises ValueError for image sides that cannot be encoded or evaluated."""
  for resolution in resolutions:
    if not isinstance(resolution, int):
      raise ValueError(f"image side {resolution!r} is not a whole number")
    dcae.check_side(resolution, compression)
    if resolution < image_metrics.SMALLEST_SIDE:
      raise ValueError(
        f"image side {resolution} is below {image_metrics.SMALLEST_SIDE}, the "
        "smallest that SSIM can be computed for"
      )


def total(number: int) -> int:
  """The sum of a number over all processes."""
  if jax.process_count() == 1:
    return number
  found = multihost_utils.process_allgather(np.array(number))
  return int(found.sum())


def prepare_jax(compilation_cache: str) -> None:
  """Keeps compiled programs between runs; "" does not."""
  if compilation_cache:
    directory = os.path.expanduser(compilation_cache)
    jax.config.update("jax_compilation_cache_dir", directory)


def check_work_directory(config: ConfigDict, workdir: epath.Path) -> None:
  """Raises ValueError if the directory belongs to a run of another config.

  OSError for a bucket that is not there, or must not be written.
  """
  if "://" in str(workdir):
    place = storage.Storage(os.fspath(workdir))
    place.check_writable(f"probe_{jax.process_index()}")
  path = workdir / "config.json"
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"--workdir={workdir} is not a directory; choose another")
  if not path.exists():
    return
  before, now = checkpoint.read_config(path), resolved(config)
  if before["task"] == now["task"] and now["task"] in _MADE_ANEW:
    return
  if (workdir / "result.json").exists() and not (
    workdir / "checkpoints"
  ).exists():
    raise ValueError(
      f"--workdir={workdir} holds a finished run without checkpoints; bring "
      "them back, or choose another directory"
    )
  found = differences.differences(_with_added_keys(before, now), now)
  changes = [text for key, text in found.items() if not _may_change(key)]
  if changes:
    raise ValueError(
      f"--workdir={workdir} holds a run of another config ({'; '.join(changes)}"
      "); choose another directory, or the same config to go on"
    )


def check_nothing_foreign(workdir: epath.Path, names: tuple[str, ...]) -> None:
  """Raises ValueError where a task would write over what no task wrote."""
  if (workdir / "config.json").exists():
    return
  for name in (*names, "result.json"):
    if (workdir / name).exists():
      raise ValueError(
        f"--workdir={workdir} holds {name} of something else; choose another "
        "directory"
      )


def _with_added_keys(
  before: dict[str, Any], now: dict[str, Any]
) -> dict[str, Any]:
  """The keys of an earlier run by path, with those that were added since."""
  found = differences.flat(before)
  for path, value in differences.flat(now).items():
    for key in (_within_phase(path), path.rpartition(".")[2]):
      if path not in found and key in _ADDED_LATER:
        did = _ADDED_LATER[key]
        found[path] = value if did is None else did
  return found


def _may_change(path: str) -> bool:
  key = _within_phase(path)
  return any(
    key == allowed or key.startswith(f"{allowed}.") for allowed in _MAY_CHANGE
  )


def _within_phase(path: str) -> str:
  """A phase's own keys stand one level deeper in the config of all three."""
  part, _, rest = path.partition(".")
  return rest if part in ("phase1", "phase2", "phase3") else path


def write_config(config: ConfigDict, workdir: epath.Path) -> None:
  """Writes `config.json`, on the first process; whole or not at all."""
  if jax.process_index() == 0:
    text = json.dumps(resolved(config), indent=2) + "\n"
    metrics_writer.write_whole(workdir / "config.json", text)


def versions() -> dict[str, str]:
  """What computed a result."""
  found = {}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed: run from a clone"
  device = jax.devices()[0]
  return found | {
    "python": platform.python_version(),
    "devices": f"{jax.device_count()} {device.device_kind}",
  }


def resolved(config: ConfigDict) -> dict[str, Any]:
  """The config as JSON has it: tuples are lists."""
  return json.loads(config.to_json_best_effort())
