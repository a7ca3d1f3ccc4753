"""How latents are read: what is kept in memory, and what is shuffled at once.

Where a store does not fit, the rows of as many shards as do are shuffled with
each other, so that a bucket is asked for each of them once an epoch.
"""

import logging

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax.latents import aspect_ratios
from dcae_jax.runs import processes, work_directory
from dcae_jax.setup import keys

_LOG = logging.getLogger(__name__)
_SHARE = 4  # of the memory: a quarter
_LEAST = 2  # shards that are shuffled with each other
_SLACK = 1.25  # the last batches of some shards are read with the next ones


def cache_megabytes(config: ConfigDict) -> float:
  """What each process, and each of its workers, keeps of a store in memory.

  The same for all processes, which ask together.
  """
  data = config.data
  if data.cache_megabytes >= 0:
    return data.cache_megabytes
  caches = max(data.workers, 1) * (2 if config.text.cache else 1)
  return processes.memory() / _SHARE / caches / 1e6


def decided(
  config: ConfigDict, store: aspect_ratios.Store, workdir: epath.Path
) -> ConfigDict:
  """The config with how rows are shuffled; a run goes on as it began.

  All with each other, if the store fits what is kept in memory; else those of
  as many shards as do, others in each process. A line of the log says so.
  """
  kept, size = cache_megabytes(config), store.shard_bytes / 1e6
  total, count = store.shards * size, jax.process_count()
  shards, streams = config.data.shuffle_shards, config.data.shuffle_streams
  path = workdir / "config.json"
  before = work_directory.read_config(path) if path.exists() else {}
  if before.get("task") == config.task:
    data = keys.completed(before, str(workdir)).data
    # A run from before there were streams has one.
    shards = max(data.shuffle_shards, 0) if shards < 0 else shards
    streams = max(data.shuffle_streams, 1) if streams < 0 else streams
  if streams < 0:
    streams = 1 if total <= kept or not shards else count
  of_process = max(streams // count, 1)
  if shards < 0:
    fitting = int(kept / size / _SLACK / of_process)
    shards = 0 if total <= kept else max(fitting, _LEAST)
  config = config.copy_and_resolve_references()
  config.data.shuffle_shards, config.data.shuffle_streams = shards, streams
  needed = shards * of_process * size if shards else total
  among = f"{shards} shards at a time" if shards else "all of them"
  _LOG.info(
    "latents: %.4g MB in %d shards, of which a process keeps up to %.4g MB in "
    "memory (%s); shuffling %s%s%s",
    total,
    store.shards,
    kept,
    "config.data.cache_megabytes"
    if config.data.cache_megabytes >= 0
    else "its share of a quarter",
    among,
    f" in each of {streams} streams" if streams > 1 else "",
    "" if needed <= kept else ", which do not fit: they are read repeatedly",
  )
  return config
