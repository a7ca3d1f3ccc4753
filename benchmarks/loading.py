"""How fast training reads JPEGs, against Pillow alone, and how long it waits.

  python -m benchmarks.loading [--photos=FOLDER]

Photographs (the embedded ones, or those of a folder) become JPEGs of 12
megapixels (mosaics, so that their detail is that of photographs) and of the
usual size of ImageNet's. One core takes random-resized crops of 512 px from
them in turns: a bare loop over Pillow, and the same crops by
`images.TrainingImages`, in a thread and in a worker process. Then a small model
trains on each, without a cache, and says how long its steps wait for data.
"""

import argparse
import io
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from absl import flags
from PIL import Image, ImageOps

from dcae_jax.data import batches, crops, decoding, images, sources

_SIDE, _MIN_AREA, _BATCH = 512, 0.25, 16
_ROUNDS = 7
# Name: files, size, photographs in a row and column, batches a round.
_SETS = {
  "12 megapixels": (32, (4000, 3000), 4, 6),
  "ImageNet": (64, (500, 375), 1, 24),
}


def _photographs(photos: str) -> Iterator[Image.Image]:
  """Without end."""
  source = sources.folder(photos) if photos else sources.embedded("train")
  while True:
    for i in range(len(source)):
      yield decoding.decode(source[i].encoded, decoding.Decoding())


def _write(
  folder: pathlib.Path,
  photographs: Iterator[Image.Image],
  count: int,
  size: tuple[int, int],
  across: int,
) -> list[str]:
  """JPEGs of that size, each of `across` times as many photographs."""
  folder.mkdir()
  width, height = (side // across for side in size)
  files = []
  for i in range(count):
    mosaic = Image.new("RGB", size)
    for left in range(0, size[0], width):
      for top in range(0, size[1], height):
        photograph = ImageOps.fit(next(photographs), (width, height))
        mosaic.paste(photograph, (left, top))
    mosaic.save(folder / f"{i}.jpg", quality=90)
    files.append(str(folder / f"{i}.jpg"))
  return files


class _Clock:
  """Seconds on the clock and of CPUs, of this process and its children."""

  def __init__(self):
    self._begin = self._now()

  def _now(self) -> np.ndarray:
    cpu = [time.process_time(), 0.0]
    for child in multiprocessing.active_children():
      stat = pathlib.Path(f"/proc/{child.pid}/stat").read_text().split()
      cpu[1] += (int(stat[13]) + int(stat[14])) / os.sysconf("SC_CLK_TCK")
    return np.array([time.perf_counter(), *cpu])

  def seconds(self) -> np.ndarray:
    return self._now() - self._begin


def _alone(paths: list[str], boxes: list[crops.Box]) -> np.ndarray:
  """Seconds per image of Pillow in a loop."""
  clock = _Clock()
  batch = []
  for i, box in enumerate(boxes):
    image = Image.open(paths[i % len(paths)])
    times = decoding.halved(min(box.width, box.height), _SIDE)
    image.draft(None, (image.width // times, image.height // times))
    image = crops.resized_crop(image, box, _SIDE)
    batch.append(np.asarray(image))
    if len(batch) == _BATCH:
      np.stack(batch)
      batch = []
  return clock.seconds() / len(boxes)


def _trained_on(
  source: sources.Source, rounds: int, seed: int, workers: int
) -> np.ndarray:
  """Seconds per image of what training reads, after the first batch."""
  loader = images.TrainingImages(
    [(source, 1.0)],
    images.Decoding(),
    images.Cropping("random_resized_crop", _SIDE, _MIN_AREA),
    batches.Reading(_BATCH, workers=workers, threads=1),
    seed=seed,
  )
  next(loader)
  clock = _Clock()
  for _ in range(rounds):
    next(loader)
  seconds = clock.seconds() / (rounds * _BATCH)
  loader.close()
  before = -1.0
  while time.process_time() - before > 0.005:  # it was reading ahead
    before = time.process_time()
    time.sleep(0.1)
  return seconds


def _compare(
  folder: pathlib.Path, paths: list[str], size: tuple[int, int], rounds: int
) -> None:
  source = sources.folder(str(folder))
  found = {"a": [], "thread": [], "worker": []}
  for seed in range(_ROUNDS):
    rng = np.random.default_rng(seed)
    boxes = [
      crops.random_box(size, rng, _MIN_AREA) for _ in range(rounds * _BATCH)
    ]
    found["a"].append(_alone(paths, boxes))
    for name, workers in (("thread", 0), ("worker", 1)):
      found[name].append(_trained_on(source, rounds, seed, workers))
  t = {k: np.array(v) * 1e3 for k, v in found.items()}
  for k, v in t.items():
    print(
      k, np.median(v, 0).round(2), v.min(0).round(2),
      np.median(t["a"] / v, 0).round(3),
      np.median(t["a"][:, 1] / v[:, 1:].sum(1)).round(3),
      (t["a"].sum(0) / v.sum(0)).round(3),
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--photos", default="", help="a folder of photographs")
  options = parser.parse_args()
  flags.FLAGS.mark_as_parsed()  # grain's worker processes want it
  with tempfile.TemporaryDirectory() as place:
    for name, (count, size, across, rounds) in _SETS.items():
      folder = pathlib.Path(place, name.split()[0])
      files = _write(folder, _photographs(options.photos), count, size, across)
      print(name)
      _compare(folder, files, size, rounds)


if __name__ == "__main__":
  main()
