"""Images to record shards: the same whatever they came from, nothing lost."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import gcsfs
import kills
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from conftest import REPOSITORY, said_made, smooth_image
from etils import epath
from PIL import Image

from configs import base
from dcae_jax.data import batches, decoding, images, sources
from dcae_jax.tasks import prepare

BAD = {"zoo/broken.jpg": b"no picture", "zoo/empty.png": b""}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """24 images with captions in two classes, and two files that are none."""
  root = tmp_path_factory.mktemp("pictures")
  for i in range(24):
    folder = root / ("animals", "zoo")[i % 2]
    folder.mkdir(exist_ok=True)
    image = Image.fromarray(smooth_image(i, 40 + i, 90 - i))
    exif = Image.Exif()
    exif[0x0112] = 6 if i == 5 else 1  # lies on its side
    image.save(folder / f"{i:02d}.jpg", quality=95, exif=exif)
    (folder / f"{i:02d}.txt").write_text(f"picture {i}\nnumber {i}")
  for name, content in BAD.items():
    (root / name).write_bytes(content)
  return root


@pytest.fixture(scope="module")
def config(pictures):
  """A function: the preparation of the pictures in about four shards."""

  def create(**changes):
    c = base.prepare()
    c.source = base.source("folder", str(pictures), captions=True)
    c.shard_megabytes, c.workers, c.threads = 0.02, 0, 2
    c.update_from_flattened_dict(changes)
    return c

  return create


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  """The finished store."""
  workdir = epath.Path(tmp_path_factory.mktemp("prepared"))
  assert prepare.run(config(), workdir)
  return pathlib.Path(workdir)


def _files(workdir):
  store = pathlib.Path(workdir) / "records"
  return {
    str(path.relative_to(store)): path.read_bytes()
    for path in store.rglob("*")
    if path.is_file()
  }


def _batches(source, count=6, **options):
  iterator = images.TrainingImages(
    [(source, 1.0)],
    decoding.Decoding(),
    images.Cropping("random_resized_crop", 16, flip=True),
    batches.Reading(4, threads=2, **options),
    seed=3,
  )
  found = [next(iterator) for _ in range(count)]
  iterator.close()
  return found


def test_an_index_tells_of_each_image(whole, pictures):
  result = json.loads((whole / "result.json").read_text())
  assert result["count"] == 24 and result["left_out"] == 2
  assert result["shards"] > 2
  manifest = json.loads((whole / "records/manifest.json").read_text())
  assert manifest["left_out"].keys() == BAD.keys()
  assert manifest["classes"] == ["animals", "zoo"]
  rows = pq.read_table(whole / "records/index.parquet").to_pylist()
  assert [x["sha256"] for x in rows] == sorted(x["sha256"] for x in rows)
  by_key = {row["key"]: row for row in rows}
  turned = by_key["zoo/05.jpg"]
  assert (turned["width"], turned["height"]) == (45, 85)  # as it is shown
  assert turned["label"] == 1
  assert turned["captions"] == "picture 5\nnumber 5"
  source = sources.Records(str(whole / "records"), captions=True)
  for i, row in enumerate(rows):
    record = source[i]
    assert record.encoded == (pictures / row["key"]).read_bytes()
    assert (source.key(i), record.label) == (row["key"], row["label"])
    assert [x.text for x in record.captions] == row["captions"].split("\n")
  np.testing.assert_array_equal(
    sources.sizes(source), [(x["width"], x["height"]) for x in rows]
  )


def test_any_reader_of_array_records_reads_the_shards(whole):
  from array_record.python import array_record_module

  rows = pq.read_table(whole / "records/index.parquet").to_pylist()
  manifest = json.loads((whole / "records/manifest.json").read_text())
  source = sources.Records(str(whole / "records"))
  for i, row in enumerate(rows):
    name = manifest["shards"][row["file"]]["name"]
    reader = array_record_module.ArrayRecordReader(
      str(whole / "records" / name)
    )
    assert reader.read([row["position"]])[0] == source[i].encoded


def test_another_source_of_the_same_images_trains_bit_equally(
  whole, pictures, config, tmp_path
):
  """Whose order and names are others: photographs in a mixture of folders."""
  for name in ("zoo", "animals"):
    for path in (pictures / name).glob("*.jpg"):
      to = tmp_path / name / name / f"other_{path.name}"
      to.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(path, to)
  c = config()
  c.source = base.source(
    "mixture",
    members={
      name: base.source("folder", str(tmp_path / name))
      for name in ("zoo", "animals")
    },
  )
  assert prepare.run(c, epath.Path(tmp_path / "out"))
  first = sources.Records(str(whole / "records"))
  second = sources.Records(str(tmp_path / "out/records"))
  assert first.key(0) != second.key(0)
  assert first.classes == second.classes
  for a, b in zip(_batches(first), _batches(second), strict=True):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
  held_out = [
    {x[i].encoded for i in range(len(x))}
    for x in (sources.split(y, 0.3)[1] for y in (first, second))
  ]
  assert held_out[0] == held_out[1]
  part = sources.Records(str(tmp_path / "out/records"), split="zoo")
  assert len(part) == 12 and set(part[i].label for i in range(12)) == {1}


def test_members_lose_nothing_to_each_other(pictures, config, tmp_path):
  """Names of what is left out, and that images have no class."""
  jpeg = (pictures / "zoo/05.jpg").read_bytes()
  for name, labels in {"bats": [0, -1], "cats": [-1, 1]}.items():
    (tmp_path / name).mkdir()
    noted = {"info": {"features": {"label": {"names": [name, "rest"]}}}}
    images = pa.array([jpeg, jpeg, None], pa.binary())
    table = pa.table({"image": images, "label": [*labels, 0]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(noted)})
    pq.write_table(table, tmp_path / name / "a.parquet")
  c = config()
  c.source = base.source(
    "mixture",
    members={
      name: base.source("parquet", str(tmp_path / name))
      for name in ("bats", "cats")
    },
  )
  assert prepare.run(c, epath.Path(tmp_path / "out"))
  manifest = json.loads((tmp_path / "out/records/manifest.json").read_text())
  assert manifest["left_out"].keys() == {"bats/a[2]", "cats/a[2]"}
  rows = pq.read_table(tmp_path / "out/records/index.parquet").to_pylist()
  found = {(row["split"], row["key"]): row["label"] for row in rows}
  assert manifest["classes"] == ["bats", "cats", "rest"]
  assert found == {
    ("bats", "a[0]"): 0, ("bats", "a[1]"): -1,
    ("cats", "a[0]"): -1, ("cats", "a[1]"): 2,
  }  # fmt: skip


def _in_tars(pictures, place):
  """In an order of their own, with what lies beside them."""
  for number, name in enumerate(("zoo", "animals")):
    with tarfile.open(place / f"{number}.tar", "w") as tar:
      for path in sorted((pictures / name).iterdir()):
        tar.add(path, f"./{name}/{path.name}")
  return base.source("tar", str(place), captions=True)


def _in_parquet(pictures, place):
  """As a hub has them, the last ones first."""
  paths = sorted(pictures.rglob("*.jpg"), reverse=True)
  table = pa.table(
    {
      "image": [{"bytes": x.read_bytes(), "path": x.name} for x in paths],
      "label": [x.parent.name for x in paths],
      "text": [
        x.with_suffix(".txt").read_text().split("\n")
        if x.with_suffix(".txt").exists()
        else []
        for x in paths
      ],
    }
  )
  pq.write_table(table, place / "a.parquet", row_group_size=5)
  return base.source("parquet", str(place), captions=True)


class Pictures(tfds.core.GeneratorBasedBuilder):
  """Those of the folder that the environment names, in TFDS's own order."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {
      "image": tfds.features.Image(encoding_format="jpeg"),
      "label": tfds.features.ClassLabel(names=["animals", "zoo"]),
      "captions": tfds.features.Sequence(tfds.features.Text()),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for path in pathlib.Path(os.environ["PICTURES"]).rglob("*.jpg"):
      if path.with_suffix(".txt").exists():
        captions = path.with_suffix(".txt").read_text().split("\n")
        label = path.parent.name
        image = {"image": str(path), "label": label, "captions": captions}
        yield path.name, image


