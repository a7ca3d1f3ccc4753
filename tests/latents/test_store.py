"""The latent store and its readers, filled by hand: no autoencoder."""

import collections
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import zarr

from dcae_jax.latents import layout as store_layout
from dcae_jax.latents import reader
from dcae_jax.latents import store as latent_store
from dcae_jax.runs import storage

SHAPE = (2, 2, 3)
SHARD_ROWS = 16


def _values(
  rows: int, view: str, dtype: str = "float32", shape=SHAPE
) -> np.ndarray:
  rng = np.random.default_rng(store_layout.VIEWS.index(view))
  values = rng.normal(1.5, 4, (rows, *shape))
  return values.astype(store_layout.DTYPES[dtype])


def make_store(
  path,
  rows=40,
  dtype="float32",
  views=("latents",),
  shift_factor=0.0,
  shape=SHAPE,
  **described,
) -> latent_store.LatentStore:
  """A finished store; the label of a row is its number."""
  store = latent_store.LatentStore(str(path), retries=2)
  store.check_writable()
  store.write_identity({"resolution": 16})
  layout = store_layout.Layout(rows, shape, dtype, tuple(views), SHARD_ROWS)
  store.create_arrays(layout)
  for shard in reversed(range(layout.shards)):
    part = slice(shard * SHARD_ROWS, min(rows, (shard + 1) * SHARD_ROWS))
    numbers = np.arange(rows)[part]
    store.write_shard(
      layout,
      shard,
      {view: _values(rows, view, dtype, shape)[part] for view in views}
      | {"labels": numbers},
      [f"ünicode/{i}.png" for i in numbers],
      {"moments": {"mean": [0.0]}},
    )
  assert store.finished(layout) == list(range(layout.shards))
  store.finish(
    layout,
    {
      "resolution": 16, "classes": ["one"], "scaling_factor": 0.25,
      "shift_factor": shift_factor, **described,
    },
  )  # fmt: skip
  return store


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
  path = tmp_path_factory.mktemp("store") / "two views"
  make_store(path, views=store_layout.VIEWS, shift_factor=0.5)
  return str(path)


