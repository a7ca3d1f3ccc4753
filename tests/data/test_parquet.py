import json
import pathlib
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import base
from data.test_tar import described, picture, take, training
from dcae_jax.data import batches, images, sources, windows
from dcae_jax.data.sources import parquet
from dcae_jax.setup import start

NO_COLUMNS = {"image": "", "label": "", "text": ""}


def write(path, values, rows=3, metadata=None):
  table = pa.table(values).replace_schema_metadata(metadata)
  pq.write_table(table, path, row_group_size=rows)


def opened(path, captions=False, **columns):
  return sources.Parquet(str(path), NO_COLUMNS | columns, captions)


def parquet_of(folder, directory):
  """The images of a folder in two files, in its order, as a hub has them."""
  source = sources.folder(str(folder))
  names = {"info": {"features": {"label": {"names": source.classes}}}}
  for i, part in enumerate(np.array_split(np.arange(len(source)), 2)):
    records = [source[j] for j in part.tolist()]
    values = {
      "image": [{"bytes": x.encoded, "path": x.name} for x in records],
      "label": [x.label for x in records],
    }
    path = directory / f"train-{i:04d}.parquet"
    write(path, values, metadata={"huggingface": json.dumps(names)})
  return source


def test_parquet_of_a_folder_trains_as_the_folder(photographs, tmp_path):
  """What fits in memory is shuffled as other sources are."""
  folder = parquet_of(photographs, tmp_path)
  source = opened(tmp_path)
  records = described(source)
  assert [x[1:] for x in records] == [x[1:] for x in described(folder)]
  assert records[7][0] == "train-0001[1]" == source.key(7)
  assert source.name(7) == f"{tmp_path}/train-0001.parquet[1]"
  assert source.classes == folder.classes
  assert take(training(source), 6) == take(training(folder), 6)
  assert take(training(source, workers=2), 3) == take(training(folder), 3)


def _numbered(path, count=64, rows=4):
  """Images of which each is a class of its own."""
  encoded = [picture(value=i) for i in range(count)]
  write(path, {"jpg": encoded, "cls": list(range(count))}, rows)


def _in_windows_of_four(source, monkeypatch):
  """As if memory were for four row groups; what is kept is for eight."""
  size = source._groups[0].bytes
  monkeypatch.setattr(parquet, "_WINDOW", int(4.5 * size))
  monkeypatch.setattr(parquet, "_CACHE", int(8.5 * size))
  return source


