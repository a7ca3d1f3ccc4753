"""Images to latents in a store, by every process of a pod at once.

Started again, it does what is missing.
"""

import logging

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax.autoencoder import autoencoder
from dcae_jax.latents import aspect_ratios
from dcae_jax.latents import export as latent_export
from dcae_jax.latents import store as latent_store
from dcae_jax.runs import (
  exclusive,
  metrics_writer,
  outcome,
  resumable,
  stopwatch,
)
from dcae_jax.setup import exporting, start
from dcae_jax.training import loop

_LOG = logging.getLogger(__name__)


def run(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm | None = None
) -> bool:
  """Fills the store, and writes `result.json`; False if SIGTERM stopped it."""
  exporting.check(config)
  sigterm = sigterm or loop.Sigterm(each_alone=True)
  with exclusive.held(exporting.output(config, workdir, "latents")):
    return _fill(config, workdir, sigterm)


def _fill(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm
) -> bool:
  watch = stopwatch.Stopwatch()
  with watch.measure("start"):
    start.begin(config, workdir)
    parts = exporting.parts(config, workdir)
    ae = exporting.load_autoencoder(config)
  stores, is_new = [], False
  for part in parts:
    store = exporting.open_store(config, workdir, part)
    stores.append(store)
    is_new |= store.manifest() is None
    export = exporting.create(config, store, part, ae)
    work = resumable.Work(f"latents{part.name}", lambda: sigterm.received)
    if not _fill_store(config, workdir, export, ae, work, watch):
      return False
  path = exporting.output(config, workdir, "latents")
  if jax.process_index() == 0:
    if parts[0].name:
      aspect_ratios.write(path, [part.name for part in parts])
    if is_new or not (workdir / "result.json").exists():  # it was killed before
      _write_result(workdir, path, stores, watch)
  outcome.say(workdir, {"result": "result.json"}, {"latents": path})
  return True


def _fill_store(
  config: ConfigDict,
  workdir: epath.Path,
  export: latent_export.Export,
  ae: autoencoder.Autoencoder,
  work: resumable.Work,
  watch: stopwatch.Stopwatch,
) -> bool:
  """Finishes a store; False if SIGTERM stopped it."""
  store, is_first = export.store, jax.process_index() == 0
  with watch.measure("start"):
    identity = exporting.identity(config, export, ae)
  if start.begin_store(config, workdir, work, store, identity):
    return True
  plan = export.fill(work, watch)
  if plan is None:
    return False
  _LOG.info("time of this process:\n%s", watch.table())
  if is_first:
    store.check_identity(identity, begun=True)
    export.finish(
      plan,
      ae,
      "given" if config.scaling_factor else "the autoencoder's",
      exporting.description(config, export, ae),
    )
  work.wait("finished")
  return True


def _write_result(
  workdir: epath.Path,
  path: str,
  stores: list[latent_store.LatentStore],
  watch: stopwatch.Stopwatch,
) -> None:
  seconds, manifests = watch.seconds(), [store.manifest() for store in stores]
  result = {
    "latents": path,
    "count": sum(manifest["count"] for manifest in manifests),
    "unreadable": sum(len(manifest["unreadable"]) for manifest in manifests),
    "scaling_factor": manifests[0]["scaling_factor"],
    "seconds": seconds,
    "encoder_share": seconds.get("encoder", 0.0) / seconds["total"],
  }
  metrics_writer.write_json(workdir / "result.json", result)
  _LOG.info(
    "%d rows, %d images unreadable; %.1f %% of the time in the encoder",
    result["count"], result["unreadable"], 100 * result["encoder_share"],
  )  # fmt: skip