@pytest.mark.parametrize("dtype", store_layout.DTYPES)
def test_plain_zarr_reads_the_store(dtype, tmp_path):
  make_store(tmp_path / "store", dtype=dtype)
  group = zarr.open_group(tmp_path / "store", mode="r")
  found, expected = group["latents"], _values(40, "latents", dtype)
  assert found.attrs["dtype"] == dtype
  assert found.shards == (SHARD_ROWS, *SHAPE)
  values = found[:]
  if dtype == "bfloat16":  # of which zarr has the bits
    values = values.view(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(values, expected)
  np.testing.assert_array_equal(group["labels"][:], np.arange(40))
  assert list(group["keys"][:]) == [f"ünicode/{i}.png" for i in range(40)]


def test_nothing_but_arrays_and_the_manifest_is_left(path):
  names = {entry.name for entry in pathlib.Path(path).iterdir()}
  arrays = {*store_layout.VIEWS, "labels", "keys"}
  assert names == arrays | {"manifest.json", "zarr.json"}


def test_rows_come_scaled_and_mirrored_ones_last(path):
  source = reader.Latents(path)
  assert len(source) == 80 and source.shape == SHAPE
  views = [_values(40, view) for view in store_layout.VIEWS]
  expected = (np.concatenate(views) - np.float32(0.5)) * np.float32(0.25)
  rows = [79, 3, 40, 3, 0]
  found = source.read(rows)
  np.testing.assert_array_equal(found["latents"], expected[rows])
  assert found["labels"].tolist() == [39, 3, 0, 3, 0]
  one = source[41]
  np.testing.assert_array_equal(one["latents"], expected[41])
  assert one["labels"] == 1 and one["latents"].dtype == np.float32
  np.testing.assert_array_equal(
    source.read_unscaled([5, 45]), np.stack([views[0][5], views[1][5]])
  )
  assert source.keys()[7] == "ünicode/7.png"
  for row in (80, -1):
    with pytest.raises(IndexError, match=f"row {row} of 80"):
      source[row]


def test_each_channel_is_normalised_by_its_own_statistics(tmp_path):
  """Where the store has them; an older one is refused in one line."""
  channels = {"mean": [1.0, -2.0, 3.0], "std": [4.0, 0.5, 2.0]}
  numbers = {"mean": 0.0, "std": 1.0, "rms": 1.0}
  statistics = numbers | {"channels": channels | {"rms": [1.0] * 3}}
  make_store(tmp_path / "store", statistics=statistics)
  source = reader.Latents(tmp_path / "store", normalisation="channels")
  values = source.read_unscaled([3, 5])
  found = source.read([3, 5])["latents"]
  expected = (values - np.float32([1, -2, 3])) / np.float32([4, 0.5, 2])
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  plain = reader.Latents(tmp_path / "store").read([3])["latents"]
  np.testing.assert_array_equal(plain, values[:1] * np.float32(0.25))
  make_store(tmp_path / "none")
  statistics["channels"].update(std=[4.0, 0.0, 2.0])
  make_store(tmp_path / "flat", statistics=statistics)
  del statistics["channels"]["mean"]
  make_store(tmp_path / "older", statistics=statistics)
  lacks = "it has no mean and standard deviation of each channel; export it"
  for name, kind, message in (
    ("none", "channels", lacks),
    ("older", "channels", lacks),
    ("flat", "channels", "its channel 1 has a standard deviation of 0.0; exp"),
    ("store", "each", "unknown normalisation='each'; known are factor, channe"),
  ):
    with pytest.raises(ValueError, match=message):
      reader.Latents(tmp_path / name, normalisation=kind)


def _epoch(batches, count):
  found = [next(batches) for _ in range(count)]
  return [float(x) for batch in found for x in batch["latents"][:, 0, 0, 0]]


@pytest.mark.parametrize("window", [0, 2])
def test_an_epoch_has_every_row_once_in_another_order(path, window):
  source = reader.Latents(path)
  batches = reader.LatentBatches(
    source, batch_size=10, seed=0, shuffle_shards=window
  )
  everything = sorted(source.read(np.arange(80))["latents"][:, 0, 0, 0])
  first, second = _epoch(batches, 8), _epoch(batches, 8)
  batches.close()
  assert sorted(first) == sorted(second) == pytest.approx(everything)
  assert first != second and first != everything
  other = reader.LatentBatches(source, batch_size=10, seed=1)
  assert _epoch(other, 8) != first
  other.close()


def test_windows_of_shards_are_read_one_after_the_other(path):
  """A cache of two shards is enough for a whole epoch."""
  source = reader.Latents(path)
  order = reader._Order(source, 8, seed=0, shuffle_shards=2)
  rows = np.concatenate([order.rows(batch) for batch in range(10)])
  shards = np.searchsorted([16, 32, 40, 56, 72], rows, side="right")
  first_seen = {shard: i for i, shard in reversed(list(enumerate(shards)))}
  in_order = sorted(first_seen, key=first_seen.get)
  windows = [in_order.index(shard) // 2 for shard in shards]
  assert windows == sorted(windows) and max(windows) == 2
  assert in_order != sorted(in_order)
  assert (np.diff(shards[:16]) != 0).any()  # rows of a window are mixed


@pytest.mark.parametrize("streams", [1, 2, 3, 12])
def test_processes_share_the_batches_of_one(streams, path):
  source = reader.Latents(path)
  options = {"seed": 3, "shuffle_shards": 1, "shuffle_streams": streams}
  one = reader.LatentBatches(source, batch_size=12, **options)
  parts = [
    reader.LatentBatches(
      source, batch_size=4, process_index=i, process_count=3, **options
    )
    for i in range(3)
  ]
  for _ in range(8):  # into the second epoch
    whole = next(one)
    shares = [next(part) for part in parts]
    for name, values in whole.items():
      joined = np.concatenate([share[name] for share in shares])
      np.testing.assert_array_equal(joined, values)
  for batches in (one, *parts):
    batches.close()


@pytest.mark.parametrize("window", [0, 2])
def test_streams_have_every_row_once_and_shards_of_their_own(window, tmp_path):
  make_store(tmp_path, rows=12 * SHARD_ROWS)
  source = reader.Latents(tmp_path)
  order = reader._Order(source, 8, 0, window, shuffle_streams=4)
  rows = np.array([order.rows(batch) for batch in range(2 * 24)])
  for epoch in (rows[:24], rows[24:]):
    assert sorted(epoch.flat) == list(range(192))
    shards = epoch // SHARD_ROWS
    owned = [set(shards[:, i : i + 2].flat) for i in (0, 2, 4, 6)]
    assert [len(x) for x in owned] == [3, 3, 3, 3]
    assert (np.diff(shards[:4, :2].flat) != 0).any()  # mixed within a window
    if window:
      assert len(set(shards[:16, :2].flat)) == 2
  assert (rows[:24] != rows[24:]).any()


@pytest.mark.parametrize(("streams", "stores"), [(1, 2), (2, 1)])
def test_a_bucket_is_read_once_an_epoch_where_a_window_fits(
  streams, stores, gs, emulator
):
  """By all processes together with a stream for each, else by each."""
  shape = (8, 8, 16)  # beside which what the cache notes is small
  make_store(f"{gs}/store", rows=12 * SHARD_ROWS, shape=shape)
  emulator.forget()
  for process in range(2):
    megabytes = 5 * SHARD_ROWS * 4 * np.prod(shape) / 1e6
    source = reader.Latents(f"{gs}/store", cache_megabytes=megabytes)
    batches = reader.LatentBatches(
      source, batch_size=4, seed=0, threads=1, process_index=process,
      process_count=2, shuffle_shards=4, shuffle_streams=streams,
    )  # fmt: skip
    for _ in range(21):  # it reads three more ahead
      next(batches)
    batches.close()
  read = collections.Counter(
    path.partition("?")[0]
    for _, path in emulator.requests
    if "latents%2Fc" in path
  )
  assert len(read) == 12 and set(read.values()) == {stores}


def test_batches_go_on_where_they_were_with_any_number_of_workers(path):
  source = reader.Latents(path)
  create = lambda workers: reader.LatentBatches(
    source, batch_size=16, seed=0, workers=workers
  )
  first = create(0)
  expected = [next(first) for _ in range(7)]
  state = json.loads(json.dumps({"next_batch": 3}))
  first.set_state(state)
  second = create(2)
  second.set_state(state)
  for batches in (first, second):
    for batch in expected[3:]:
      found = next(batches)
      for name, values in batch.items():
        np.testing.assert_array_equal(found[name], values)
    assert batches.get_state()["next_batch"] == 7
    batches.close()


def test_a_store_that_is_too_small_is_refused(path):
  with pytest.raises(ValueError, match="80 rows, and a batch of all processes"):
    reader.LatentBatches(
      reader.Latents(path), batch_size=30, seed=0, process_count=3
    )


def test_a_bucket_is_read_through_faults(gs, emulator):
  make_store(f"{gs}/store")
  make_store(f"{gs}/store2", rows=7)  # a neighbour by name
  with emulator.fail(503, times=3), emulator.drop(times=2, every=3):
    source = reader.Latents(f"{gs}/store", retries=5)
    batches = reader.LatentBatches(source, batch_size=40, seed=0)
    labels = next(batches)["labels"]
    batches.close()
    assert sorted(labels) == list(range(40))
    assert not source.verify()


def test_a_cached_bucket_is_read_once(gs, emulator):
  make_store(f"{gs}/store")
  source = reader.Latents(f"{gs}/store", cache_megabytes=10)
  source.read(np.arange(40))
  emulator.forget()
  source.read(np.arange(40))
  source.read([17])
  # Asked whether it changed, perhaps; but not sent again.
  assert not [x for x in emulator.requests if "latents%2Fc" in x[1]]


def _damage(path, name):
  file = next(f for f in sorted(path.glob(f"{name}/c/**/*")) if f.is_file())
  data = bytearray(file.read_bytes())
  data[len(data) // 3] ^= 1
  file.write_bytes(data)


@pytest.mark.parametrize("name", ["latents", "labels", "keys"])
def test_one_wrong_bit_is_found(name, tmp_path):
  make_store(tmp_path / "store")
  source = reader.Latents(str(tmp_path / "store"))
  assert source.verify() == []
  _damage(tmp_path / "store", name)
  (problem,) = reader.Latents(str(tmp_path / "store")).verify()
  assert f"shard 0 of {name}" in problem


def _edit_manifest(store, **changes):
  """By hand, without the digest that would tell of it."""
  file = store / "manifest.json"
  changes = {"sha256_of_the_rest": None} | changes
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_manifest_or_a_record_with_another_number_is_damaged(tmp_path):
  make_store(tmp_path / "store")
  file = tmp_path / "store/manifest.json"
  text = file.read_text()
  assert text.count("0.25") == 1  # the scaling factor
  file.write_text(text.replace("0.25", "0.24"))
  with pytest.raises(ValueError, match="not what was written"):
    reader.Latents(str(tmp_path / "store"))
  file.write_text(text)
  reader.Latents(str(tmp_path / "store"))
  store = latent_store.LatentStore(str(tmp_path / "begun"))
  record = {"rows": 5, "sha256": {}, "first_sha256": {}}
  store.storage.write_sealed_json("progress/shards/000000.json", record)
  assert store.records([0]) == [record]
  file = tmp_path / "begun/progress/shards/000000.json"
  file.write_text(file.read_text().replace('"rows": 5', '"rows": 4'))
  with pytest.raises(ValueError, match="not what was written"):
    store.records([0])


def test_missing_objects_and_wrong_counts_are_found(tmp_path):
  make_store(tmp_path / "store")
  (tmp_path / "store/latents/c/1/0/0/0").unlink()
  (tmp_path / "store/keys/c/2").unlink()
  source = reader.Latents(str(tmp_path / "store"))
  problems = source.verify()
  assert len(problems) == 2
  assert "shard 1 of latents (rows 16 to 31)" in problems[0]
  assert "shard 2 of keys (rows 32 to 39) is missing" in problems[1]
  _edit_manifest(tmp_path / "store", count=41)
  text = " ".join(reader.Latents(str(tmp_path / "store")).verify())
  assert "latents has the shape (40, 2, 2, 3), not (41, 2, 2, 3)" in text
  assert "the shards have 40 rows, and the manifest 41" in text


def test_what_is_no_finished_store_is_refused(tmp_path):
  with pytest.raises(ValueError, match="is no latent store"):
    reader.Latents(str(tmp_path))
  store = latent_store.LatentStore(str(tmp_path / "begun"))
  store.check_writable()
  store.write_identity({"resolution": 16})
  store.create_arrays(
    store_layout.Layout(8, SHAPE, "float32", ("latents",), SHARD_ROWS)
  )
  with pytest.raises(ValueError, match="is not finished; run its export again"):
    reader.Latents(str(tmp_path / "begun"))
  make_store(tmp_path / "store")
  _edit_manifest(tmp_path / "store", format_version=2)
  with pytest.raises(ValueError, match="latents, version 1"):
    reader.Latents(str(tmp_path / "store"))
  (tmp_path / "store/manifest.json").write_text("{")
  with pytest.raises(ValueError, match=r"manifest.json is damaged"):
    reader.Latents(str(tmp_path / "store"))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"count": "40"}, "count is '40', where a whole number is expected"),
    ({"shape": [2, 2]}, "shape has 2 items, not 3"),
    ({"shape": [2, 2, "a"]}, r"shape\[2\] is 'a'"),
    ({"views": {}}, "views is {}, where a list is expected"),
    ({"shards": [3]}, r"shards\[0\] is 3, where a mapping is expected"),
    ({"shards": None, "classes": None}, "it has no classes, shards"),
    ({"scaling_factor": "0.5"}, "scaling_factor is '0.5'"),
    ({"conditions": "labels"}, "conditions is 'labels'"),
    ({"autoencoder": []}, r"autoencoder is \[\]"),
    ({"statistics": {}}, r"it has no statistics\.mean"),
    ({"unreadable": [{"key": 1, "reason": ""}]}, r"unreadable\[0\]\.key is 1"),
  ],
)
def test_a_manifest_with_other_types_is_named(changes, message, tmp_path):
  make_store(tmp_path)
  _edit_manifest(tmp_path, **changes)
  with pytest.raises(
    ValueError, match=rf"manifest\.json is damaged: {message}.*; export it"
  ):
    reader.Latents(tmp_path)


