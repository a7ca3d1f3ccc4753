"""Exports whose encoder is the identity: places of rows, gaps, kills."""

import itertools
import random
import shutil
import types

import jax
import numpy as np
import pytest
import tensorstore

import dcae_jax
from dcae_jax.data import images
from dcae_jax.latents import export as latent_export
from dcae_jax.latents import layout, placement, reader, rows
from dcae_jax.latents import store as latent_store
from dcae_jax.runs import resumable, stopwatch, storage

SHAPE = (2, 2, 3)
IMAGES = 70
UNUSABLE = {
  "none": [],
  "the first": [0],
  "the last": [69],
  "one of the middle": [33],
  "a block": range(16, 32),
  "the last block": range(64, 70),
  "more than a block, and others": [2, 3, *range(15, 50), 60, 69],
  "all but one": [*range(45), *range(46, 70)],
}


class _Source:
  """Image i has the label i."""

  classes = ("one",)

  def key(self, index):
    return f"key {index}"

  def name(self, index):
    return f"image {index}"


class _Rows:
  """Rows that tell their image and their crop."""

  conditions = layout.LABELS | layout.CAPTIONS
  description = types.MappingProxyType({})

  def __init__(self, unusable=(), per_image=1):
    self.source, self.per_image = _Source(), per_image
    self.unusable, self.loaded = set(unusable), []

  def load(self, index, crops):
    self.loaded.append(index)
    if index in self.unusable:
      raise images.UnusableError(f"bad {index}")
    conditions = {"labels": index, "captions": f"ä {index}"}
    return [
      rows.Row(np.full(SHAPE, index + i / 32, np.float32), conditions)
      for i in crops
    ]

  def zeros(self, count):
    return np.zeros((count, *SHAPE), np.float32)


def _export(path, made, **changes) -> latent_export.Export:
  dtype = layout.DTYPES[changes.get("dtype", "float32")]
  fields = {
    "images": IMAGES, "shape": SHAPE, "dtype": "float32",
    "views": layout.VIEWS, "group_size": 4, "shard_rows": 0, "threads": 2,
    "encoder": lambda size: lambda x: {
      "latents": x.astype(dtype), "latents_flipped": (-x).astype(dtype)
    },
  }  # fmt: skip
  store = latent_store.LatentStore(str(path))
  return latent_export.Export(store, made, **(fields | changes))


@pytest.fixture(autouse=True)
def _without_waiting_for_disks(monkeypatch):
  """Hundreds of small files are written; no machine loses its power here."""
  create = tensorstore.Context
  monkeypatch.setattr(
    tensorstore, "Context", lambda spec: create(spec | {"file_io_sync": False})
  )


@pytest.fixture(scope="module")
def run(tiny_autoencoder):
  """A function: exports as the task does."""
  ae = dcae_jax.load(tiny_autoencoder)

  def run_export(export):
    store, identity = export.store, {"images": export.images}
    store.check_writable()
    store.check_identity(identity, begun=False)
    store.write_identity(identity)
    if store.manifest() is not None:
      store.remove_progress()
      return
    work = resumable.Work("latents", lambda: False)
    plan = export.fill(work, stopwatch.Stopwatch())
    export.finish(plan, ae, "given", identity | {"shift_factor": 0.0})

  return run_export


def _objects(path) -> dict[str, bytes]:
  place = storage.Storage(str(path))
  return {key: place.read(key) for key in place.list_keys()}


def _check(path, made, dtype="float32") -> None:
  """All rows of usable images, and no others, in their order."""
  source = reader.Latents(str(path))
  good = [i for i in range(IMAGES) if i not in made.unusable]
  expected = [i for i in good for _ in range(made.per_image)]
  assert source.condition("labels").tolist() == expected
  assert source.condition("captions").tolist() == [f"ä {i}" for i in expected]
  assert source.keys() == [f"key {i}" for i in expected]
  count = len(expected)
  crops = np.tile(np.arange(made.per_image), len(good))
  values = (np.array(expected) + crops / 32).astype(layout.DTYPES[dtype])
  values = values.astype(np.float32)
  found = source.read_unscaled(np.arange(2 * count))
  np.testing.assert_array_equal(
    found,
    np.broadcast_to(
      np.concatenate([values, -values])[:, None, None, None],
      (2 * count, *SHAPE),
    ),
  )
  assert source.verify() == []
  assert source.manifest["unreadable"] == [
    {"index": i, "key": f"key {i}", "reason": f"bad {i}"}
    for i in sorted(made.unusable)
  ]
  mean = source.manifest["statistics"]["mean"]
  np.testing.assert_allclose(mean, 0, atol=1e-9)
  described = layout.Layout(
    count, SHAPE, dtype, layout.VIEWS, source.manifest["shard_rows"],
    made.conditions,
  )  # fmt: skip
  objects = map(described.objects, range(described.shards))
  expected = {"manifest.json", *described.metadata_keys}.union(*objects)
  assert _objects(path).keys() == expected


