"""How soon a process begins with many images in a bucket, in what memory.

  python -m benchmarks.source_startup [--images=200000]

Tiny images in tars are prepared to record shards; both go to an emulated bucket
on this machine. Then a process opens each kind, holds a part out and reads its
first batch. Memory is what the process has for itself, without files that it
maps: all processes of a machine share the pages of an index.
"""

import argparse
import io
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request

import numpy as np
from etils import epath
from PIL import Image

from configs import base
from dcae_jax.tasks import prepare

_TARS = 10


def write_tars(folder: pathlib.Path, count: int) -> None:
  """Images of 8 px, in a hundred classes."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  for number, part in enumerate(np.array_split(np.arange(count), _TARS)):
    with tarfile.open(folder / f"{number:04d}.tar", "w") as tar:
      for i in part:
        buffer = io.BytesIO()
        pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        info = tarfile.TarInfo(f"class_{i % 100:03d}/image_{i:08d}.png")
        info.size = buffer.tell()
        buffer.seek(0)
        tar.addfile(info, buffer)


def private_megabytes() -> float:
  """Of this process, Linux."""
  lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
  return sum(
    int(line.split()[1]) / 1e3 for line in lines if line.startswith("Anonymous")
  )


def begin(kind: str, path: str, workdir: str) -> None:
  """Prints seconds and megabytes, as JSON."""
  from dcae_jax.data import batches, images
  from dcae_jax.setup import image_sources

  before, start = private_megabytes(), time.monotonic()
  config = base.source(kind, path, part="training")
  weighted = image_sources.weighted_sources(config, epath.Path(workdir))
  iterator = images.TrainingImages(
    weighted,
    images.Decoding(),
    images.Cropping("random_resized_crop", 8),
    batches.Reading(32),
    seed=0,
  )
  next(iterator)
  seconds = time.monotonic() - start
  megabytes = private_megabytes() - before
  print(json.dumps({"seconds": seconds, "megabytes": megabytes}))
  iterator.close()


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--images", type=int, default=200_000)
  parser.add_argument("--begin", nargs=3, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.begin:
    begin(*options.begin)
    return
  from tests import gcs_emulator

  with (
    tempfile.TemporaryDirectory() as directory,
    gcs_emulator.Emulator() as emulator,
  ):
    root, bucket = pathlib.Path(directory), emulator.create("dcae-startup")
    write_tars(root / "tar", options.images)
    c = base.prepare()
    c.source = base.source("tar", str(root / "tar"))
    c.output, c.workers, c.shard_megabytes = str(root / "records"), 2, 16.0
    start = time.monotonic()
    prepare.run(c, epath.Path(root / "prepared"))
    print(f"prepared in {time.monotonic() - start:.0f} s")
    for path in root.glob("*/**/*"):
      if path.is_file() and path.relative_to(root).parts[0] in (
        "tar", "records",
      ):  # fmt: skip
        name = "%2F".join(path.relative_to(root).parts)
        url = f"{emulator.address}/upload/storage/v1/b/dcae-startup/o"
        url += f"?uploadType=media&name={name}"
        urllib.request.urlopen(url, path.read_bytes()).close()
    print("| source | start | seconds | MB | requests |\n" + "| --- " * 5 + "|")
    for kind in ("records", "tar"):
      for when in ("first", "later"):
        emulator.forget()
        place = [kind, f"{bucket}/{kind}", str(root / f"{kind}_run")]
        command = [sys.executable, "-m", "benchmarks.source_startup", "--begin"]
        said = subprocess.run(
          [*command, *place],
          env=emulator.environment,
          check=True,
          stdout=subprocess.PIPE,
        ).stdout
        found = json.loads(said.decode().splitlines()[-1])
        print(
          f"| {kind} | {when} | {found['seconds']:.1f} | "
          f"{found['megabytes']:.0f} | {len(emulator.requests)} |",
          flush=True,
        )


if __name__ == "__main__":
  main()