def test_rows_that_are_not_there_are_no_zeros(tmp_path):
  make_store(tmp_path)
  (tmp_path / "latents/c/0/0/0/0").unlink()
  source = reader.Latents(tmp_path)
  with pytest.raises(OSError, match="missing"):
    source.read([3])
  assert source.read([20])["labels"] == [20]
  assert source.read([])["latents"].shape == (0, *SHAPE)
  with pytest.raises(IndexError, match="rows from -1 to 2 of 40"):
    source.read([2, -1])


def test_a_damaged_survey_is_named(tmp_path):
  store = latent_store.LatentStore(str(tmp_path))
  store.storage.write_json("progress/survey/000000.json", {"x": "too small"})
  with pytest.raises(ValueError, match=r"000000\.json is damaged: x is no"):
    store.surveyed()


@pytest.mark.parametrize("key", ["zarr.json", "keys/zarr.json"])
def test_metadata_that_only_zarr_reads_is_verified(key, tmp_path):
  make_store(tmp_path)
  (tmp_path / key).write_text("{}")
  (problem,) = reader.Latents(tmp_path).verify()
  assert problem.startswith(f"{key} does not have the checksum")


@pytest.mark.parametrize(
  "text", ["[]", "3", "null", "{}", '{"a": 1', "[" * 9999]
)
def test_damaged_records_are_errors_in_one_line(text, tmp_path):
  make_store(tmp_path / "store")
  (tmp_path / "store/manifest.json").write_text(text)
  with pytest.raises(ValueError, match=r"damaged|is not of dcae_jax"):
    reader.Latents(tmp_path / "store")
  store = latent_store.LatentStore(str(tmp_path / "begun"))
  store.storage.write("progress/shards/000000.json", text.encode())
  with pytest.raises(ValueError, match="damaged"):
    store.records([0])
  if text != "{}":  # nothing was unusable
    store.storage.write("progress/survey/000000.json", text.encode())
    with pytest.raises(ValueError, match="damaged"):
      store.surveyed()


