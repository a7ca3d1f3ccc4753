"""Images of any source to record shards with an index, by many processes.

Started again, it does what is missing.
"""

import logging

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax.data import preparation, record_store
from dcae_jax.runs import (
  exclusive,
  json_types,
  metrics_writer,
  progress_lines,
  resumable,
  stopwatch,
  versions,
  work_directory,
)
from dcae_jax.setup import exporting, preparing, start
from dcae_jax.training import loop

_LOG = logging.getLogger(__name__)


def run(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm | None = None
) -> bool:
  """Fills the store, and writes `result.json`; False if SIGTERM stopped it."""
  preparing.check(config)
  sigterm = sigterm or loop.Sigterm(each_alone=True)
  output = exporting.output(config, workdir, "records")
  with exclusive.held(output):
    return _fill(config, workdir, output, sigterm)


def _fill(
  config: ConfigDict, workdir: epath.Path, output: str, sigterm: loop.Sigterm
) -> bool:
  watch, is_first = stopwatch.Stopwatch(), jax.process_index() == 0
  work = resumable.Work("records", lambda: sigterm.received)
  with watch.measure("start"):
    start.check_work_directory(config, workdir)
    work_directory.check_nothing_foreign(workdir, ())
    encoding = preparing.encoding(config)
    members, classes = preparing.members(config, workdir)
    store = record_store.RecordStore(output, config.retries)
    store.check_writable(jax.process_index())
    shards = preparation.plan(members, encoding, config.shard_megabytes * 1e6)
    identity = {
      "source": [
        {"split": x.split, "fingerprint": x.source.fingerprint()}
        for x in members
      ],
      "encoding": preparing.description(encoding),
      "plan": json_types.digest([list(shard) for shard in shards]),
    }
    is_finished = start.begin_store(config, workdir, work, store, identity)
  if is_finished:
    if is_first and not (workdir / "result.json").exists():  # it was killed
      _write_result(workdir, store, store.manifest(), watch)
    return True
  missing = store.missing(shards)
  own = work.share(missing)
  _LOG.info(
    "%d images; %d of %d shards are missing, %d of them for this process",
    sum(len(x.source) for x in members), len(missing), len(shards), len(own),
  )  # fmt: skip
  writer = record_store.Writer(
    output, config.retries, members, encoding, config.threads
  )
  total = sum(x.stop - x.start for x in own)
  with (
    watch.measure("shards"),
    progress_lines.Progress(total) as progress,
  ):
    for images in writer.write_all(own, config.workers, work.stopped):
      progress.add(images)
  if not work.all_done("written"):
    return False
  if is_first:
    with watch.measure("index"):
      described = identity | {"versions": versions.versions()}
      manifest = store.finish(shards, classes, described)
    _write_result(workdir, store, manifest, watch)
  work.wait("finished")
  return True


def _write_result(
  workdir: epath.Path,
  store: record_store.RecordStore,
  manifest: dict,
  watch: stopwatch.Stopwatch,
) -> None:
  left_out = manifest["left_out"]
  for key, reason in sorted(left_out.items())[:20]:
    _LOG.warning("left out %s: %s", key, reason)
  result = {
    "records": store.storage.path,
    "count": manifest["count"],
    "left_out": len(left_out),
    "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
    "shards": len(manifest["shards"]),
    "seconds": watch.seconds(),
  }
  metrics_writer.write_json(workdir / "result.json", result)
  _LOG.info(
    "%d images, %.1f MB in %d shards of %s, %d left out\n%s",
    result["count"], result["bytes"] / 1e6, result["shards"],
    result["records"], result["left_out"], watch.table(),
  )  # fmt: skip
