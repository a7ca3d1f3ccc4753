"""Pictures for people."""

import sys

import numpy as np
import pytest

from dcae_jax.evaluation.report import figures


def test_error_map_is_black_where_equal_and_white_at_64():
  image = np.full((2, 2, 3), 100, np.uint8)
  other = image + np.array([[0, 8], [32, 64]], np.uint8)[..., None]
  found = figures.error_map(image, other)
  assert found[0, 0].tolist() == [0, 0, 0]
  assert found[1, 1].tolist() == [255, 255, 255]
  assert 0 < found[0, 1, 0] < 255 and found[0, 1, 1:].tolist() == [0, 0]
  assert figures.error_map(image[..., :1], other[..., :1]).shape == (2, 2, 3)


def test_detailed_window_finds_the_edges():
  image = np.zeros((64, 96, 3), np.uint8)
  image[40:52:2, 60:80] = 255
  rows, columns = figures.detailed_window(image)
  assert (rows.stop - rows.start, columns.stop - columns.start) == (16, 24)
  assert rows.start <= 40 and rows.stop + 8 >= 52
  assert columns.start <= 66 <= columns.stop


def test_latent_channels_are_a_grid_of_grey_pictures():
  z = np.random.default_rng(0).normal(size=(4, 8, 21)).astype("float32")
  picture = figures.latent_channels(z)
  assert picture.shape == (2 * (32 + 4) + 4, 16 * (64 + 4) + 4, 3)
  assert figures.latent_channels(np.zeros((1, 1, 1))).shape == (72, 72, 3)


def test_grid_shows_every_image_in_its_place():
  rows = [np.full((3, 20, 6, 3), 10 * i, np.uint8) for i in range(2)]
  found = figures.grid(rows)
  assert found.shape == (2 * (20 + 4) + 4, 3 * (6 + 4) + 4, 3)
  for i in range(2):
    assert np.all(found[4 + i * 24 : 24 + i * 24, 4:10] == 10 * i)
  labelled = figures.grid(rows, ["a", "longer label"])
  assert labelled.shape[1] > found.shape[1]
  np.testing.assert_array_equal(
    labelled[:, -found.shape[1] + 4 :][:, :6], found[:, 4:10]
  )


def test_grey_images_make_a_grid():
  assert figures.grid([np.zeros((1, 20, 8, 1), np.uint8)]).shape == (28, 16, 3)
  # The only class of a flat folder has an empty name.
  assert figures.grid([np.zeros((1, 20, 8, 1), np.uint8)], [""]).shape[0] == 28


def test_headings_stand_above_their_columns():
  rows = [np.zeros((3, 40, 40, 3), np.uint8)] * 2
  plain, headed = figures.grid(rows), figures.grid(rows, headings={1: "title"})
  head = len(headed) - len(plain)
  np.testing.assert_array_equal(headed[head:], plain)
  dark = np.flatnonzero((headed[:head] < 128).any(axis=(0, 2)))
  assert head and 40 < dark.min() < 60  # where the second column begins


def test_reduced_images_keep_their_means_and_small_ones_their_pixels():
  image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  found = figures.reduced(image, 16)
  assert found.shape == (16, 16, 3)
  means = image.reshape(16, 4, 16, 4, 3).mean((1, 3))
  np.testing.assert_allclose(found, means, atol=1.01)  # rounded twice
  assert figures.reduced(image, 64) is image


def test_labels_are_read_whole_or_end_with_an_ellipsis():
  font = figures._font(13)
  for text, whole in (("dog", True), ("ein größerer Hund " * 40, False)):
    lines = figures._wrapped(text, font, 120, 3).split("\n")
    assert len(lines) <= 3 and all(font.getlength(x) < 140 for x in lines)
    assert lines[-1].endswith("…") != whole
  assert figures._wrapped("a\x1b[2J", font, 120, 3) == r"a\x1b[2J"
  small = [np.zeros((2, 16, 16, 3), np.uint8)] * 2
  plain = figures.grid(small, ["a", "b"])
  named = figures.grid(small, ["a long name " * 9, "b"])
  assert named.shape[0] - plain.shape[0] == 2 * (51 - 17)  # three lines a row
  assert (named[:, :4] == 255).all()


def test_headings_of_neighbours_do_not_overlap():
  row = np.full((3, 16, 16, 3), 255, np.uint8)
  words = {1: "guidance 1", 2: "guidance 1.25", 0: "training"}
  together = figures.grid([row], headings=words)
  across = (together.shape[1] - 4) // 3
  for column, text in words.items():
    alone = figures.grid([row[:1]], headings={0: text})
    ink = (alone < 128).any(axis=(0, 2)).sum()
    part = together[:, 4 + column * across :][:, :across]
    assert (part < 128).any(axis=(0, 2)).sum() == ink
    assert (part[:, -4:] == 255).all()
    assert len(alone) <= 16 + 3 * 4 + 2 * 17  # no word is broken


def test_accents_are_letters():
  """Pillow's own font has the same box for all of them."""
  row = np.zeros((1, 16, 16, 3), np.uint8)
  pictures = [figures.grid([row], [text]).tobytes() for text in "éüß"]
  assert len(set(pictures)) == 3


def test_a_picture_of_errors_has_the_bar_of_its_colours():
  original = np.full((16, 24, 3), 100, np.uint8)
  other = original + np.uint8(16)
  found = figures.error_picture(original, other)
  assert found.shape[1] == 11 * 24  # whole pixels, and room for words
  color = figures.error_map(original, other)[0, 0]
  assert (found[: 11 * 16] == color).all()
  bar = found[11 * 16 + 4 + 3]  # a quarter along is 16 of 64
  assert bar[len(bar) // 4].tolist() == pytest.approx(color.tolist(), abs=12)
  assert bar[2].max() < 16 and bar[-2].min() > 240
  words = found[11 * 16 + 16 :]
  assert (words.min(axis=(1, 2)) < 64).sum() > 12


def test_pictures_have_labels_without_matplotlib(monkeypatch):
  row = np.full((1, 40, 40, 3), 255, np.uint8)
  before = figures.grid([row], ["label"])
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  figures._font.cache_clear()
  found = figures.grid([row], ["label"])
  figures._font.cache_clear()
  assert (found < 128).any() and not np.array_equal(found, before)