@pytest.mark.parametrize(
  "changes",
  [{"batch_size": 0}, {"seed": -1}, {"workers": -1}, {"threads": 0},
   {"shuffle_shards": -1}, {"shuffle_streams": 0}, {"process_index": 1}],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(changes, path):
  with pytest.raises(ValueError, match=r"is below|process 1 of 1"):
    reader.LatentBatches(
      reader.Latents(path), **({"batch_size": 4, "seed": 0} | changes)
    )
  with pytest.raises(ValueError, match="shuffle_streams=3 does not divide 4"):
    reader.LatentBatches(
      reader.Latents(path), batch_size=4, seed=0, shuffle_streams=3
    )
  with pytest.raises(ValueError, match="cache_megabytes=-1"):
    reader.Latents(path, cache_megabytes=-1)


def test_a_shard_without_its_record_or_an_object_is_not_finished(tmp_path):
  store = latent_store.LatentStore(str(tmp_path))
  layout = store_layout.Layout(40, SHAPE, "float32", ("latents",), SHARD_ROWS)
  store.create_arrays(layout)
  zeros = {
    "latents": np.zeros((16, *SHAPE), np.float32),
    "labels": np.zeros(16, np.int32),
  }
  for shard in range(2):  # all zeros are written, too
    store.write_shard(
      layout, shard, zeros, ["a"] * 16, {"moments": {"mean": [0.0]}}
    )
  assert store.finished(layout) == [0, 1]
  (tmp_path / "progress/shards/000000.json").unlink()
  (tmp_path / "labels/c/1").unlink()
  assert store.finished(layout) == []


def test_a_place_with_something_else_is_refused(tmp_path, gs, emulator):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match=r"holds notes.txt of something else"):
    latent_store.LatentStore(str(tmp_path)).check_writable()
  assert [x.name for x in tmp_path.iterdir()] == ["notes.txt"]
  storage.Storage(f"{gs}/a").write("notes.txt", b"mine")
  latent_store.LatentStore(f"{gs}/b").check_writable()
  with pytest.raises(ValueError, match=r"holds notes.txt of something else"):
    latent_store.LatentStore(f"{gs}/a").check_writable()
  assert emulator.names("dcae-gs") == ["a/notes.txt"]