@pytest.mark.parametrize("unusable", UNUSABLE.values(), ids=UNUSABLE)
def test_rows_close_up_and_each_image_is_loaded_once(run, unusable, tmp_path):
  made = _Rows(unusable)
  run(_export(tmp_path, made))
  _check(tmp_path, made)
  assert sorted(made.loaded) == list(range(IMAGES))


@pytest.mark.parametrize(
  "changes",
  [
    {"dtype": "bfloat16"},
    {"shard_rows": 32},
    {"shard_rows": 128, "dtype": "float16"},
    {"group_size": 100},
  ],
)
@pytest.mark.parametrize("per_image", [1, 3, 24])
def test_several_crops_and_other_shards_close_up(
  run, changes, per_image, tmp_path
):
  made = _Rows([0, 5, 20, 21, 22, 69], per_image)
  run(_export(tmp_path, made, **changes))
  _check(tmp_path, made, changes.get("dtype", "float32"))


def test_the_size_of_shards_is_that_of_the_usable_images(run, tmp_path):
  """1100 make shards of 32, and 1000 of 16."""
  made = _Rows(range(100))
  run(_export(tmp_path, made, images=1100))
  manifest = reader.Latents(str(tmp_path)).manifest
  assert manifest["shard_rows"] == 16 and len(manifest["shards"]) == 63
  alone = _Rows()
  run(_export(tmp_path / "alone", alone, images=1000))
  names = _objects(tmp_path / "alone").keys()
  found = {x for x in _objects(tmp_path) if not x.startswith("alone/")}
  assert found == names


def test_an_image_whose_crops_fill_groups_is_loaded_for_each(run, tmp_path):
  made = _Rows(per_image=8)
  run(_export(tmp_path, made, images=4))
  assert sorted(made.loaded) == [0, 0, 1, 1, 2, 2, 3, 3]
  made.loaded.clear()
  run(_export(tmp_path / "b", made, images=4, group_size=8))
  assert sorted(made.loaded) == [0, 1, 2, 3]


@pytest.mark.parametrize("first", [False, True])
def test_an_image_that_changes_while_it_is_read_stops(run, first, tmp_path):
  made = _Rows(per_image=8)
  load = made.load

  def changing(index, crops):
    if index == 3 and (crops[0] == 0) == first:
      raise images.UnusableError("cut")
    return load(index, crops)

  made.load = changing
  with pytest.raises(ValueError, match=r"image 3 changed while .* \(cut\)"):
    run(_export(tmp_path, made))
  del made.load
  run(_export(tmp_path, made))
  _check(tmp_path, made)


def test_an_image_that_breaks_between_two_shards_has_no_rows(run, tmp_path):
  """Its crops of the first were encoded already."""
  made = _Rows(per_image=3)
  load = made.load

  def changing(index, crops):
    if index == 5 and crops[0]:  # its row 15 is the last of a shard
      raise images.UnusableError("bad 5")
    return load(index, crops)

  made.load = changing
  run(_export(tmp_path, made))
  made.unusable = {5}
  _check(tmp_path, made)


class _Killed(BaseException):
  """As a kill: nothing catches it."""


@pytest.fixture
def limit(monkeypatch):
  """A function: lets so many writes and removals happen, and none after."""
  left = [10**9]

  def limited(original):
    def change(self, *arguments):
      left[0] -= 1
      if left[0] < 0:
        raise _Killed
      return original(self, *arguments)

    return change

  for name in ("write", "write_rows", "delete_all"):
    original = getattr(storage.Storage, name)
    monkeypatch.setattr(storage.Storage, name, limited(original))

  def set_limit(number=10**9):
    left[0] = number

  return set_limit


def _killed(run, export) -> bool:
  try:
    run(export)
  except _Killed:
    return True
  return False


# All kinds of shards: as they were, moved, empty, gone.
_SOME = [20, 21, *range(32, 48), 69]


def test_killed_before_any_change_it_ends_equal(run, limit, tmp_path):
  run(_export(tmp_path / "whole", _Rows(_SOME), threads=1))
  expected = _objects(tmp_path / "whole")
  for number in itertools.count(step=7):  # 1 does, too, in half a minute
    path, made = tmp_path / str(number), _Rows(_SOME)
    limit(number)
    if not _killed(run, _export(path, made)):
      break
    limit()
    run(_export(path, made))
    assert _objects(path) == expected, number
  assert number > 60


@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again_it_ends_equal(run, seed, limit, tmp_path):
  """Nothing that was finished is loaded again."""
  run(_export(tmp_path / "whole", _Rows(_SOME)))
  rng, starts = random.Random(seed), 0
  path, made = tmp_path / "out", _Rows(_SOME)
  export = _export(path, made)
  while True:
    there = export.store.storage
    records = len(there.list_keys("progress/shards/")) if path.exists() else 0
    empty = len(export.store.empty()) if path.exists() else 0
    made.loaded.clear()
    limit(rng.randrange(4, 30))
    if not _killed(run, export):
      break
    finished = 16 * (records + empty)
    assert len(set(made.loaded)) <= max(IMAGES - finished, 0) + 10
    starts += 1
    assert starts < 100
  limit()
  assert starts > 2
  assert _objects(path) == _objects(tmp_path / "whole")