def _in_tfds(pictures, place):
  os.environ["PICTURES"] = str(pictures)
  builder = Pictures(data_dir=str(place), file_format="array_record")
  builder.download_and_prepare()
  return base.source(
    "tfds", str(place), name="pictures", split="train", captions=True
  )


@pytest.mark.parametrize("kind", [_in_tars, _in_parquet, _in_tfds])
def test_whatever_they_came_from_they_train_bit_equally(
  kind, whole, pictures, config, tmp_path
):
  (tmp_path / "images").mkdir()
  c = config()
  c.source = kind(pictures, tmp_path / "images")
  assert prepare.run(c, epath.Path(tmp_path / "out"))
  first = sources.Records(str(whole / "records"), captions=True)
  second = sources.Records(str(tmp_path / "out/records"), captions=True)
  assert first.classes == second.classes
  for i in range(24):
    assert first[i][1:] == second[i][1:]  # all but their names
  for a, b in zip(_batches(first), _batches(second), strict=True):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_processes_and_workers_change_nothing(whole):
  source = sources.Records(str(whole / "records"))
  pixels = lambda count, **options: np.concatenate(
    [x["images"] for x in _batches(source, count, **options)]
  )
  expected = pixels(6)
  np.testing.assert_array_equal(pixels(6, workers=2), expected)
  halves = [pixels(3, process_count=2, process_index=i) for i in range(2)]
  together = np.stack(halves, axis=1).reshape(expected.shape)
  np.testing.assert_array_equal(together, expected)