def test_what_is_wrong_with_a_bucket_is_said(gs, emulator):
  store = latent_store.LatentStore("gs://dcae-nowhere/latents", retries=1)
  with pytest.raises(OSError, match="there is no bucket gs://dcae-nowhere"):
    store.check_writable()
  store = latent_store.LatentStore(f"{gs}/latents", retries=1)
  with (
    emulator.forbid("dcae-gs"),
    pytest.raises(PermissionError, match="needs the role"),
  ):
    store.check_writable()
  reads_only = lambda method, path: method != "GET"
  with (
    emulator.fail(403, times=None, where=reads_only),
    pytest.raises(PermissionError, match="no permission for"),
  ):
    store.check_writable()
  with (
    emulator.fail(503, times=None),
    pytest.raises(OSError, match="does not answer"),
  ):
    store.check_writable()
  for path in ("gs://", "gs://AB/x", "s3://bucket/x"):
    with pytest.raises(ValueError, match="neither a local path nor gs://"):
      latent_store.LatentStore(path)


def test_deleting_leaves_neighbours_alone(gs, emulator, tmp_path):
  for root in (f"{gs}/run", f"{gs}/run2", str(tmp_path)):
    place = storage.Storage(root)
    for key in ("a/1", "a/2", "b", "a2"):
      place.write(key, b"x")
  for root in (f"{gs}/run", str(tmp_path)):
    place = storage.Storage(root)
    place.delete("a/")
    assert place.list_keys() == {"b", "a2"}
    assert place.list_keys("a") == {"a2"}
    assert place.read("a/1") is None
  assert len(storage.Storage(f"{gs}/run2").list_keys()) == 4


