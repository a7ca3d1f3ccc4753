"""Images in a bucket, on a local emulator: what is asked for, and how often."""

import pickle
import tarfile

import gcsfs
import jax
import numpy as np
import pytest
from etils import epath

from configs import base
from data.test_parquet import write as write_parquet
from data.test_tar import described, picture, take, training, write_tar
from dcae_jax.data import sources
from dcae_jax.setup import image_sources


@pytest.fixture
def bucket(gs, emulator, monkeypatch):
  """An empty bucket, for gcsfs, too."""
  for key in ("STORAGE_EMULATOR_HOST", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"):
    monkeypatch.setenv(key, emulator.environment[key])
  gcsfs.GCSFileSystem.clear_instance_cache()
  yield gs
  gcsfs.GCSFileSystem.clear_instance_cache()


def _put(emulator, bucket, files):
  """Without a request for each."""
  name = bucket.removeprefix("gs://")
  for key, data in files.items():
    item = {"name": key, "bucket": name, "size": str(len(data))}
    item |= {"generation": "1", "contentType": "image/jpeg"}
    item |= {"crc32c": "", "md5Hash": ""}
    emulator._storage.create_file(name, key, data, item)
  emulator.forget()


def _asked(emulator):
  """Methods and kinds of what was asked for: listings, or objects' bytes."""
  found = [
    "media" if "alt=media" in path else "list" if "/o?" in path else path
    for method, path in emulator.requests
    if method == "GET"
  ]
  emulator.forget()
  return found


def _opened(workdir=None, **source):
  ((found, _),) = image_sources.weighted_sources(base.source(**source), workdir)
  return found


def test_a_remote_folder_is_listed_once_and_each_image_is_one_request(
  bucket, emulator, tmp_path, monkeypatch
):
  """A thousand objects a request; a later start asks for none."""
  root = f"{bucket}/images"
  files = {
    f"images/{i % 3}/{i:04d}.jpg": picture(value=i % 7) for i in range(40)
  }
  files |= {f"images/0/{i}.txt": b"a caption" for i in range(2460)}
  files |= {"images/0/a//.jpg": b"", "imagesbeside.jpg": b""}
  _put(emulator, bucket, files)
  workdir = epath.Path(f"{bucket}/run")
  source = _opened(workdir, path=f"{root}/")
  asked = _asked(emulator)
  assert asked.count("list") == 3
  names = [x for x in emulator.names("dcae-gs") if x.startswith("run/")]
  assert len(names) == 1 and names[0].startswith("run/indices/folder_")
  assert len(source) == 40 and source.classes == ["0", "1", "2"]
  assert source.name(0) == f"{root}/{source.key(0)}" == f"{root}/0/0000.jpg"
  fingerprint = source.fingerprint()
  copy = pickle.loads(pickle.dumps(source))
  assert _asked(emulator) == []
  for i in range(40):
    assert copy[i].encoded == files[f"images/{copy.key(i)}"]
  assert _asked(emulator) == ["media"] * 40
  again = _opened(workdir, path=root, captions=False)
  assert again.fingerprint() == fingerprint
  assert _asked(emulator).count("list") == 0
  # Neither does a process that is not the first.
  with monkeypatch.context() as other:
    other.setattr(jax, "process_index", lambda: 1)
    assert _opened(workdir, path=root).fingerprint() == fingerprint
    assert _asked(emulator) == ["media"]
    with pytest.raises(ValueError, match="not the same place for all"):
      _opened(epath.Path(tmp_path), path=root)
  # In another run, what was added is seen.
  _put(emulator, bucket, {"images/new.jpg": b""})
  assert len(_opened(workdir, path=root)) == 40
  assert len(_opened(epath.Path(tmp_path), path=root)) == 41
  emulator.delete("dcae-gs", "images/0/0000.jpg")
  with pytest.raises(FileNotFoundError, match="no such object"):
    source[0]


def test_captions_of_a_remote_folder_are_read_with_their_image(
  bucket, emulator
):
  files = {"a/1.jpg": b"1", "a/1.txt": b"a bus", "2.jpg": b"2"}
  files["metadata.jsonl"] = b'{"file_name": "2.jpg", "text": "b"}'
  _put(emulator, bucket, files)
  source = sources.folder(bucket, captions=True)
  assert [x.text for i in (0, 1) for x in source[i].captions] == ["b", "a bus"]


@pytest.mark.parametrize(
  "path", ["gs://no-such-bucket-anywhere/x", "s3://bucket/x"]
)
def test_what_cannot_be_listed_is_refused(bucket, path):
  with pytest.raises(ValueError, match=r"no such bucket|neither a local path"):
    sources.folder(path)
  with pytest.raises(ValueError, match=r"no such bucket|neither a local path"):
    sources.Tars(f"{path}.tar")


def test_a_bucket_that_refuses_to_be_listed_is_one_line(bucket, emulator):
  with (
    emulator.fail(418, times=None),
    pytest.raises(ValueError, match="cannot be listed"),
  ):
    sources.folder(bucket)


def test_remote_tars_are_streamed_once_and_read_by_ranges(
  bucket, emulator, photographs, tmp_path, monkeypatch
):
  monkeypatch.setattr("dcae_jax.data.sources.tar._AHEAD", 40_000)
  folder = sources.folder(str(photographs))
  for i, part in enumerate(np.array_split(np.arange(12), 3)):
    members = {folder.key(j): folder[j].encoded for j in part.tolist()}
    write_tar(tmp_path / f"{i:02d}.tar", members)
  local = sources.Tars(str(tmp_path))
  files = {f"tars/{x.name}": x.read_bytes() for x in tmp_path.glob("*.tar")}
  _put(emulator, bucket, files)
  workdir = epath.Path(f"{bucket}/run")
  for path in ("tars", "tars/0[012].tar", "tars/{00..02}.tar"):
    source = sources.Tars(f"{bucket}/{path}")
    assert source.fingerprint() == local.fingerprint()
  _asked(emulator)
  source = _opened(workdir, kind="tar", path=f"{bucket}/tars/*.tar")
  blocks = sum(-(-len(data) // 40_000) for data in files.values())
  assert blocks <= _asked(emulator).count("media") - 1 <= blocks + 3
  assert described(source) == described(local) == described(folder)
  assert _asked(emulator) == ["media"] * 3 * 12
  assert take(training(source, workers=0), 6) == take(training(folder), 6)
  _asked(emulator)
  _opened(workdir, kind="tar", path=f"{bucket}/tars/*.tar")
  assert _asked(emulator).count("media") == 1  # the index
  # Those that change are read again.
  _put(emulator, bucket, {"tars/01.tar": files["tars/01.tar"] + bytes(512)})
  _opened(workdir, kind="tar", path=f"{bucket}/tars/*.tar")
  assert _asked(emulator).count("media") > 2
  with pytest.raises(ValueError, match=r"no file '.*/03.tar'"):
    sources.Tars(f"{bucket}/tars/{{00..03}}.tar")
  with pytest.raises(ValueError, match=r"holds or matches no .tar file"):
    sources.Tars(f"{bucket}/tars/none.tar")


def test_a_remote_row_group_is_one_request(bucket, emulator, tmp_path):
  noise = np.random.default_rng(0).bytes
  values = {"jpg": [noise(40_000) for _ in range(12)], "cls": list(range(12))}
  write_parquet(tmp_path / "a.parquet", values, 3)
  local = sources.Parquet(str(tmp_path), {})
  _put(emulator, bucket, {"a.parquet": (tmp_path / "a.parquet").read_bytes()})
  source = sources.Parquet(f"{bucket}/a.parquet", {})
  assert source.fingerprint() == local.fingerprint()
  _asked(emulator)
  assert described(source) == described(local)
  assert _asked(emulator) == ["media"] * (1 + 4)  # the footer


def test_an_index_is_kept_until_what_it_is_of_changes(tmp_path, monkeypatch):
  write_tar(tmp_path / "tars/a.tar", {"1.jpg": b"1"})
  workdir = epath.Path(tmp_path) / "run"
  source = {"kind": "tar", "path": str(tmp_path / "tars")}
  before = _opened(workdir, **source).fingerprint()
  (kept,) = (workdir / "indices").iterdir()
  scan = tarfile.open
  monkeypatch.setattr(tarfile, "open", None)
  assert _opened(workdir, **source).fingerprint() == before
  monkeypatch.setattr(tarfile, "open", scan)
  write_tar(tmp_path / "tars/a.tar", {"1.jpg": b"11"})
  assert _opened(workdir, **source).fingerprint() != before
  assert len(list((workdir / "indices").iterdir())) == 2
  kept.write_bytes(b"no table")
  write_tar(tmp_path / "tars/a.tar", {"1.jpg": b""})
  (tmp_path / "tars/a.tar").write_bytes(b"")
  with pytest.raises(ValueError, match=r"a.tar is cut off"):
    _opened(workdir, **source)
  assert len(list((workdir / "indices").iterdir())) == 2
