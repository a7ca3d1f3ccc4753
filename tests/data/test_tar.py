import io
import os
import pathlib
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from dcae_jax.data import batches, images, sources


def write_tar(path, members, **options):
  """Members by name: bytes, files, or what a TarInfo is changed to."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w", **options) as tar:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      if isinstance(data, dict):
        info.type = data.get("type", tarfile.REGTYPE)
        info.linkname = data.get("linkname", "")
        info.pax_headers = data.get("pax", {})
        data = b""
      if isinstance(data, pathlib.Path):
        data = data.read_bytes()
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


def picture(width=20, height=16, value=0, exif=None, kind="JPEG"):
  buffer = io.BytesIO()
  image = Image.new("RGB", (width, height), (value, 100, 200))
  image.save(buffer, kind, **({"exif": exif} if exif else {}))
  return buffer.getvalue()


def tars_of(folder, directory, number=2):
  """The images of a folder in tars, in its order."""
  source = sources.folder(str(folder))
  parts = np.array_split(np.arange(len(source)), number)
  for i, part in enumerate(parts):
    members = {
      source.key(j): pathlib.Path(source.name(j)) for j in part.tolist()
    }
    write_tar(directory / f"train-{i:04d}.tar", members)
  return source


def training(source, **reading):
  iterator = images.TrainingImages(
    [(source, 1.0)],
    images.Decoding(),
    images.Cropping("random_resized_crop", 16, flip=True),
    batches.Reading(**({"batch_size": 4, "threads": 2} | reading)),
    seed=3,
  )
  return iterator


def take(iterator, n):
  found = [next(iterator) for _ in range(n)]
  iterator.close()
  return [(x["images"].tobytes(), x["labels"].tolist()) for x in found]


def described(source):
  return [
    (source.key(i), source[i].encoded, source[i].label, source[i].captions)
    for i in range(len(source))
  ]


def test_tars_of_a_folder_train_as_the_folder(photographs, tmp_path):
  folder = tars_of(photographs, tmp_path)
  source = sources.Tars(str(tmp_path))
  assert described(source) == described(folder)
  assert source.classes == folder.classes
  expected = take(training(folder), 6)
  assert take(training(source), 6) == expected
  again = training(source, workers=2)
  again.set_state(training(source).get_state() | {"next_batch": 4})
  assert take(again, 2) == expected[4:]
  halves = [
    take(training(source, batch_size=2, process_count=2, process_index=i), 6)
    for i in range(2)
  ]
  for (_, labels), (_, first), (_, second) in zip(
    expected, *halves, strict=True
  ):
    assert labels[::2] == first and labels[1::2] == second


def test_samples_have_captions_and_classes_in_files_beside_them(tmp_path):
  exif = Image.Exif()
  exif[274] = 6
  members = {
    "./0/a.jpg": picture(),
    "./0/a.txt": b"a red bus\nein Bus",
    "./0/a.cls": b"7\n",
    "0/b.json": b'{"caption": "birds", "label": 3, "width": 1}',
    "0/b.txt": b"overruled",
    "0/b.PNG": picture(kind="PNG"),
    "0/b.mask.png": picture(kind="PNG"),
    "0/c.json": b'{"cls": 1, "captions": [1]}',
    f"{'x' * 150}/größer.d.jpg": picture(30, 10, exif=exif.tobytes()),
    f"{'x' * 150}/größer.cls": b"12",
    "0/c.jpg": b"no image",
    "0/._c.jpg": b"hidden",
  }
  for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
    write_tar(tmp_path / "a.tar", members, format=format)
    source = sources.Tars(str(tmp_path / "a.tar"), captions=True)
    source = pickle.loads(pickle.dumps(source))
    keys = [source.key(i) for i in range(len(source))]
    assert keys == [
      "0/a.jpg", "0/b.PNG", f"{'x' * 150}/größer.d.jpg", "0/c.jpg",
    ]  # fmt: skip
    records = [source[i] for i in range(3)]
    assert [record.label for record in records] == [7, 3, 12]
    assert [[x.text for x in record.captions] for record in records] == [
      ["a red bus", "ein Bus"], ["birds"], [],
    ]  # fmt: skip
    assert source.sizes().tolist() == [[20, 16], [20, 16], [10, 30], [1, 1]]
    with pytest.raises(OSError, match="captions are no texts"):
      source[3]
    plain = sources.Tars(str(tmp_path / "a.tar"))
    assert plain[3].encoded == b"no image" and not plain[3].captions
    assert source.classes == []
  write_tar(tmp_path / "b.tar", {"1.jpg": picture(), "1.cls": b"cat"})
  named = sources.Tars(str(tmp_path / "b.tar"))
  assert named.classes == ["cat"] and named[0].label == 0
  with pytest.raises(ValueError, match="has no captions"):
    sources.Tars(str(tmp_path / "b.tar"), captions=True)


def test_a_tar_for_each_class_is_a_class_and_numbered_ones_are_none(tmp_path):
  for name in ("n02", "n07", "0", "1"):
    write_tar(tmp_path / f"{name}.tar", {f"{name}_3.JPEG": picture()})
  source = sources.Tars(str(tmp_path / "n*.tar"))
  assert source.classes == ["n02", "n07"]
  assert [source[i].label for i in range(2)] == [0, 1]
  for pattern in ("{0..1}.tar", "{0,1}.tar", "n02.tar"):
    assert sources.Tars(str(tmp_path / pattern)).classes == [""]
  assert len(sources.Tars(str(tmp_path))) == 4
  for pattern in ("{0..2}.tar", "{0..99999999999}.tar"):
    with pytest.raises(ValueError, match=r"no file '.*/2.tar', of"):
      sources.Tars(str(tmp_path / pattern))
  os.rename(tmp_path / "0.tar", os.fsencode(tmp_path) + b"/\xff.tar")
  with pytest.raises(ValueError, match=r"has names that are no UTF-8; rename"):
    sources.Tars(str(tmp_path))


def _header_zeroed(path):
  data = bytearray(path.read_bytes())
  with tarfile.open(path) as tar:
    start = tar.getmembers()[1].offset
  data[start : start + 512] = bytes(512)
  path.write_bytes(data)


def _header_damaged(path):
  data = bytearray(path.read_bytes())
  with tarfile.open(path) as tar:
    start = tar.getmembers()[1].offset
  data[start : start + 100] = b"x" * 100
  path.write_bytes(data)


def _sized(size):
  """The second header says so, in base 256."""

  def damage(path):
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
      start = tar.getmembers()[1].offset
    data[start + 124 : start + 136] = (size % 2**96).to_bytes(12, "big")
    data[start + 148 : start + 156] = b" " * 8
    total = sum(data[start : start + 512])
    data[start + 148 : start + 156] = b"%06o\0 " % total
    path.write_bytes(data)

  return damage


def _cut(size):
  return lambda path: path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (_header_zeroed, "has a hole at byte"),
    (_header_damaged, "has a hole at byte"),
    (_sized(-512), "2.jpg has -512 bytes"),  # back to itself, for ever
    (_sized(2**95 + 2**80), r"2.jpg has [\d,]+ bytes"),
    (_sized(2**95 + 2**46), r"2.jpg has [\d,]+ bytes"),
    (_cut(5 * 512), "cut off, damaged, or no uncompressed tar"),
    (_cut(3 * 512), "has no mark of its end"),
    (_cut(6 * 512 + 300), "is cut off"),
    (_cut(0), "cut off, damaged, or no uncompressed tar .empty file"),
    (lambda path: path.write_bytes(b"x" * 2000), "or no uncompressed tar"),
  ],
)
def test_a_tar_with_a_hole_is_refused(tmp_path, damage, message):
  path = tmp_path / "a.tar"
  noise = np.random.default_rng(0).bytes(700)
  write_tar(path, {"1.jpg": noise, "2.jpg": noise, "3.jpg": noise})
  assert len(sources.Tars(str(path))) == 3
  damage(path)
  with pytest.raises(ValueError, match=message) as refused:
    sources.Tars(str(path))
  assert "\n" not in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize(
  ("tars", "message"),
  [
    ([{"a/1.jpg": b""}, {"a/1.jpg": b""}], "0.tar and .*1.tar hold a/1.jpg tw"),
    ([{"1.jpg": b"", "1.png": b""}], "two images of one key, 1.jpg and 1.png"),
    ([{"1.txt": b"", "1.tif.gz": b""}], "holds no images"),
    ([{"1.jpg": b"", "1.cls": b"1", "2.jpg": b""}], "2.jpg has no class"),
    ([{"1.jpg": {"type": tarfile.GNUTYPE_SPARSE}}], "sparse|cut off"),
    ([{"1.jpg": {"pax": {"GNU.sparse.map": "x"}}}], "no uncompressed tar"),
  ],
)
def test_tars_that_are_not_as_they_should_be_are_refused(
  tmp_path, tars, message
):
  for i, members in enumerate(tars):
    write_tar(tmp_path / f"{i}.tar", members)
  with pytest.raises(ValueError, match=message):
    sources.Tars(str(tmp_path))


def test_a_key_that_is_twice_in_a_tar_is_refused(tmp_path):
  with tarfile.open(tmp_path / "a.tar", "w") as tar:
    for _ in range(2):
      tar.addfile(tarfile.TarInfo("1.jpg"))
  with pytest.raises(ValueError, match=r"two images of one key, 1.jpg and 1"):
    sources.Tars(str(tmp_path))


def test_compressed_tars_and_none_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"source.path is empty"):
    sources.Tars("")
  with pytest.raises(ValueError, match=r"cannot be listed \(No such file"):
    sources.Tars(str(tmp_path / "a.tar"))
  write_tar(tmp_path / "a.tar.gz", {"1.jpg": b""})
  for path in (tmp_path, tmp_path / "a.tar.gz"):
    with pytest.raises(ValueError, match=r"no .tar file, but 1 compr.*decompr"):
      sources.Tars(str(path))


def test_links_are_left_out_with_their_number(tmp_path, caplog):
  link = {"type": tarfile.SYMTYPE, "linkname": "1.jpg"}
  members = {"d": {"type": tarfile.DIRTYPE}, "1.jpg": b"1", "2.jpg": link}
  write_tar(tmp_path / "a.tar", members)
  assert len(sources.Tars(str(tmp_path))) == 1
  assert "a.tar: 1 links left out" in caplog.text


def test_a_tar_that_changes_meanwhile_is_refused(tmp_path):
  write_tar(tmp_path / "a.tar", {"1.jpg": b"1" * 600, "2.jpg": b"2" * 600})
  source = sources.Tars(str(tmp_path))
  before = source.fingerprint()
  write_tar(tmp_path / "a.tar", {"1.jpg": b"1" * 500, "2.jpg": b"2" * 600})
  assert sources.Tars(str(tmp_path)).fingerprint() != before
  for i in range(2):
    with pytest.raises(ValueError, match=r"a.tar has changed since"):
      source[i]
  os.unlink(tmp_path / "a.tar")
  with pytest.raises(FileNotFoundError, match="it is gone"):
    source[0]