@pytest.fixture
def moved(run, tmp_path, monkeypatch):
  """A function: an export that is killed when all rows have moved.

  Before a stage of `placement.Closing`; images 3 and 40 are unusable.
  """

  def kill(*_):
    raise _Killed

  def create(stage):
    made, path = _Rows([3, 40]), tmp_path / "out"
    with monkeypatch.context() as patch:
      patch.setattr(placement.Closing, stage, kill)
      assert _killed(run, _export(path, made))
    return path, made

  return create


def test_a_wrong_bit_of_what_has_moved_is_noticed(run, moved, tmp_path):
  path, made = moved("replace")
  files = [x for x in (path / "progress").rglob("*") if x.is_file()]
  run(_export(shutil.copytree(path, tmp_path / "whole"), made))
  expected = _objects(tmp_path / "whole")
  for i, file in enumerate(sorted(files)[::3]):
    copy = shutil.copytree(path, tmp_path / str(i))
    damaged = copy / file.relative_to(path)
    data = bytearray(damaged.read_bytes())
    data[random.Random(i).randrange(len(data))] ^= 1
    damaged.write_bytes(data)
    try:
      run(_export(copy, made))
    except (ValueError, OSError):
      continue
    if _objects(copy) != expected:
      assert reader.Latents(str(copy)).verify(), file
  assert len(files) > 30
  for name in ("zarr.json", "keys/zarr.json"):  # which only zarr reads
    copy = shutil.copytree(path, tmp_path / name.replace("/", "_"))
    (copy / "progress/moved" / name).write_text("{}")
    run(_export(copy, made))
    assert _objects(copy) == expected


def test_what_is_encoded_again_moves_again(run, moved):
  """An image was mended, where a shard was lost."""
  path, made = moved("begin_replacing")
  (path / "labels/c/0").unlink()
  made.unusable = {40}
  made.loaded.clear()
  run(_export(path, made))
  assert sorted(made.loaded) == list(range(16))
  _check(path, made)


def test_an_export_of_an_earlier_version_goes_on(run, limit, tmp_path):
  """It had listed the unusable images first, and numbered only the others."""
  unusable = [3, 40, 41]
  run(_export(tmp_path / "new", _Rows(unusable)))
  path, made = tmp_path / "out", _Rows(unusable)
  place = storage.Storage(str(path))
  place.write_sealed_json("progress/identity.json", {
    "format": "dcae_jax.latents", "format_version": 1, "images": IMAGES,
  })  # fmt: skip
  for block in range(5):
    part = range(16 * block, 16 * block + 16)
    place.write_sealed_json(
      f"progress/survey/{block:06d}.json",
      {str(i): f"bad {i}" for i in unusable if i in part},
    )
  number = 20
  while not len(
    _export(path, made).store.storage.list_keys("progress/shards/")
  ):
    limit(number)
    assert _killed(run, _export(path, made))
    number += 1
  limit()
  made.loaded.clear()
  run(_export(path, made))
  assert 16 <= len(made.loaded) < 67 and not made.unusable & set(made.loaded)
  _check(path, made)
  assert _objects(path) == _objects(tmp_path / "new")


def test_a_place_that_is_full_while_rows_move_is_named(
  run, tmp_path, monkeypatch
):
  made, free = _Rows([3]), iter([10**9, 100])
  with monkeypatch.context() as patch:
    patch.setattr(storage.Storage, "free_bytes", lambda self: next(free))
    with pytest.raises(ValueError, match="no space left for latents"):
      run(_export(tmp_path, made))
  made.loaded.clear()
  run(_export(tmp_path, made))
  assert not made.loaded
  _check(tmp_path, made)


def test_strings_that_are_damaged_do_not_move(run, tmp_path, monkeypatch):
  made, free = _Rows([3]), iter([10**9, 100])
  with monkeypatch.context() as patch:
    patch.setattr(storage.Storage, "free_bytes", lambda self: next(free))
    with pytest.raises(ValueError, match="no space left"):
      run(_export(tmp_path, made))
  file = tmp_path / "captions/c/1"
  file.write_bytes(file.read_bytes().replace(b"20", b"21"))
  with pytest.raises(
    ValueError, match=r"captions/c/1 is damaged: .* run again"
  ):
    run(_export(tmp_path, made))
  file.unlink()
  run(_export(tmp_path, made))
  _check(tmp_path, made)


def test_nothing_that_can_be_used_is_named(run, tmp_path):
  made = _Rows(range(IMAGES))
  with pytest.raises(
    ValueError, match=r"none of the 70 images can be used; the first: .* bad 0"
  ):
    run(_export(tmp_path, made))
  assert len(jax.local_devices()) > 1  # batches of groups without rows
