import dataclasses
import errno
import io
import json
import logging
import multiprocessing
import os
import pathlib
import platform
import re
import signal
import time

import numpy as np
import pytest
from PIL import Image

from dcae_jax.data import batches, crops, images, sources


def _training(pairs, **changes):
  options = {"seed": 3}
  reading = {"batch_size": 4, "threads": 2}
  for key in [x.name for x in dataclasses.fields(batches.Reading)]:
    if key in changes:
      reading[key] = changes.pop(key)
  cropping = images.Cropping("random_resized_crop", 16, flip=True)
  decoding = changes.pop("decoding", images.Decoding())
  return images.TrainingImages(
    pairs,
    decoding,
    changes.pop("cropping", cropping),
    batches.Reading(**reading),
    **(options | changes),
  )


def _take(iterator, n):
  batches = [next(iterator) for _ in range(n)]
  iterator.close()
  return np.stack([batch["images"] for batch in batches])


@pytest.fixture
def folder(photographs):
  return sources.folder(str(photographs))


@pytest.fixture
def damaged(photographs, tmp_path):
  """Two good images among four that cannot be read."""
  good = sorted(photographs.rglob("*.png"))[:2]
  for i, path in enumerate(good):
    (tmp_path / f"good{i}.png").write_bytes(path.read_bytes())
  buffer = io.BytesIO()
  Image.new("RGB", (64, 64)).save(buffer, "JPEG")
  (tmp_path / "truncated.jpg").write_bytes(buffer.getvalue()[:300])
  (tmp_path / "empty.png").write_bytes(b"")
  (tmp_path / "text.jpg").write_text("not an image")
  Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
  return sources.folder(str(tmp_path))


def test_batches_are_uint8_with_labels(folder):
  iterator = _training([(folder, 1.0)])
  batch = next(iterator)
  iterator.close()
  assert batch["images"].shape == (4, 16, 16, 3)
  assert batch["images"].dtype == np.uint8
  assert set(batch["labels"]) <= {0, 1}


def test_order_crops_and_flips_follow_the_seed(folder):
  a, b = (_take(_training([(folder, 1.0)]), 8) for _ in range(2))
  np.testing.assert_array_equal(a, b)
  assert not np.array_equal(a, _take(_training([(folder, 1.0)], seed=4), 8))


