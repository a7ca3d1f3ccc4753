"""Captions of a latent store to states of a text encoder, kept beside it.

By every process of a pod at once; started again, it does what is missing.
"""

import logging
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.diffusion.text import encoders
from dcae_jax.latents import aspect_ratios, captions, reader
from dcae_jax.runs import (
  exclusive,
  metrics_writer,
  progress_lines,
  resumable,
  stopwatch,
  versions,
)
from dcae_jax.setup import exporting, keys, start, text
from dcae_jax.training import hardware, loop, sharding

_LOG = logging.getLogger(__name__)


def check(config: ConfigDict) -> None:
  """Raises UserError for a config that cannot be run."""
  keys.check(config)
  if not config.latents:
    raise errors.UserError(
      "config.latents is empty; name a latent store that was exported with "
      "config.source.captions"
    )


def run(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm | None = None
) -> bool:
  """Fills the store, and writes `result.json`; False if SIGTERM stopped it."""
  check(config)
  sigterm = sigterm or loop.Sigterm(each_alone=True)
  output = exporting.output(config, workdir, "captions")
  with exclusive.held(output):
    return _fill(config, workdir, output, sigterm)


def _fill(
  config: ConfigDict, workdir: epath.Path, output: str, sigterm: loop.Sigterm
) -> bool:
  watch, is_first = stopwatch.Stopwatch(), jax.process_index() == 0
  work = resumable.Work("captions", lambda: sigterm.received)
  with watch.measure("start"):
    start.begin(config, workdir)
    open_store = lambda path, count: reader.Latents(
      path, conditions=("captions",), retries=config.retries
    )
    latents = aspect_ratios.opened(config.latents, open_store, config.retries)
    rows = latents.condition("captions")
    store = captions.store_of(output, config.retries)
    store.check_writable(jax.process_index())
    mesh = sharding.create_mesh(1, -1, 1, jax.local_devices())
    encoder = text.load(config.text, mesh)
    size = config.batch_size_per_device
    hardware.check_memory(
      {
        f"states of config.batch_size_per_device={size} captions": 2
        * (size * encoder.max_tokens * encoder.width)
      },
      mesh.devices.flat,
      "lower it",
    )
    identity = captions.identity(rows, encoder.description())
    is_finished = start.begin_store(config, workdir, work, store, identity)
  has_result = (workdir / "result.json").exists()
  if is_finished and (has_result or not is_first):
    return True
  with watch.measure("tokens"):
    encoding = captions.Encoding(store, rows, _encoder(encoder, mesh, config))
    result = {
      "states": store.storage.path,
      **encoding.numbers,
      "cut": encoder.tokenizer.cut,
    }
  if is_finished:  # it was killed before it could say so
    _write_result(workdir, result, watch)
    return True
  missing = encoding.missing()
  own = work.share(missing)
  if is_first:
    encoding.create_arrays()
  work.wait("arrays")
  numbers = encoding.numbers
  _LOG.info(
    "%d captions of %d images, %d texts, %d tokens, %.1f MB; %d of %d shards "
    "are missing, %d of them for this process",
    numbers["captions"], numbers["images"], numbers["texts"],
    numbers["tokens"], numbers["bytes"] / 1e6, len(missing),
    encoding.layout.shards, len(own),
  )  # fmt: skip
  total = sum(map(encoding.tokens, own))
  with (
    watch.measure("encoder and store"),
    progress_lines.Progress(total, "tokens") as progress,
  ):
    for tokens in encoding.fill(own, work.stopped):
      progress.add(tokens)
  if not work.all_done("encoded"):
    return False
  if is_first:
    described = {"versions": versions.versions(), "numbers": numbers}
    store.finish(encoding.layout, identity | described)
    _write_result(workdir, result, watch)
  work.wait("finished")
  return True


def _write_result(
  workdir: epath.Path, result: dict[str, Any], watch: stopwatch.Stopwatch
) -> None:
  result = result | {"seconds": watch.seconds()}
  metrics_writer.write_json(workdir / "result.json", result)
  _LOG.info("states in %s\n%s", result["states"], watch.table())


def _encoder(
  encoder: encoders.TextEncoder, mesh: jax.sharding.Mesh, config: ConfigDict
) -> captions.Encoder:
  by_row = sharding.by_rows(mesh)
  return captions.Encoder(
    encoder.tokenizer,
    lambda ids, mask: encoder.states(
      jax.device_put(ids, by_row), jax.device_put(mask, by_row)
    ),
    encoder.kept,
    encoder.width,
    config.batch_size_per_device * mesh.size,
  )
