"""The tiles that the studies train on."""

import csv

import numpy as np
import pytest
from PIL import Image

from benchmarks import photo_tiles
from dcae_jax import errors
from dcae_jax.data import sources


@pytest.fixture
def photos(tmp_path):
  """24 of noise, and one whose left half is plain."""
  rng = np.random.default_rng(0)
  for i in range(25):
    pixels = rng.integers(0, 256, (40, 68, 3), dtype=np.uint8)
    pixels = np.kron(pixels, np.ones((4, 4, 1), np.uint8))  # 272 x 160
    if i == 24:
      pixels[:, :136] = 99
    folder = tmp_path / "photos" / f"class{i % 2}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{i}.png")
  return tmp_path / "photos"


def _files(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*.*")
  }


def test_tiles_are_squares_of_the_halved_photograph(photos, tmp_path):
  photo_tiles.cut(str(photos), tmp_path / "tiles", 32, 99)
  halved = Image.open(photos / "class1/3.png").reduce(2)
  found = sorted(tmp_path.glob("tiles/*/class1/3.png_*.png"))
  assert len(found) == 4 * 2  # of 136 x 80
  for path in found:
    left, top = map(int, path.stem.split("_")[1:])
    assert (left - 4) % 32 == 0 and (top - 8) % 32 == 0
    expected = halved.crop((left, top, left + 32, top + 32))
    np.testing.assert_array_equal(Image.open(path), expected)


def test_plain_tiles_are_left_out(photos, tmp_path):
  photo_tiles.cut(str(photos), tmp_path / "tiles", 32, 99)
  found = tmp_path.glob("tiles/*/class0/24.png_*.png")
  lefts = {int(path.stem.split("_")[1]) for path in found}
  assert lefts == {68, 100}


def test_the_split_is_that_of_the_part_of_a_source(photos, tmp_path):
  rows = photo_tiles.cut(str(photos), tmp_path / "tiles", 32, 3)
  assert {count for *_, count in rows} == {3}
  parts = sources.split(sources.folder(str(photos)), photo_tiles.HELD_OUT)
  for part, photographs in zip(("training", "held_out"), parts, strict=True):
    keys = {photographs.key(i) for i in range(len(photographs))}
    assert keys == {key for key, of, _ in rows if of == part}
    tiles = sources.folder(str(tmp_path / "tiles" / part))
    names = [tiles.key(i) for i in range(len(tiles))]
    assert keys == {name.rsplit("_", 2)[0] for name in names}
    assert len(names) == 3 * len(keys)
  with (tmp_path / "tiles/split.csv").open(newline="") as file:
    written = [tuple(row.values()) for row in csv.DictReader(file)]
  assert written == [(key, part, str(count)) for key, part, count in rows]


def test_a_limit_spreads_the_tiles_over_the_photograph(photos, tmp_path):
  photo_tiles.cut(str(photos), tmp_path / "tiles", 32, 2)
  found = tmp_path.glob("tiles/*/class1/3.png_*.png")
  assert {path.stem.split("_")[2] for path in found} == {"8", "40"}


def test_the_same_photographs_give_the_same_files(photos, tmp_path):
  photo_tiles.cut(str(photos), tmp_path / "a", 32, 3)
  photo_tiles.cut(str(photos), tmp_path / "b", 32, 3)
  assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_a_folder_that_exists_is_left_alone(photos, tmp_path):
  with pytest.raises(errors.UserError, match="exists"):
    photo_tiles.cut(str(photos), tmp_path, 32, 3)
