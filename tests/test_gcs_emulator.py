"""The emulated storage does what tests of gs:// paths rely on."""

import http.client
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import tensorstore
from conftest import REPOSITORY

BUCKET = "dcae-emulator-test"
RETRIES = {"max_retries": 5, "initial_delay": "10ms", "max_delay": "50ms"}


@pytest.fixture
def bucket(emulator, monkeypatch):
  """A function of a bucket's name: it, through tensorstore."""
  # Read whenever a store is opened.
  for key in ("TENSORSTORE_GCS_HTTP_URL", "NO_GCE_CHECK"):
    monkeypatch.setenv(key, emulator.environment[key])
  emulator.create(BUCKET)
  emulator.forget()

  def open_store(name=BUCKET, path="run/"):
    context = {"gcs_request_retries": RETRIES}
    return tensorstore.KvStore.open(
      {"driver": "gcs", "bucket": name, "path": path, "context": context}
    ).result()

  yield open_store
  emulator.heal()
  for name in emulator.names(BUCKET):
    emulator.delete(BUCKET, name)


def _is_upload(method, path):
  return path.startswith("/upload/")


def test_objects_are_written_read_listed_and_deleted(emulator, bucket):
  store, other = bucket(), bucket(path="sun/")
  stamp = store.write("a", b"one").result()
  other.write("b", b"two").result()
  assert store.read("a").result().value == b"one"
  assert store.read("a").result().stamp.generation == stamp.generation
  assert store.read("b").result().state == "missing"
  assert store.list().result() == [b"a"]
  assert emulator.names(BUCKET) == ["run/a", "sun/b"]
  assert emulator.names(BUCKET, "sun/") == ["sun/b"]
  assert emulator.read(BUCKET, "run/a") == b"one"
  emulator.delete(BUCKET, "run/a")
  assert store.read("a").result().state == "missing"
  with pytest.raises(KeyError):
    emulator.read(BUCKET, "run/a")
  # What another path holds stays.
  store.delete_range(tensorstore.KvStore.KeyRange()).result()
  assert emulator.names(BUCKET) == ["sun/b"]
  assert emulator.uploads == [f"{BUCKET}/run/a", f"{BUCKET}/sun/b"]


def test_a_write_on_a_condition_holds_for_one_generation(emulator, bucket):
  store = bucket()
  absent = store.read("a").result().stamp.generation
  first = store.write("a", b"1", if_equal=absent).result().generation
  assert first
  assert not store.write("a", b"2", if_equal=absent).result().generation
  unchanged = store.read("a", if_not_equal=first).result()
  assert unchanged.state == "unspecified"
  assert store.write("a", b"3", if_equal=first).result().generation
  assert not store.write("a", b"4", if_equal=first).result().generation
  assert emulator.read(BUCKET, "run/a") == b"3"


@pytest.mark.parametrize("status", [429, 500, 503, None])
def test_a_passing_fault_is_tried_again(emulator, bucket, status):
  """None: the connection is dropped."""
  fault = lambda **how: (
    emulator.fail(status, **how) if status else emulator.drop(**how)
  )
  store = bucket()
  with fault(times=3) as found:
    store.write("a", b"one").result()
  assert found.hits == 3 and len(emulator.requests) == 4
  assert emulator.uploads == [f"{BUCKET}/run/a"]
  # Each second reading, and no writing.
  with fault(times=None, every=2, where=lambda method, _: method == "GET") as f:
    for _ in range(4):
      assert store.read("a").result().value == b"one"
    store.write("b", b"two").result()
  assert f.hits == 3
  assert store.read("a").result().value == b"one"
  # Written, but who wrote it does not hear of it.
  emulator.forget()
  with fault(times=2, where=_is_upload, done=True):
    store.write("a", b"two").result()
  assert emulator.uploads == 3 * [f"{BUCKET}/run/a"]


def test_a_lasting_fault_ends_the_retries(emulator, bucket):
  store = bucket()
  with emulator.fail(503, times=None) as fault:
    with pytest.raises(ValueError, match=r"retry attempts failed.*503"):
      store.read("a").result()
    assert fault.hits >= RETRIES["max_retries"]
  with emulator.fail(403), pytest.raises(ValueError, match="PERMISSION"):
    store.write("a", b"one").result()
  assert not emulator.uploads


def test_it_comes_back_on_its_port_with_its_objects(emulator, bucket):
  store = bucket()
  store.write("a", b"one").result()
  with (
    emulator.gone(),
    pytest.raises(ValueError, match="Could not connect"),
  ):
    store.read("a").result()
  assert store.read("a").result().value == b"one"


def test_missing_and_forbidden_buckets_answer_in_json(emulator, bucket):
  missing = bucket("dcae-missing")
  with pytest.raises(ValueError, match=r"NOT_FOUND.*bucket does not exist"):
    missing.write("a", b"one").result()
  assert missing.read("a").result().state == "missing"
  with emulator.forbid(BUCKET):
    with pytest.raises(ValueError, match=f"PERMISSION_DENIED.*{BUCKET}"):
      bucket().write("a", b"one").result()
    with pytest.raises(ValueError, match=f"PERMISSION_DENIED.*{BUCKET}"):
      bucket().read("a").result()
  bucket().write("a", b"one").result()
  # tensorstore reads no status of a list, and finds nothing in either.
  assert missing.list().result() == []
  for name, status in (("dcae-missing", 404), (BUCKET, 403)):
    address = f"{emulator.address}/storage/v1/b/{name}/o"
    with (
      emulator.forbid(BUCKET),
      pytest.raises(urllib.error.HTTPError) as found,
    ):
      urllib.request.urlopen(address)
    assert found.value.code == status
    assert f'"code": {status}'.encode() in found.value.read()
    found.value.close()


def test_a_dropped_connection_has_no_answer(emulator, bucket):
  with emulator.drop(), pytest.raises(http.client.RemoteDisconnected):
    urllib.request.urlopen(emulator.address)


def test_paths_work_through_the_faults(emulator, bucket):
  script = (
    "import sys\n"
    "from etils import epath\n"
    "root = epath.Path(sys.argv[1])\n"
    "(root / 'a').mkdir()\n"
    "(root / 'a' / 'b.txt').write_text('one')\n"
    "with (root / 'a' / 'c.bin').open('wb') as file:\n"
    "  file.write(bytes(1_000_000))\n"
    "assert (root / 'a' / 'b.txt').read_text() == 'one'\n"
    "assert len((root / 'a' / 'c.bin').read_bytes()) == 1_000_000\n"
    "assert [x.name for x in root.iterdir()] == ['a'], list(root.iterdir())\n"
    "(root / 'a' / 'b.txt').unlink()\n"
  )
  with emulator.drop(times=2, every=4) as fault:
    found = subprocess.run(
      [sys.executable, "-c", script, f"gs://{BUCKET}/paths"],
      cwd=REPOSITORY,
      env=emulator.environment,
      capture_output=True,
      text=True,
      check=False,
    )
  assert found.returncode == 0, found.stderr
  assert fault.hits == 2
  names = [n for n in emulator.names(BUCKET) if not n.endswith("/")]
  assert names == ["paths/a/c.bin"]
  assert emulator.uploads.count(f"{BUCKET}/paths/a/c.bin") == 1
