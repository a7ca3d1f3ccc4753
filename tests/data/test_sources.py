import errno
import hashlib
import importlib.resources
import importlib.util
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dcae_jax.data import sources


class Captioned(tfds.core.GeneratorBasedBuilder):
  """Three grey squares with captions, as COCO has them."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {
      "image": tfds.features.Image(encoding_format="png"),
      "source": tfds.features.Text(),
      "captions": tfds.features.Sequence(
        {"id": np.int64, "text": tfds.features.Text()}
      ),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i in range(3):
      texts = [f"grau, größer {i}", f"square\0{i}"][: 2 - i]
      yield (
        i,
        {
          "image": os.path.join(os.environ["TINY_IMAGES"], f"{i}.png"),
          "source": "nowhere",
          "captions": [{"id": i, "text": text} for text in texts],
        },
      )


class Tiny(tfds.core.GeneratorBasedBuilder):
  """Ten grey squares in two classes."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {
      "image": tfds.features.Image(encoding_format="png"),
      "label": tfds.features.ClassLabel(names=["dark", "light"]),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i in range(10):
      path = os.path.join(os.environ["TINY_IMAGES"], f"{i}.png")
      yield i, {"image": path, "label": "light" if i >= 5 else "dark"}


@pytest.fixture(scope="session")
def tfds_directory(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  for i in range(10):
    Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)).save(
      root / f"{i}.png"
    )
  os.environ["TINY_IMAGES"] = str(root)
  Tiny(data_dir=str(root), file_format="array_record").download_and_prepare()
  return str(root)