def test_windows_of_row_groups_are_shuffled_in_one_order(tmp_path, monkeypatch):
  """The same for all processes and workers, from any position on."""
  _numbered(tmp_path / "a.parquet")
  source = _in_windows_of_four(opened(tmp_path), monkeypatch)
  groups = sources.groups(source)
  assert groups.window == 4 and groups.of.tolist() == sorted([*range(16)] * 4)
  expected = take(training(source), 40)  # two epochs and a half
  labels = np.concatenate([x for _, x in expected])
  for epoch in labels[:128].reshape(2, 64):
    assert sorted(epoch) == list(range(64))
    for window in (epoch // 4).reshape(4, 16):
      assert len(set(window)) == 4
  assert not np.array_equal(labels[:64], labels[64:128])
  assert take(training(source, workers=2), 20) == expected[:20]
  again = training(source)
  again.set_state(training(source).get_state() | {"next_batch": 18})
  assert take(again, 22) == expected[18:]
  parts = [
    take(training(source, batch_size=1, process_count=4, process_index=i), 40)
    for i in range(4)
  ]
  together = [[x for _, (x,) in part] for part in parts]
  np.testing.assert_array_equal(np.transpose(together).ravel(), labels)
  part, _ = sources.split(source, 0.3)
  assert len(sources.groups(part).of) == len(part) < 64
  labels = np.concatenate(
    [x for _, x in take(training(part, batch_size=1), 99)]
  )
  assert len(set(labels[: len(part)])) == len(part)


def test_threads_on_two_sides_of_an_epoch_draw_each_order_once(monkeypatch):
  drawn, draw = [], np.random.default_rng
  monkeypatch.setattr(
    np.random, "default_rng", lambda seed: drawn.append(seed) or draw(seed)
  )
  groups = sources.Groups(np.repeat(np.arange(4, dtype=np.int32), 5), 2)
  order = windows.Order(groups, 7)
  for place in range(5):
    for position in (15 + place, 20 + place):  # the last and the first ones
      order(position)
  assert drawn == [(7, 0), (7, 1)]
  order(40)
  assert len(order._epochs) == 2  # one order is 10 MB of ImageNet


def _reads(source, monkeypatch, process_count):
  """Row groups that processes with two workers read in an epoch, by hand."""
  read = sources.Parquet._read
  numbers = []
  monkeypatch.setattr(
    sources.Parquet,
    "_read",
    lambda self, group: numbers.append(group.number) or read(self, group),
  )
  batch = 16 // process_count
  for process in range(process_count):
    iterator = training(
      source,
      batch_size=batch,
      process_count=process_count,
      process_index=process,
    )
    for worker in range(2):  # grain deals batches out in turn
      own = pickle.loads(pickle.dumps(iterator.dataset))
      for i in range(worker, len(source) // 16, 2):
        own[i]
  return len(numbers)


@pytest.mark.parametrize("process_count", [1, 4])
def test_each_loader_process_reads_a_row_group_once_an_epoch(
  tmp_path, monkeypatch, process_count
):
  """And of four processes, each only a quarter of them."""
  _numbered(tmp_path / "a.parquet", 256, 16)
  source = _in_windows_of_four(opened(tmp_path), monkeypatch)
  assert _reads(source, monkeypatch, process_count) == 2 * 16


def test_threads_read_a_row_group_once(tmp_path, monkeypatch):
  _numbered(tmp_path / "a.parquet")
  source = opened(tmp_path)
  read, numbers = source._read, []
  source._read = lambda group: numbers.append(group.number) or read(group)
  reading = batches.Reading(4, threads=8)
  found = images.evaluation_batches(
    source, images.Decoding(), 16, reading, skipped=images.Skipped()
  )
  labels = np.concatenate([x["labels"] for x in found])
  assert labels.tolist() == list(range(64))
  assert sorted(numbers) == list(range(16))


def test_captions_labels_and_sizes_come_from_columns(tmp_path):
  values = {
    "picture": [picture(), None, b"no image"],
    "text": [["a", None, "b"], [], None],
    "alt": ["über", "", "n\0ne"],
    "class": ["dog", "cat", "dog"],
    "width": [20, None, 3],
    "height": [16, 1, 4],
  }
  write(tmp_path / "a.parquet", values)
  source = opened(tmp_path, captions=True, image="picture")
  source = pickle.loads(pickle.dumps(source))
  assert [x.text for x in source[0].captions] == ["a", "b"]
  assert source[0].encoded == picture() and source[2].captions == ()
  assert source.classes == ["cat", "dog"] and source[0].label == 1
  assert source.sizes() is None
  with pytest.raises(OSError, match="no image in this row"):
    source[1]
  other = opened(tmp_path, captions=True, image="picture", text="alt")
  assert [x.text for x in other[0].captions] == ["über"]
  with pytest.raises(OSError, match="captions are no texts"):
    other[2]
  assert other.fingerprint() != source.fingerprint()
  values |= {"width": [20, 2, -3]}
  write(tmp_path / "a.parquet", values)
  assert opened(tmp_path, image="picture").sizes() is None
  values |= {"width": [20, 2, 3]}
  write(tmp_path / "a.parquet", values)
  source = opened(tmp_path, image="picture", label="width")
  assert source.sizes().tolist() == [[20, 16], [2, 1], [3, 4]]
  assert source.classes == [] and source[0].label == 20
  write(tmp_path / "b.parquet", {"image": [b""]})
  plain = opened(tmp_path / "b.parquet")
  assert plain.classes == [""] and plain[0].label == 0


def _no_utf8():
  return pa.array([b"\xff"]).view(pa.string())


@pytest.mark.parametrize(
  ("values", "columns", "message"),
  [
    (
      {"photo": [b""], "a": [1]},
      {},
      r"no column of images.*are photo, a; name",
    ),
    ({"image": ["a"]}, {}, "no column of images as bytes"),
    ({"image": [b""]}, {"image": "b"}, "no column 'b', as .*there are image"),
    ({"image": [b""]}, {"label": "image"}, "holds binary, no label; there are"),
    (
      {"image": [{"bytes": None, "path": "a"}]},
      {},
      "no column of images|embed",
    ),
    ({"jpg": [b""], "label": [None]}, {}, "a.parquet has no column|no label"),
    ({"jpg": [b"", b""], "label": [1, None]}, {}, "has no label in row 1"),
    ({"jpg": pa.array([], pa.binary())}, {}, "has no rows"),
    ({"jpg": [b""], "text": _no_utf8()}, {}, "damaged.*Invalid UTF8"),
    ({"jpg": [b""], "label": _no_utf8()}, {}, "damaged.*Invalid UTF8"),
    ({"jpg": [b""], "width": [2**40]}, {}, "not in range"),
    ({"image": [{"bytes": {"bytes": b""}}]}, {}, "no column of images"),
  ],
)
def test_files_without_what_is_asked_for_are_refused(
  tmp_path, values, columns, message
):
  write(tmp_path / "a.parquet", values)
  if message.startswith("a.parquet"):
    assert opened(tmp_path / "a.parquet")[0].label == 0
    return
  with pytest.raises(ValueError, match=message):
    opened(tmp_path / "a.parquet", **columns)


def test_files_of_different_columns_and_damaged_ones_are_refused(tmp_path):
  write(tmp_path / "a.parquet", {"image": [b"1"], "label": [1]})
  write(tmp_path / "b.parquet", {"image": [b"1"]})
  with pytest.raises(ValueError, match=r"b.parquet has other columns than .*a"):
    opened(tmp_path)
  file = tmp_path / "b.parquet"
  file.write_bytes(file.read_bytes()[:-20])
  with pytest.raises(ValueError, match=r"b.parquet is damaged, or no parquet"):
    opened(file)
  with pytest.raises(ValueError, match="no captions in a column captions, "):
    opened(tmp_path / "a.parquet", captions=True)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
  """Which one is meant, nobody knows."""
  values = [pa.array([b"1"]), pa.array([1]), pa.array([2])]
  table = pa.Table.from_arrays(values, ["image", "label", "label"])
  pq.write_table(table, tmp_path / "a.parquet")
  with pytest.raises(ValueError, match="has 2 columns 'label'; rename"):
    opened(tmp_path)


def test_files_without_rows_and_of_other_numbers_are_of_one_source(tmp_path):
  def values(rows, kind):
    images = pa.array([b"1"] * rows, pa.binary())
    texts = pa.array(["a"] * rows, pa.string())
    return {"image": images, "text": texts} | {
      name: pa.array([4] * rows, kind) for name in ("width", "height")
    }

  for name, rows, kind in [
    ("a", 0, pa.int64()),
    ("b", 2, pa.int32()),
    ("c", 1, pa.int64()),
  ]:
    write(tmp_path / f"{name}.parquet", values(rows, kind))
  source = opened(tmp_path, captions=True)
  keys = [source.key(i) for i in range(len(source))]
  assert keys == ["b[0]", "b[1]", "c[0]"]
  assert source.sizes().tolist() == [[4, 4]] * 3


@pytest.mark.parametrize(
  ("others", "message"),
  [
    ({"image": [b"1"], "label": [0]}, "b.* other columns .*: image, label, n"),
    ({"image": [{"bytes": b"1"}], "label": [2]}, "label 2 .*notes 2 names"),
    ({"image": [{"bytes": b"1"}], "label": [-1]}, None),
  ],
)
def test_images_and_labels_are_as_the_first_file_says(
  tmp_path, others, message
):
  noted = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
  metadata = {"huggingface": json.dumps(noted)}
  first = {"image": [{"bytes": b"1"}], "label": [1]}
  write(tmp_path / "a.parquet", first, metadata=metadata)
  write(tmp_path / "b.parquet", others, metadata=metadata)
  if message:
    with pytest.raises(ValueError, match=message):
      opened(tmp_path)
    return
  assert [opened(tmp_path)[i].label for i in range(2)] == [1, -1]
  noted["info"]["features"]["label"]["names"] = ["bat", "dog"]
  metadata = {"huggingface": json.dumps(noted)}
  write(tmp_path / "b.parquet", others, metadata=metadata)
  with pytest.raises(ValueError, match=r"b.parquet and .*a.parquet note other"):
    opened(tmp_path)


def test_a_file_that_changes_meanwhile_is_refused(tmp_path):
  write(tmp_path / "a.parquet", {"image": [b"1", b"22"]})
  source = opened(tmp_path)
  assert source[1].encoded == b"22"
  before = source.fingerprint()
  write(tmp_path / "a.parquet", {"image": [b"1", b"4444"]})
  assert opened(tmp_path).fingerprint() != before
  with pytest.raises(ValueError, match="has changed since the run began"):
    pickle.loads(pickle.dumps(source))[1]
  pathlib.Path(tmp_path / "a.parquet").unlink()
  with pytest.raises(FileNotFoundError):
    pickle.loads(pickle.dumps(source))[1]


def test_a_run_does_not_write_among_the_files_that_it_reads(tmp_path):
  """Its index is one, too."""
  config = ConfigDict({"task": "plan", "source": base.source("parquet")})
  config.source.path = str(tmp_path)
  with pytest.raises(ValueError, match=r"lies in config.source.path=.* fil"):
    start.check_work_directory(config, epath.Path(tmp_path) / "run")
  config.output = str(tmp_path / "records")
  with pytest.raises(ValueError, match=r"config.output=.* lies in config.sou"):
    start.check_work_directory(config, epath.Path(tmp_path.parent) / "run")