def test_shards_suit_the_number_of_rows():
  sizes = {n: store_layout.block_size(n) for n in (1, 170, 2000, 10**5, 10**7)}
  assert sizes == {1: 16, 170: 16, 2000: 32, 10**5: 1024, 10**7: 1024}


def test_training_notices_exchanged_shards(path, tmp_path):
  """Each is whole, and its checksums fit; it is another one's place."""
  for name in ("latents", "labels"):
    copy = tmp_path / name
    shutil.copytree(path, copy)
    shards = sorted(x for x in (copy / name / "c").rglob("*") if x.is_file())
    first, last = shards[0].read_bytes(), shards[-2].read_bytes()
    shards[0].write_bytes(last)
    shards[-2].write_bytes(first)
    store = reader.Latents(str(copy))
    with pytest.raises(ValueError, match=f"shard 0 of {name} does not have"):
      store.check()
      store.condition("labels")


@pytest.mark.parametrize(
  "name", ["progress_of_my_thesis.txt", "progress/notes.txt"]
)
def test_what_is_not_of_an_export_is_neither_deleted_nor_written_over(
  name, tmp_path
):
  file = tmp_path / "store" / name
  file.parent.mkdir(parents=True)
  file.write_text("mine")
  with pytest.raises(ValueError, match=f"holds {name} of something else"):
    latent_store.LatentStore(str(tmp_path / "store")).check_writable()
  file.unlink()
  make_store(tmp_path / "other")
  file = tmp_path / "other" / name
  file.parent.mkdir(exist_ok=True)
  file.write_text("mine")
  latent_store.LatentStore(str(tmp_path / "other")).remove_progress()
  assert file.read_text() == "mine"