def test_worker_processes_change_nothing(folder):
  pairs = [(folder, 1.0)]
  expected = _take(_training(pairs), 5)
  np.testing.assert_array_equal(_take(_training(pairs, workers=2), 5), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restored_position_goes_on_exactly(folder, workers):
  expected = _take(_training([(folder, 1.0)]), 6)
  first = _training([(folder, 1.0)], workers=workers)
  np.testing.assert_array_equal(_take(first, 3), expected[:3])
  state = json.loads(json.dumps(first.get_state()))
  second = _training([(folder, 1.0)], workers=workers)
  second.set_state(state)
  np.testing.assert_array_equal(_take(second, 3), expected[3:])


def test_processes_share_the_images(folder):
  cropping = images.Cropping("dm_crop", 32)
  options = {"cropping": cropping, "batch_size": 3, "process_count": 2}
  halves = [
    _take(_training([(folder, 1.0)], process_index=i, **options), 2)
    for i in range(2)
  ]
  # One epoch of 12 images: together the two processes saw each of them once.
  seen = {x.tobytes() for half in halves for x in half.reshape(-1, 32, 32, 3)}
  assert len(seen) == 12


def test_epochs_are_shuffled_differently(folder):
  cropping = images.Cropping("dm_crop", 32)
  batches = _take(_training([(folder, 1.0)], cropping=cropping), 6)
  first, second = batches[:3], batches[3:]
  assert {x.tobytes() for x in first.reshape(12, -1)} == {
    x.tobytes() for x in second.reshape(12, -1)
  }
  assert not np.array_equal(first, second)


def test_mixtures_follow_their_weights(tmp_path):
  pairs = []
  for name, value, weight in (("black", 0, 3.0), ("white", 255, 1.0)):
    (tmp_path / name).mkdir()
    for i in range(2):
      image = Image.new("RGB", (20, 20), (value,) * 3)
      image.save(tmp_path / name / f"{i}.png")
    pairs.append((sources.folder(str(tmp_path / name)), weight))
  batches = _take(_training(pairs, batch_size=8), 10)
  assert abs((batches[:, :, 0, 0, 0] == 255).mean() - 0.25) < 0.03


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_and_named_once(
  damaged, workers, caplog, capfd
):
  iterator = _training([(damaged, 1.0)], workers=workers)
  with caplog.at_level(logging.WARNING):
    batches = _take(iterator, 6)
  assert batches.std(axis=(2, 3, 4)).min() > 0  # no blank stand-ins
  assert len(iterator.skipped) == 4
  text = caplog.text + capfd.readouterr().err
  for name in ("truncated.jpg", "empty.png", "text.jpg", "bomb.png"):
    assert text.count(f"/{name}': ") == 1


class _Failing:
  """A source of which storage refuses one image, for a number of times."""

  def __init__(self, source, refusals, error):
    self._source, self._refusals, self._error = source, refusals, error
    self.classes, self.name = source.classes, source.name
    self.key, self.fingerprint = source.key, source.fingerprint

  def __setstate__(self, state):
    self.__dict__ = state
    images._DELAYS = ()  # in a worker, which begins anew

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    if index == 3 and self._refusals:
      self._refusals -= 1
      raise self._error
    return self._source[index]


_REFUSALS = (
  PermissionError(errno.EACCES, "Permission denied"),
  FileNotFoundError(errno.ENOENT, "No such file or directory"),
  RuntimeError("503, the storage's own kind of error"),
)


@pytest.mark.parametrize("error", _REFUSALS, ids=lambda x: type(x).__name__)
def test_what_storage_refuses_for_a_while_changes_nothing(
  folder, error, monkeypatch
):
  monkeypatch.setattr(images, "_DELAYS", (0, 0))
  expected = _take(_training([(folder, 1.0)]), 6)
  found = _take(_training([(_Failing(folder, 2, error), 1.0)]), 6)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("error", _REFUSALS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_storage_refuses_for_long_stops_the_run(
  folder, error, workers, monkeypatch
):
  monkeypatch.setattr(images, "_DELAYS", ())
  failing = _Failing(folder, 10**9, error)
  text = getattr(error, "strerror", None) or "503"
  with pytest.raises(OSError, match=rf"{text}.* run again"):
    _take(_training([(failing, 1.0)], workers=workers), 6)
  with pytest.raises(OSError, match=text):
    list(
      images.evaluation_batches(
        failing,
        images.Decoding(),
        16,
        batches.Reading(4),
        skipped=images.Skipped(),
      )
    )


def test_a_changed_source_is_refused_until_it_is_accepted(photographs):
  before = _training([(sources.folder(str(photographs)), 1.0)])
  state = before.get_state()
  before.set_state(state)
  files = sorted(map(str, photographs.rglob("*.png")))
  after = _training([(sources.Files(files, [0] * 12, files, [""]), 1.0)])
  with pytest.raises(ValueError, match="has changed since") as refused:
    after.set_state(state)
  accepted = re.search(r"data.fingerprint=(\w+)", str(refused.value))[1]
  after.set_state(state, accepted)
  with pytest.raises(ValueError, match="has changed since"):
    after.set_state(state, "0123")
  after.set_state({"next_batch": 3})  # of a run that did not know it


def test_worker_processes_share_no_memory_that_could_be_left(folder):
  before = set(os.listdir("/dev/shm"))
  iterator = _training([(folder, 1.0)], workers=2)
  next(iterator)
  time.sleep(0.2)  # they read ahead
  left = set(os.listdir("/dev/shm")) - before
  iterator.close()
  # Semaphores have names for a moment only.
  assert not [name for name in left if name.startswith("psm_")]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of its malloc")
def test_a_worker_does_not_take_new_memory_for_each_batch(folder):
  cropping = images.Cropping("dm_crop", 256)
  iterator = _training(
    [(folder, 1.0)], cropping=cropping, batch_size=8, workers=1, threads=1
  )
  for _ in range(10):
    next(iterator)
  (worker,) = multiprocessing.active_children()

  def page_faults():
    stat = pathlib.Path(f"/proc/{worker.pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[7])

  before = page_faults()
  pages = sum(next(iterator)["images"].nbytes for _ in range(20)) / 4096
  taken = page_faults() - before
  iterator.close()
  assert taken < 0.2 * pages


def test_a_killed_worker_is_one_line(folder):
  iterator = _training([(folder, 1.0)], workers=1)
  next(iterator)
  for child in multiprocessing.active_children():
    os.kill(child.pid, signal.SIGKILL)
  with pytest.raises(ValueError, match=r"loader process was killed .*-9"):
    _take(iterator, 100)


def test_small_images_are_left_out_without_a_warning(folder, caplog):
  decoding = images.Decoding(min_size=80)
  iterator = _training([(folder, 1.0)], decoding=decoding)
  _take(iterator, 6)
  assert not caplog.text and len(iterator.skipped) == 0


def test_cached_images_are_the_same(folder):
  pairs = [(folder, 1.0)]
  np.testing.assert_array_equal(
    _take(_training(pairs), 8), _take(_training(pairs, cache_megabytes=1), 8)
  )


@pytest.fixture
def large(tmp_path):
  """Smooth JPEGs that may be decoded smaller, one of them damaged, a PNG."""
  for i in range(6):
    height, width = ((300, 407), (361, 280))[i % 2]
    rows, columns = np.mgrid[:height, :width] / 300
    waves = [np.sin(i + 3 * rows + columns), np.cos(3 * columns), rows - 1]
    pixels = np.stack([127 + 100 * wave for wave in waves], -1)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = i + 1  # orientations 1 to 6
    image.save(tmp_path / f"{i}.jpg", quality=95, exif=exif)
  image.save(tmp_path / "6.png")
  path = tmp_path / "5.jpg"
  path.write_bytes(path.read_bytes()[:-900])
  return sources.folder(str(tmp_path))


_CROPPINGS = [
  images.Cropping(kind, 32, min_area=0.05, flip=True) for kind in crops.CROPS
]


def _spy(monkeypatch, *, whole=False):
  """Sizes and times of the reductions that were asked for."""
  asked, original = [], images.image_decoding.decode

  def decode(encoded, decoding, reduction=None):
    def recorded(size):
      times = reduction(size)
      asked.append((size, times, reduction.box))
      return 1 if whole else times

    return original(encoded, decoding, reduction and recorded)

  monkeypatch.setattr(images.image_decoding, "decode", decode)
  return asked


@pytest.mark.parametrize("cropping", _CROPPINGS, ids=lambda x: x.kind)
def test_training_decodes_as_small_as_its_crops_allow(
  large, cropping, monkeypatch
):
  asked = _spy(monkeypatch)
  _take(_training([(large, 1.0)], cropping=cropping), 20)
  assert len(asked) > 60
  for size, times, box in asked:
    assert sorted(size) in ([300, 407], [280, 361])
    least = min(size) if box is None else min(box.width, box.height)
    if cropping.kind == "random_crop":
      assert times == 1
    else:
      assert least >= times * 32 or times == 1
      assert times == 8 or least < 2 * times * 32


@pytest.mark.parametrize("cropping", _CROPPINGS, ids=lambda x: x.kind)
def test_crops_of_reduced_images_show_the_same(large, cropping, monkeypatch):
  found = _take(_training([(large, 1.0)], cropping=cropping), 10)
  _spy(monkeypatch, whole=True)
  expected = _take(_training([(large, 1.0)], cropping=cropping), 10)
  difference = np.abs(found.astype(int) - expected)
  assert difference.mean((2, 3, 4)).max() < 4
  if cropping.kind == "random_crop":
    assert not difference.any()


@pytest.mark.parametrize("cropping", _CROPPINGS, ids=lambda x: x.kind)
def test_how_images_are_loaded_changes_no_crop(large, cropping):
  pairs = [(large, 1.0)]
  expected = _take(_training(pairs, cropping=cropping, threads=1), 15)
  for changes in (
    {"threads": 4},
    {"cache_megabytes": 10},
    {"cache_megabytes": 0.2},  # there is not room for all
  ):
    found = _take(_training(pairs, cropping=cropping, **changes), 15)
    np.testing.assert_array_equal(found, expected)


def test_processes_with_caches_change_no_crop(large):
  options = {"cropping": _CROPPINGS[1], "cache_megabytes": 0.2}
  expected = _take(_training([(large, 1.0)], **options), 15)
  found = _take(_training([(large, 1.0)], workers=2, **options), 15)
  np.testing.assert_array_equal(found, expected)


def test_cached_images_are_decoded_once_for_each_scale(large, monkeypatch):
  asked = _spy(monkeypatch)
  cropping = images.Cropping("dm_crop", 16)
  iterator = _training(
    [(large, 1.0)], cropping=cropping, cache_megabytes=1, threads=1
  )
  _take(iterator, 20)
  assert len(asked) == 6


def test_evaluations_decode_whole_images(large, monkeypatch):
  asked = _spy(monkeypatch)
  (batch,) = images.evaluation_batches(
    large, images.Decoding(), 16, batches.Reading(7), skipped=images.Skipped()
  )
  assert not asked
  image, _ = images.open_image(large, 2, images.Decoding())
  expected = np.asarray(crops.dm_crop(image, 16))
  np.testing.assert_array_equal(batch["images"][2], expected)


def test_sources_without_a_usable_image_are_refused(folder, tmp_path):
  images.check_not_empty(folder, images.Decoding())
  with pytest.raises(ValueError, match=r"none of the 12 .*min_size 500"):
    images.check_not_empty(folder, images.Decoding(min_size=500))
  (tmp_path / "text.jpg").write_text("not an image")
  with pytest.raises(ValueError, match=r"none of the 1 .*text\.jpg"):
    images.check_not_empty(sources.folder(str(tmp_path)), images.Decoding())


def test_evaluation_is_in_order_and_masks_what_is_missing(damaged):
  skipped = images.Skipped()
  shares = [
    list(
      images.evaluation_batches(
        damaged,
        images.Decoding(),
        32,
        batches.Reading(2, process_index=i, process_count=2),
        skipped=skipped,
      )
    )
    for i in range(2)
  ]
  assert len(shares[0]) == len(shares[1]) == 2
  masks = np.stack([[b["mask"] for b in share] for share in shares], -1)
  # bomb, empty, good0, good1, text, truncated, and two past the end
  assert masks.reshape(-1).tolist() == [False] * 2 + [True] * 2 + [False] * 4
  assert len(skipped) == 4
  image = Image.open(damaged.name(2)).convert("RGB")
  np.testing.assert_array_equal(
    shares[0][0]["images"][1], np.asarray(crops.dm_crop(image, 32))
  )


def test_evaluation_stops_at_max_images(folder):
  found = images.evaluation_batches(
    folder,
    images.Decoding(),
    16,
    batches.Reading(4),
    max_images=5,
    skipped=images.Skipped(),
  )
  assert sum(int(batch["mask"].sum()) for batch in found) == 5


def test_unknown_crops_are_refused():
  with pytest.raises(ValueError, match="dm_crop"):
    images.Cropping("centre", 16)
