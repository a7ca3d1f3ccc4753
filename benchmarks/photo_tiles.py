"""Tiles of photographs, split by photograph, for small studies of training.

  python -m benchmarks.photo_tiles --photos=FOLDER --output=FOLDER

Each photograph is halved and cut into squares of its own pixels that do not
overlap. Those of a photograph are either all in `training/` or all in
`held_out/`, which `config.data.source.part` would choose, too. `split.csv` says
which, and how many there are. The same photographs give the same files.
"""

import argparse
import csv
import os
import pathlib
from collections.abc import Iterator
from concurrent import futures

import numpy as np
from PIL import Image

from dcae_jax import errors
from dcae_jax.data import decoding, sources
from dcae_jax.runs import plain_text

HELD_OUT = 0.1  # of the photographs, as in configs/base.py
LEAST_TEXTURE = 12.0  # standard deviation of the luma, of 255


def _tiles(
  image: Image.Image, side: int
) -> Iterator[tuple[int, int, Image.Image]]:
  """Left, top and tile, by rows: a grid in the middle of the halved image.

  Tiles with little texture, such as sky, are left out.
  """
  image = image.reduce(2)
  width, height = image.size
  for top in range(height % side // 2, height - side + 1, side):
    for left in range(width % side // 2, width - side + 1, side):
      tile = image.crop((left, top, left + side, top + side))
      if np.asarray(tile.convert("L")).std() >= LEAST_TEXTURE:
        yield left, top, tile


def cut(photos: str, output: pathlib.Path, side: int, most: int) -> list[tuple]:
  """Writes tiles of `side` pixels, and returns the rows of `split.csv`.

  Of a photograph with more than `most` tiles, that many are taken, evenly
  spread over it. Raises UserError if there are no photographs, one is damaged,
  or `output` exists.
  """
  source = sources.folder(photos)
  if output.exists():
    raise errors.UserError(f"{output} exists; name a folder that does not")
  output.mkdir(parents=True)

  def write(part: str, photographs: sources.Source, i: int) -> tuple:
    key = photographs.key(i)
    try:
      image = decoding.decode(photographs[i].encoded, decoding.Decoding())
    except Exception as error:  # Pillow raises anything
      raise errors.UserError(f"{photographs.name(i)}: {error}") from error
    tiles = list(_tiles(image, side))
    count = min(len(tiles), most)
    for j in range(count):
      left, top, tile = tiles[(2 * j + 1) * len(tiles) // (2 * count)]
      path = output / part / f"{key}_{left}_{top}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      tile.save(path, compress_level=1)
    return key, part, count

  with futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    rows = [
      threads.submit(write, part, photographs, i)
      for part, photographs in zip(
        ("training", "held_out"), sources.split(source, HELD_OUT), strict=True
      )
      for i in range(len(photographs))
    ]
    rows = sorted(row.result() for row in rows)
  with (output / "split.csv").open("w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("photograph", "part", "tiles"))
    writer.writerows((plain_text.escaped(key), *rest) for key, *rest in rows)
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--photos", required=True, help="a tree of them")
  parser.add_argument("--output", required=True, type=pathlib.Path)
  parser.add_argument("--side", type=int, default=256, help="in pixels")
  parser.add_argument("--most", type=int, default=16, help="of a photograph")
  arguments = parser.parse_args()
  try:
    rows = cut(
      arguments.photos, arguments.output, arguments.side, arguments.most
    )
  except errors.UserError as error:
    parser.error(str(error))
  for part in ("training", "held_out"):
    counts = [count for _, of, count in rows if of == part and count]
    print(f"{part}: {sum(counts)} tiles of {len(counts)} photographs")


if __name__ == "__main__":
  main()