def test_folder_is_sorted_with_a_class_per_sub_folder(tmp_path):
  for name in ("b/2.png", "b/deep/1.JPG", "a/3.webp", "a/.hidden.png", "x.txt"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(name.encode())
  (tmp_path / "b" / "loop").symlink_to(tmp_path)
  folder = sources.folder(str(tmp_path))
  found = [
    (os.path.relpath(r.name, tmp_path), r.encoded.decode(), r.label)
    for r in (folder[i] for i in range(len(folder)))
  ]
  assert found == [
    ("a/3.webp", "a/3.webp", 0),
    ("b/2.png", "b/2.png", 1),
    ("b/deep/1.JPG", "b/deep/1.JPG", 1),
  ]


def test_folders_that_do_not_exist_are_refused():
  for path, message in {
    "": "config.source.path is empty",
    "/nowhere/at/all": r"cannot be listed \(No such file",
    __file__: r"cannot be listed \(Not a directory",
  }.items():
    with pytest.raises(ValueError, match=message):
      sources.folder(path)


def _texts(record):
  return [caption.text for caption in record.captions]


def test_a_class_whose_folder_cannot_be_listed_is_not_left_out(
  photographs, monkeypatch
):
  """As root may list anything, the system refuses by our word."""
  scandir = os.scandir

  def refuse(path):
    if os.path.basename(path) == "animals":
      raise PermissionError(errno.EACCES, "Permission denied", path)
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  with pytest.raises(ValueError, match=r"animals cannot be listed .Permission"):
    sources.folder(str(photographs))


def test_captions_of_a_folder_are_in_files_beside_images(tmp_path):
  for name in ("1.png", "b/2.JPG", "b/3.png", "b/4.png", "5.png", "6.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"no image")
  (tmp_path / "1.txt").write_text("a red bus\nein Bus")
  (tmp_path / "b/2.json").write_text('{"caption": "birds", "width": 3}')
  (tmp_path / "b/3.txt").write_text("overruled")
  (tmp_path / "b/3.json").write_text('{"captions": ["a"], "weights": [2]}')
  lines = [
    {"file_name": "./4.png", "text": "of metadata"},
    {"file_name": "not there.png", "text": "unused"},
  ]
  (tmp_path / "b/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
  (tmp_path / "6.json").write_text("{")
  (tmp_path / "5.json").write_text('{"width": 3}')
  (tmp_path / "5.txt").write_text("not in 5.json")
  source = sources.folder(str(tmp_path), captions=True)
  found = {source.key(i): i for i in range(len(source))}
  broken = found.pop("6.png")
  assert {key: _texts(source[i]) for key, i in found.items()} == {
    "1.png": ["a red bus", "ein Bus"],
    "5.png": ["not in 5.json"],
    "b/2.JPG": ["birds"],
    "b/3.png": ["a"],
    "b/4.png": ["of metadata"],
  }
  assert source[found["b/3.png"]].captions[0].weight == 2
  with pytest.raises(OSError, match=r"6\.json: "):
    source[broken]
  assert not sources.folder(str(tmp_path))[0].captions


def test_names_that_differ_in_case_have_each_its_captions(tmp_path):
  for name in ("aB", "Ab"):
    (tmp_path / f"{name}.png").write_bytes(b"no image")
  (tmp_path / "aB.json").write_text('{"text": "of aB"}')
  (tmp_path / "Ab.txt").write_text("of Ab")
  (tmp_path / "C.PNG").write_bytes(b"no image")
  (tmp_path / "C.TXT").write_text("of C")
  source = sources.folder(str(tmp_path), captions=True)
  found = {source.key(i): _texts(source[i]) for i in range(len(source))}
  assert found == {"Ab.png": ["of Ab"], "C.PNG": ["of C"], "aB.png": ["of aB"]}


def test_a_source_with_other_captions_has_another_fingerprint(tmp_path):
  (tmp_path / "1.png").write_bytes(b"no image")
  without = sources.folder(str(tmp_path)).fingerprint()
  (tmp_path / "1.txt").write_text("a red bus")
  assert sources.folder(str(tmp_path)).fingerprint() == without
  first = sources.folder(str(tmp_path), captions=True).fingerprint()
  (tmp_path / "1.txt").write_text("a red bus!")
  second = sources.folder(str(tmp_path), captions=True).fingerprint()
  (tmp_path / "1.txt").unlink()
  line = '{"file_name": "1.png", "text": "%s"}'
  (tmp_path / "metadata.jsonl").write_text(line % "a")
  third = sources.folder(str(tmp_path), captions=True).fingerprint()
  (tmp_path / "metadata.jsonl").write_text(line % "b")
  fourth = sources.folder(str(tmp_path), captions=True).fingerprint()
  assert len({without, first, second, third, fourth}) == 5


def test_folders_without_captions_are_refused(tmp_path):
  (tmp_path / "1.png").write_bytes(b"no image")
  with pytest.raises(ValueError, match=r"1 beside .*1.png has captions"):
    sources.folder(str(tmp_path), captions=True)
  (tmp_path / "metadata.jsonl").write_text('\n{"text": "a"}')
  with pytest.raises(ValueError, match=r"line 2 of .*metadata.jsonl .*file_na"):
    sources.folder(str(tmp_path), captions=True)


def test_captions_of_tfds_are_those_of_its_text_feature(
  tfds_directory, tmp_path
):
  data = str(tmp_path)
  Captioned(data_dir=data, file_format="array_record").download_and_prepare()
  source = sources.tfds("captioned", "train", data, captions=True)
  source = pickle.loads(pickle.dumps(source))
  assert sorted(_texts(source[i]) for i in range(3)) == [
    [], ["grau, größer 0", "square 0"], ["grau, größer 1"],
  ]  # fmt: skip
  plain = sources.tfds("captioned", "train", data)
  assert not plain[0].captions
  assert plain.fingerprint() != source.fingerprint()


def test_tfds_without_text_has_no_captions(tfds_directory):
  with pytest.raises(ValueError, match="its features of text are none"):
    sources.tfds("tiny", "train", tfds_directory, captions=True)


def test_folders_without_images_are_refused(tmp_path):
  (tmp_path / "readme.txt").write_text("no images")
  with pytest.raises(ValueError, match="holds no images"):
    sources.folder(str(tmp_path))


def test_pictures_of_other_kinds_are_counted_and_named_once(tmp_path, caplog):
  names = "1.png", "a/2.HEIC", "b/3.heic", "b/4.jxl", "b/.5.heic", "notes.txt"
  for name in names:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"no image")
  for _ in range(2):
    source = sources.folder(str(tmp_path))
    assert len(source) == 1 and source.classes == [""]
  (line,) = caplog.messages
  assert "2 .heic, 1 .jxl left out" in line and "a/2.HEIC'; convert" in line
  (tmp_path / "1.png").unlink()
  with pytest.raises(ValueError, match=r"no images .*, but 2 \.heic, 1 \.jxl"):
    sources.folder(str(tmp_path))


def test_embedded_splits_share_no_photograph():
  contents = {}
  for split in ("train", "validation"):
    source = sources.embedded(split)
    contents[split] = {source[i].encoded for i in range(len(source))}
    assert len(contents[split]) == len(source)
  assert not contents["train"] & contents["validation"]
  assert len(contents["train"]) >= 80
  with pytest.raises(ValueError, match="train, validation"):
    sources.embedded("test")


def test_embedded_photographs_that_numbers_compare_on_stay_the_same():
  source = sources.embedded("validation")
  assert [source.key(i) for i in range(len(source))] == [
    "skimage/data/astronaut.png",
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
    "skimage/data/motorcycle_left.png",
    "skimage/data/rocket.jpg",
    "skimage/data/camera.png",
  ]


def test_every_embedded_photograph_has_captions_of_its_own():
  file = importlib.resources.files(sources) / "embedded_captions.json"
  captions = json.loads(file.read_text("utf-8"))
  splits = [sources.embedded(split) for split in ("train", "validation")]
  assert list(captions) == [s.key(i) for s in splits for i in range(len(s))]
  assert {len(texts) for texts in captions.values()} <= {2, 3}
  every = [text for texts in captions.values() for text in texts]
  assert len(set(every)) == len(every)
  assert all(1 <= len(text.split()) <= 12 for text in every)


def test_embedded_photographs_say_how_to_get_them(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install .dcae_jax.quickst"):
    sources.embedded("train")


def test_tfds_reads_array_records_without_tensorflow(tfds_directory):
  source = sources.tfds("tiny", "train", tfds_directory)
  source = pickle.loads(pickle.dumps(source))
  assert len(source) == 10
  records = [source[i] for i in range(10)]
  assert sorted(r.label for r in records) == [0] * 5 + [1] * 5
  assert all(r.encoded.startswith(b"\x89PNG") for r in records)
  assert source.name(3) == "tiny:train[3]"


def test_tfds_datasets_and_splits_that_do_not_exist_are_refused(
  tfds_directory,
):
  with pytest.raises(ValueError, match=r"no split 'test'.*train"):
    sources.tfds("tiny", "test", tfds_directory)
  with pytest.raises(ValueError, match="no TFDS dataset 'unheard_of'"):
    sources.tfds("unheard_of", "train", tfds_directory)


def _copied(tfds_directory, root):
  """A copy of the tiny dataset; its directory of the version."""
  shutil.copytree(f"{tfds_directory}/tiny", root / "tiny")
  return root / "tiny" / "1.0.0"


_FOREIGN = "not_of_tfds.Code"
_TFDS = "tensorflow_datasets.core.features"
_DICT = f"{_TFDS}.features_dict.FeaturesDict"


_IN_PROTOCOL_BUFFERS = [
  {"pythonClassName": _FOREIGN, "image": {}},
  {"python_class_name": _FOREIGN, "image": {}},
  {
    "pythonClassName": f"{_TFDS}.sequence_feature.Sequence",
    "sequence": {"feature": {"pythonClassName": _FOREIGN}},
  },
  {
    "pythonClassName": _DICT,
    "jsonFeature": {
      "json": json.dumps({"image": {"type": _FOREIGN, "content": {}}})
    },
  },
]
_IN_JSON = [
  {"type": _FOREIGN, "content": {}},
  {"type": _DICT, "content": {"image": {"type": _FOREIGN, "content": {}}}},
]


@pytest.mark.parametrize(
  ("described", "file"),
  [(x, "features.json") for x in _IN_PROTOCOL_BUFFERS + _IN_JSON]
  + [(x, "dataset_info.json") for x in _IN_PROTOCOL_BUFFERS],
)
def test_tfds_runs_no_code_that_a_dataset_names(
  described, file, tfds_directory, tmp_path, monkeypatch
):
  directory = _copied(tfds_directory, tmp_path)
  if file == "dataset_info.json":
    info = json.loads((directory / file).read_text())
    described = info | {"features": described}
  (directory / file).write_text(json.dumps(described))
  ran = tmp_path / "ran"
  (tmp_path / "not_of_tfds.py").write_text(f"open({str(ran)!r}, 'w')")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ValueError, match=r"class 'not_of_tfds\.Code'"):
    sources.tfds("tiny:1.0.0", "train", str(tmp_path))
  assert not ran.exists()


def test_tfds_knows_all_features_of_its_own(tfds_directory, tmp_path):
  directory = _copied(tfds_directory, tmp_path)
  some = {
    "image": tfds.features.Image(encoding_format="png"),
    "box": tfds.features.BBoxFeature(),
    "labelled": tfds.features.LabeledImage(labels=2, shape=(None, None, 1)),
    "parts": tfds.features.Sequence({"text": tfds.features.Text()}),
    "number": np.float32,
    "texts": tfds.features.Translation(languages=["de", "en"]),
  }
  tfds.features.FeaturesDict(some).save_config(str(directory))
  assert sources.tfds("tiny", "train", str(tmp_path)).classes == []


def test_tfds_takes_the_config_and_version_of_a_name(tfds_directory, tmp_path):
  for version in ("1.0.0", "1.2.0", "1.10.0", "2.0.0"):
    directory = tmp_path / "tiny" / "big" / version
    shutil.copytree(f"{tfds_directory}/tiny/1.0.0", directory)
    info = json.loads((directory / "dataset_info.json").read_text())
    info |= {"version": version, "configName": "big"}
    (directory / "dataset_info.json").write_text(json.dumps(info))
  (tmp_path / "tiny" / "2.0.0.incomplete").mkdir()

  def shown(name):
    source = sources.tfds(name, "train", str(tmp_path))
    return source._builder.info.full_name

  with pytest.raises(ValueError, match=r"no TFDS dataset 'tiny' in.*are.* big"):
    shown("tiny")
  assert shown("tiny/big") == "tiny/big/2.0.0"
  assert shown("tiny/big:1.*.*") == "tiny/big/1.10.0"
  assert shown("Tiny/big:1.2.0") == "tiny/big/1.2.0"
  (tmp_path / "tiny" / ".config").mkdir()
  noted = tmp_path / "tiny" / ".config" / "metadata.json"
  noted.write_text('{"default_config_name": "big"}')
  assert shown("tiny") == "tiny/big/2.0.0"
  _copied(tfds_directory, tmp_path / "old")
  shutil.move(tmp_path / "old" / "tiny" / "1.0.0", tmp_path / "tiny")
  assert shown("tiny:1.2.0") == "tiny/big/1.2.0"
  with pytest.raises(ValueError, match=r"no TFDS dataset 'tiny:3\.0\.0'"):
    shown("tiny:3.0.0")


@pytest.mark.parametrize(
  "name",
  [
    "", "../tiny", "tiny/..", "tiny/..:1.0.0", "tiny/.", "a/b/c", "/tiny",
    "tests.data.test_sources", "tiny.py", "tiny:1", "kaggle:tiny",
    "huggingface:tiny", "tiny/option=1", "tiny\0",
  ],
)  # fmt: skip
def test_names_that_are_none_of_tfds_are_refused_in_one_line(
  name, tfds_directory
):
  with pytest.raises(ValueError, match="is no name of a TFDS dataset") as found:
    sources.tfds(name, "train", tfds_directory)
  assert "\n" not in str(found.value)


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 10**5, "{}"])
def test_damaged_descriptions_of_tfds_are_refused_in_one_line(
  file, text, tfds_directory, tmp_path
):
  directory = _copied(tfds_directory, tmp_path)
  (directory / file).write_text(text)
  with pytest.raises(ValueError, match="is damaged") as found:
    sources.tfds("tiny", "train", str(tmp_path))
  assert "\n" not in str(found.value)
  (directory / file).unlink()
  with pytest.raises(ValueError, match=f"has no {file}"):
    sources.tfds("tiny", "train", str(tmp_path))


