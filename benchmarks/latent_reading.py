"""How fast latents are read, against what training a UViT-S needs.

  python -m benchmarks.latent_reading [--bucket=gs://BUCKET/PATH]

Fills a store with random latents of f64c128 at 512 px, and reads shuffled
batches of 256 from it, with threads alone and with worker processes; then
counts what all processes of a pod read in an epoch. UViT-S
takes 3.1 GMACs for an image of 64 tokens (12.27 for the 256 of f32c32); its
training step three times that, and at best at this machine's rate of a large
float32 matrix product. So the ratio is a lower bound.
"""

import argparse
import os
import tempfile
import time

import numpy as np
import tensorstore as ts
from absl import flags

from dcae_jax.latents import layout as store_layout
from dcae_jax.latents import reader
from dcae_jax.latents import store as latent_store

_SHAPE, _ROWS, _SHARD_ROWS = (8, 8, 128), 8192, 1024
_BATCH, _BATCHES = 256, 64
_MACS = {"f64c128, 64 tokens": 12.27e9 / 4, "f32c32, 256 tokens": 12.27e9}


def _peak_flops(size: int = 2048) -> float:
  """FLOP/s of a float32 matrix product on this machine."""
  x = np.ones((size, size), np.float32)
  seconds = []
  for _ in range(4):
    start = time.perf_counter()
    x @ x
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)


def _fill(path: str) -> None:
  store = latent_store.LatentStore(path)
  store.check_writable()
  store.write_identity({})
  view = store_layout.VIEWS[0]
  layout = store_layout.Layout(_ROWS, _SHAPE, "float16", (view,), _SHARD_ROWS)
  store.create_arrays(layout)
  rng = np.random.default_rng(0)
  for shard in range(layout.shards):
    values = rng.standard_normal((_SHARD_ROWS, *_SHAPE), np.float32)
    labels = np.zeros(_SHARD_ROWS, np.int32)
    store.write_shard(
      layout,
      shard,
      {view: values.astype(np.float16), "labels": labels},
      [f"{shard}/{i}" for i in range(_SHARD_ROWS)],
      {"moments": {"mean": [0.0]}},
    )
  numbers = {"scaling_factor": 1.0, "shift_factor": 0.0}
  store.finish(layout, {"classes": []} | numbers)


def _rate(path: str, workers: int, cache_megabytes: float) -> float:
  """Images per second, after the first batch."""
  source = reader.Latents(path, cache_megabytes=cache_megabytes)
  batches = reader.LatentBatches(
    source, batch_size=_BATCH, seed=0, workers=workers
  )
  next(batches)
  start = time.perf_counter()
  for _ in range(_BATCHES):
    next(batches)
  seconds = time.perf_counter() - start
  batches.close()
  return _BATCH * _BATCHES / seconds


def _stores_read(path: str, processes: int, options: dict[str, int]) -> float:
  """What so many processes read in an epoch, in sizes of the store."""
  before = _bytes_read()
  for process in range(processes):
    shard_megabytes = _SHARD_ROWS * np.prod(_SHAPE) * 2 / 1e6
    # The window, and a quarter of it for what is read ahead.
    megabytes = 1.25 * shard_megabytes * options["shuffle_shards"]
    batches = reader.LatentBatches(
      reader.Latents(path, cache_megabytes=float(megabytes)),
      batch_size=_BATCH // processes,
      seed=0,
      process_index=process,
      process_count=processes,
      threads=1,
      **options,
    )
    for _ in range(_ROWS // _BATCH - 3):  # it reads three ahead
      next(batches)
    batches.close()
  return (_bytes_read() - before) / (_ROWS * np.prod(_SHAPE) * 2)


def _bytes_read() -> int:
  """By this process, of all stores."""
  metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/")
  return sum(
    value["value"]
    for metric in metrics
    if metric["name"].endswith(("/file/bytes_read", "/gcs/bytes_read"))
    for value in metric["values"]
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--bucket", default="", help="where to fill a store, too")
  options = parser.parse_args()
  flags.FLAGS.mark_as_parsed()  # grain's worker processes want it
  peak = _peak_flops()
  needed = {name: peak / (6 * macs) for name, macs in _MACS.items()}
  print(f"matrix products: {peak / 1e9:.0f} GFLOP/s")
  for name, rate in needed.items():
    print(f"UViT-S, {name}: at most {rate:.1f} images/s")
  print("| store | cache, MB | workers | images/s | times UViT-S's need |")
  print("| --- | --- | --- | --- | --- |")
  with tempfile.TemporaryDirectory() as folder:
    for path in (os.path.join(folder, "store"), options.bucket):
      if not path:
        continue
      _fill(path)
      for workers, cache in ((0, 0), (0, 500), (2, 0), (2, 500)):
        rate = _rate(path, workers, cache)
        ratio = rate / max(needed.values())
        place = "bucket" if "://" in path else "local"
        print(f"| {place} | {cache} | {workers} | {rate:.0f} | {ratio:.0f} |")
    path = options.bucket or os.path.join(folder, "store")
    print("| processes | shuffle_shards | shuffle_streams | stores an epoch |")
    print("| --- | --- | --- | --- |")
    for processes, shards, streams in ((1, 4, 1), (4, 4, 1), (4, 1, 4)):
      shuffling = {"shuffle_shards": shards, "shuffle_streams": streams}
      read = _stores_read(path, processes, shuffling)
      print(f"| {processes} | {shards} | {streams} | {read:.2f} |")


if __name__ == "__main__":
  main()