def test_classes_and_splits_are_looked_up(whole):
  path = str(whole / "records")
  for classes in (("zoo",), ("1",), (1,)):
    zoo = sources.Records(path, classes=classes)
    assert len(zoo) == 12 and zoo.classes == ["animals", "zoo"]
    assert {zoo[i].label for i in range(12)} == {1}
  whole_print = sources.Records(path).fingerprint()
  assert zoo.fingerprint() != whole_print
  with pytest.raises(ValueError, match="no images of the class 'cat'; there"):
    sources.Records(path, classes=("cat",))
  with pytest.raises(ValueError, match="no split 'test'; there are none"):
    sources.Records(path, split="test")


def test_workers_write_what_one_process_does(whole, config, tmp_path):
  assert prepare.run(config(workers=2), epath.Path(tmp_path))
  assert _files(tmp_path) == _files(whole)


def test_a_killed_preparation_ends_byte_equal(whole, config, tmp_path):
  expected, number, done = _files(whole), 1, False
  while not done:
    with kills.kill(tmp_path, number):
      done = prepare.run(config(), epath.Path(tmp_path))
    number = 2 * number + 1
    assert done or not (tmp_path / "result.json").exists()
  assert number > 7
  assert _files(tmp_path) == expected


def test_killed_before_its_result_it_has_one_in_the_end(
  whole, config, tmp_path, caplog
):
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  (tmp_path / "result.json").unlink()
  caplog.set_level("INFO")
  assert prepare.run(config(), epath.Path(tmp_path))
  assert said_made(caplog.text) == {"records", "result"}
  result = json.loads((tmp_path / "result.json").read_text())
  assert (result["count"], result["left_out"]) == (24, 2)
  assert _files(tmp_path) == _files(whole)


def test_stopped_by_sigterm_it_goes_on(whole, config, pictures, tmp_path):
  file = tmp_path / "prepare.py"
  file.write_text(
    "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
    f"  return ConfigDict({config(workers=1).to_dict()!r})\n"
  )
  command = [
    sys.executable, "-m", "dcae_jax.main", f"--config={file}",
    f"--workdir={tmp_path / 'out'}",
  ]  # fmt: skip
  process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE)
  rows = tmp_path / "out/records/progress/shards"
  while not list(rows.glob("*.parquet")) and process.poll() is None:
    time.sleep(0.005)
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=60)
  assert process.returncode == 0, said.decode()
  assert subprocess.run(command, cwd=REPOSITORY, check=False).returncode == 0
  assert _files(tmp_path / "out") == _files(whole)


def test_images_are_reduced_and_encoded_anew(config, pictures, tmp_path):
  changes = {"encoding": "webp_lossless", "shorter_side": 48}
  assert prepare.run(config(**changes), epath.Path(tmp_path))
  source = sources.Records(str(tmp_path / "records"))
  found = {source.key(i): source[i].encoded for i in range(len(source))}
  kept, reduced = found["animals/00.jpg"], found["zoo/23.jpg"]
  assert kept == (pictures / "animals/00.jpg").read_bytes()  # 90 x 40
  expected = decoding.decode(
    (pictures / "zoo/23.jpg").read_bytes(), decoding.Decoding(shorter_side=48)
  )
  image = decoding.decode(reduced, decoding.Decoding())
  np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
  assert min(image.size) == 48


