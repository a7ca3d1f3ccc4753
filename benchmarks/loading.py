"""How fast training reads JPEGs, against Pillow alone, and how long it waits.

  python -m benchmarks.loading [--photos=FOLDER]

Photographs (the embedded ones, or those of a folder) become JPEGs of 12
megapixels (mosaics, so that their detail is that of photographs) and of the
usual size of ImageNet's. Random-resized crops of 512 px are taken from them in
turns: in a bare loop over Pillow with one thread, and by
`images.TrainingImages`, with one thread and with one worker process. Rates are
per second of a core that is at work, so that other work on the machine counts
for little. Then a small model is trained on each set, as `small_phase1` does it
(a cache keeps what is decoded), and logs how long its steps wait for data.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from absl import flags
from PIL import Image, ImageOps

from dcae_jax.data import batches, crops, decoding, images, sources

_SIDE, _MIN_AREA, _BATCH, _ROUNDS = 512, 0.25, 16, 7
# Name: files, size, photographs in a row and column, batches a round.
_SETS = {
  "12 megapixels": (32, (4000, 3000), 4, 6),
  "ImageNet": (64, (500, 375), 1, 24),
}
_NAMES = 20_000  # of few files: shuffling fewer than 1,000 takes grain longer
_STEPS = 120


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


def _seconds_of_cpus() -> float:
  """Of this process and its workers."""
  seconds = time.process_time()
  for child in multiprocessing.active_children():
    stat = pathlib.Path(f"/proc/{child.pid}/stat").read_text()
    ticks = stat.rpartition(")")[2].split()[11:13]  # of the user, the system
    seconds += sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
  return seconds


def _alone(paths: list[str], boxes: list[crops.Box]) -> float:
  """Images per second of a core, by Pillow in a loop."""
  start, batch = _seconds_of_cpus(), []
  for i, box in enumerate(boxes):
    image = Image.open(paths[i % len(paths)])
    times = decoding.halved(min(box.width, box.height), _SIDE)
    image.draft(None, (image.width // times, image.height // times))
    batch.append(np.asarray(crops.resized_crop(image, box, _SIDE)))
    if len(batch) == _BATCH:
      np.stack(batch)
      batch = []
  return len(boxes) / (_seconds_of_cpus() - start)


def _in_training(
  source: sources.Source, rounds: int, seed: int, workers: int
) -> float:
  """Images per second of a core, as training reads them."""
  loader = images.TrainingImages(
    [(source, 1.0)],
    images.Decoding(),
    images.Cropping("random_resized_crop", _SIDE, _MIN_AREA),
    batches.Reading(_BATCH, workers=workers, threads=1),
    seed=seed,
  )
  next(loader)
  start = _seconds_of_cpus()
  for _ in range(rounds):
    next(loader)
  rate = rounds * _BATCH / (_seconds_of_cpus() - start)
  loader.close()
  before = -1.0
  while time.process_time() - before > 0.005:  # it was reading ahead
    before = time.process_time()
    time.sleep(0.1)
  return rate


def _compare(
  paths: list[str], size: tuple[int, int], rounds: int
) -> dict[str, np.ndarray]:
  """Images per second of a core, in each round."""
  names = [paths[i % len(paths)] for i in range(_NAMES)]
  keys = list(map(str, range(_NAMES)))
  source = sources.listed(names, [0] * _NAMES, keys, [""])
  rates = {"Pillow alone": [], "one thread": [], "one worker": []}
  for seed in range(_ROUNDS):
    rng = np.random.default_rng(seed)
    count = rounds * _BATCH
    boxes = [
      crops.random_box(size, _SIDE, rng, _MIN_AREA) for _ in range(count)
    ]
    rates["Pillow alone"].append(_alone(paths, boxes))
    rates["one thread"].append(_in_training(source, rounds, seed, 0))
    rates["one worker"].append(_in_training(source, rounds, seed, 1))
  return {name: np.array(rate) for name, rate in rates.items()}


def _waits(folder: pathlib.Path, workdir: pathlib.Path) -> float:
  """The part of its steps that a small training run waits for data.

  The median of its logs once the cache is filled.
  """
  options = {
    "data.source.path": folder, "data.source.part": "",
    "evaluation.source.path": folder, "evaluation.source.part": "",
    "evaluation.max_images": 1, "evaluation.every": 0, "steps": _STEPS,
    "lpips.weight": 0.0, "evaluation.metrics": "()",
  }  # fmt: skip
  subprocess.run(
    [sys.executable, "-m", "dcae_jax.main", f"--workdir={workdir}",
     "--config=configs/small_phase1.py",
     *(f"--config.{key}={value}" for key, value in options.items())],
    check=True, stderr=subprocess.DEVNULL,
  )  # fmt: skip
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  logged = [x for x in map(json.loads, lines) if "train/seconds/data" in x]
  parts = ("data", "step", "host")
  times = [[x[f"train/seconds/{part}"] for part in parts] for x in logged[2:]]
  return float(np.median([data / (data + a + b) for data, a, b in times]))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--photos", default="", help="a folder of photographs")
  options = parser.parse_args()
  flags.FLAGS.mark_as_parsed()  # grain's worker processes want it
  print("| JPEGs | read by | images/s and core | of Pillow alone |")
  print("| --- | --- | --- | --- |")
  with tempfile.TemporaryDirectory() as place:
    for i, (name, (count, size, across, rounds)) in enumerate(_SETS.items()):
      folder = pathlib.Path(place, f"set{i}")
      paths = _write(folder, _photographs(options.photos), count, size, across)
      rates = _compare(paths, size, rounds)
      for reader, rate in rates.items():
        part = np.median(rate / rates["Pillow alone"])
        print(f"| {name} | {reader} | {np.median(rate):.1f} | {part:.2f} |")
      waits = _waits(folder, pathlib.Path(place, f"run{i}"))
      print(
        f"| {name} | a small training waits, of a step | | {waits:.1%} |",
        flush=True,
      )


if __name__ == "__main__":
  main()