@pytest.mark.parametrize(
  "name", ["label.labels.txt", "features.json", "../.config/metadata.json"]
)
def test_pipes_of_a_tfds_dataset_are_not_waited_for(
  name, tfds_directory, tmp_path
):
  file = _copied(tfds_directory, tmp_path) / name
  file.unlink(missing_ok=True)
  file.parent.mkdir(exist_ok=True)
  os.mkfifo(file)
  with pytest.raises((ValueError, OSError), match="no regular file") as found:
    sources.tfds("tiny", "train", str(tmp_path))
  assert file.name in str(found.value)


def test_tfds_without_random_access_is_refused(tfds_directory, tmp_path):
  file = _copied(tfds_directory, tmp_path) / "dataset_info.json"
  file.write_text(file.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(ValueError, match='file_format="array_record"'):
    sources.tfds("tiny", "train", str(tmp_path))


def test_names_labels_and_sizes_make_the_fingerprint():
  create = lambda *a: sources.listed(["/x/a", "/x/b"], *a).fingerprint()
  first = create([0, 1], ["a", "b"], ["", ""], [3, 4])
  moved = sources.listed(["/y/a", "/y/b"], [0, 1], ["a", "b"], ["", ""], [3, 4])
  assert moved.fingerprint() == first
  assert (
    len(
      {
        first,
        create([0, 0], ["a", "b"], ["", ""], [3, 4]),
        create([0, 1], ["a", "c"], ["", ""], [3, 4]),
        create([0, 1], ["a", "b"], ["", ""], [3, 5]),
      }
    )
    == 4
  )


def test_fingerprints_of_folders_stay_the_same(tmp_path):
  """A run that has begun goes on, whatever the names are."""
  latin = os.fsdecode(b"b/\xe9.png")
  for name in ("a/2.JPG", "B/1.png", latin, "3.webp", "über.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(name.encode("utf-8", "surrogateescape"))
  (tmp_path / "a/2.json").write_text('{"caption": "birds"}')
  line = {"file_name": "3.webp", "text": ["x", "y"], "weights": [1 / 3, 1]}
  (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
  expected = [
    ("3.webp", 0, 6), ("B/1.png", 1, 7), ("a/2.JPG", 2, 7),
    ("b/\\udce9.png", 3, 7), ("über.png", 0, 9),
  ]  # fmt: skip
  source = sources.folder(str(tmp_path))
  assert [os.fsdecode(source[i].encoded) for i in (3, 4)] == [latin, "über.png"]
  assert source.classes == ["", "B", "a", "b"]
  text = "".join(f"{x}\n" for x in expected)
  assert source.fingerprint() == hashlib.sha256(text.encode()).hexdigest()
  caption = "Caption(text='x', weight=0.3333333333333333), "
  caption += "Caption(text='y', weight=1.0)"
  text += f"({caption})\n()\n(('2.json', 20),)\n()\n()\n"
  source = sources.folder(str(tmp_path), captions=True)
  copy = pickle.loads(pickle.dumps(source))
  assert copy.fingerprint() == hashlib.sha256(text.encode()).hexdigest()


def test_each_of_the_first_images_is_a_class(photographs):
  folder = sources.folder(str(photographs))
  found = pickle.loads(pickle.dumps(sources.ClassPerImage(folder, 5)))
  assert len(found) == 5
  assert found.classes == [folder.key(i) for i in range(5)]
  assert [found[i].label for i in range(5)] == list(range(5))
  assert found[3].encoded == folder[3].encoded
  assert found.name(3) == folder.name(3) and found.key(3) == folder.key(3)
  fingerprints = {
    source.fingerprint()
    for source in (folder, found, sources.ClassPerImage(folder, 6))
  }
  assert len(fingerprints) == 3


def _named(count, root="/x"):
  keys = [f"{i}.png" for i in range(count)]
  return sources.listed(
    [f"{root}/{key}" for key in keys], [0] * count, keys, [""], [1] * count
  )


def _keys(source):
  return [source.key(i) for i in range(len(source))]


def test_a_split_source_is_in_two_parts_of_about_the_size_asked_for():
  whole = _named(1000)
  training, held_out = sources.split(whole, 0.1)
  assert sorted(_keys(training) + _keys(held_out)) == sorted(_keys(whole))
  assert not set(_keys(training)) & set(_keys(held_out))
  assert 70 <= len(held_out) <= 130
  assert held_out.name(0) == f"/x/{held_out.key(0)}"
  assert training.fingerprint() != held_out.fingerprint()
  assert _keys(pickle.loads(pickle.dumps(held_out))) == _keys(held_out)


def test_what_is_held_out_depends_on_names_alone():
  """Not on where they are, nor on what else is there."""
  parts = sources.split(_named(100), 0.2)
  again = sources.split(_named(100, root="/elsewhere"), 0.2)
  more = sources.split(_named(200), 0.2)
  for part, same, larger in zip(parts, again, more, strict=True):
    assert _keys(part) == _keys(same)
    assert set(_keys(part)) < set(_keys(larger))


def test_the_first_held_out_images_are_no_neighbours():
  held_out = sources.split(_named(1000), 0.1)[1]
  first = [int(held_out.key(i).removesuffix(".png")) for i in range(10)]
  assert first != sorted(first) and max(first) - min(first) > 500


@pytest.mark.parametrize("part", [0.0001, 0.9999])
@pytest.mark.parametrize("count", [2, 3])
def test_of_few_images_one_is_in_either_part(count, part):
  training, held_out = sources.split(_named(count), part)
  assert len(training) >= 1 and len(held_out) >= 1
  assert len(training) + len(held_out) == count


def test_a_single_image_cannot_be_split():
  with pytest.raises(ValueError, match=r"0\.png is the only image"):
    sources.split(_named(1), 0.1)
  with pytest.raises(ValueError, match="between 0 and 1"):
    sources.split(_named(10), 1.0)