def test_what_does_not_fit_together_is_refused(whole, config, tmp_path):
  path = tmp_path / "records"

  def message(match):
    with pytest.raises(ValueError, match=match):
      sources.Records(str(path))
    shutil.rmtree(path)
    shutil.copytree(whole / "records", path)

  shutil.copytree(whole / "records", path)
  (path / "shards/00001.array_record").unlink()
  message("00001.array_record is gone, where the index needs")
  with (path / "shards/00001.array_record").open("ab") as file:
    file.write(b"more")
  message(r"00001.array_record has [\d,]+ bytes, where the index needs")
  other = config()
  other.source.path = str(whole)
  rows = pq.read_table(path / "index.parquet")
  pq.write_table(rows.slice(1), path / "index.parquet")
  message("index.parquet is not the index of these shards, or damaged")
  (path / "index.parquet").unlink()
  message("index.parquet is gone")
  (path / "manifest.json").unlink()
  message("has no manifest.json: the task prepare has not made it, or has not")
  manifest = (path / "manifest.json").read_text()
  (path / "manifest.json").write_text(manifest.replace('"zoo"', '"cat"'))
  message("manifest.json is damaged")
  # The shards of two preparations with the same names and sizes.
  shards = sorted((path / "shards").iterdir())
  data = bytearray(shards[0].read_bytes())
  data[300:400] = bytes(100)
  shards[0].write_bytes(data)
  source = sources.Records(str(path))
  with pytest.raises(ValueError, match=r"is not what was indexed: .* changed"):
    for i in range(len(source)):
      source[i]


def test_other_images_or_encodings_are_not_mixed_in(config, tmp_path):
  with kills.kill(tmp_path, 20):
    prepare.run(config(), epath.Path(tmp_path / "a"))
  other = config(output=str(tmp_path / "a/records"), encoding="jpeg")
  with pytest.raises(ValueError, match="prepared from other images, or in"):
    prepare.run(other, epath.Path(tmp_path / "b"))


def test_captions_need_to_be_prepared(config, tmp_path):
  c = config()
  c.source.captions = False
  assert prepare.run(c, epath.Path(tmp_path))
  with pytest.raises(ValueError, match="was prepared without captions"):
    sources.Records(str(tmp_path / "records"), captions=True)


def test_a_preparation_of_nothing_usable_says_why(config, tmp_path):
  (tmp_path / "images").mkdir()
  (tmp_path / "images/a.jpg").write_bytes(b"nothing")
  c = config()
  c.source = base.source("folder", str(tmp_path / "images"))
  with pytest.raises(ValueError, match="none of 1 images that were tried can"):
    prepare.run(c, epath.Path(tmp_path / "out"))


def test_settings_that_cannot_be_are_refused(config, tmp_path):
  for changes, message in {
    ("encoding", "png"): "unknown config.encoding='png'; use jpeg, webp",
    ("shorter_side", 64): "config.shorter_side=64 needs images to be encoded",
    ("quality", 0): "quality",
    ("workers", 500): "config.workers=500 is above",
  }.items():
    with pytest.raises(ValueError, match=message):
      prepare.run(config(**dict([changes])), epath.Path(tmp_path / "x"))
  mixture = config()
  mixture.source = base.source("mixture")
  with pytest.raises(ValueError, match="needs at least one member"):
    prepare.run(mixture, epath.Path(tmp_path / "x"))
  assert not (tmp_path / "x").exists()


@pytest.fixture
def bucket(gs, emulator, monkeypatch):
  """An empty bucket, of which listings are read as well."""
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.address)
  gcsfs.GCSFileSystem.clear_instance_cache()
  yield gs
  gcsfs.GCSFileSystem.clear_instance_cache()


def test_a_bucket_is_asked_once_for_each_image(
  whole, config, bucket, emulator, tmp_path
):
  output = f"{bucket}/prepared"
  with emulator.fail(503, every=5, times=4):
    assert prepare.run(config(output=output), epath.Path(tmp_path))
  emulator.forget()
  source = sources.Records(output)
  assert len(emulator.requests) < 8
  emulator.forget()
  local = sources.Records(str(whole / "records"))
  for i in range(len(source)):
    assert source[i].encoded == local[i].encoded
  assert len(emulator.requests) == len(source)
  assert source.fingerprint() == local.fingerprint()


def test_a_preparation_whose_bucket_is_gone_goes_on(
  whole, config, bucket, emulator, tmp_path
):
  c = config(output=f"{bucket}/prepared", retries=1)
  uploads = lambda: [x for x in emulator.uploads if "array_record" in x]
  third = lambda _, path: "00002" in path
  with (
    emulator.fail(403, times=None, where=third),
    pytest.raises(OSError, match="no permission"),
  ):
    prepare.run(c, epath.Path(tmp_path))
  before = len(uploads())
  assert before and prepare.run(c, epath.Path(tmp_path))
  assert len(uploads()) == len(set(uploads()))  # none was made twice


def test_shards_of_another_size_hold_the_same_images(whole, config, tmp_path):
  assert prepare.run(config(shard_megabytes=1.0), epath.Path(tmp_path))
  first = sources.Records(str(whole / "records"))
  second = sources.Records(str(tmp_path / "records"))
  assert _files(tmp_path).keys() != _files(whole).keys()
  assert first.fingerprint() == second.fingerprint()
