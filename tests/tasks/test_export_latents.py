"""Images to latents: what is written, and that nothing is lost or mixed."""

import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import kills
import numpy as np
import pytest
from conftest import (
  REPOSITORY,
  run_main,
  said_made,
  save_tiny_autoencoder,
  smooth_image,
)
from etils import epath
from PIL import Image

import dcae_jax
from configs import base
from dcae_jax.data import images, sources
from dcae_jax.latents import encode as latent_encoding
from dcae_jax.latents import layout as store_layout
from dcae_jax.latents import reader, rows
from dcae_jax.latents import store as latent_store
from dcae_jax.runs import metrics_writer, stopwatch, storage
from dcae_jax.tasks import export_latents, inspect_latents

SIDE = 32
LAYOUT = store_layout.Layout(
  42, (4, 4, 16), "float32", store_layout.VIEWS, shard_rows=16
)
BAD = {
  "animals/07_broken.jpg": b"no picture",
  "animals/08_empty.png": b"",
  "zoo/99_cut.png": None,  # the first half of a picture
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """42 images in three classes, and three files that are none."""
  root = tmp_path_factory.mktemp("pictures")
  for i in range(42):
    folder = root / ("animals", "places", "zoo")[i % 3]
    folder.mkdir(exist_ok=True)
    pixels = smooth_image(i, 40 + i, 80 - i)
    Image.fromarray(pixels).save(folder / f"{i:02d}.png")
  whole = (root / "zoo" / "41.png").read_bytes()
  for name, content in BAD.items():
    (root / name).write_bytes(content or whole[: len(whole) // 2])
  return root


@pytest.fixture(scope="module")
def config(pictures, tiny_autoencoder, compilation_cache):
  """A function: the export of the pictures, three shards."""

  def create(**changes):
    c = base.export_latents()
    c.init_from = str(tiny_autoencoder)
    c.source = base.source("folder", str(pictures))
    c.resolution = SIDE
    c.dtype = "float32"
    c.flip = True
    c.batch_size_per_device = 2
    c.threads = 2
    c.retries = 6
    c.compilation_cache = compilation_cache
    c.update_from_flattened_dict(changes)
    return c

  return create


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> str:
  """The store of an export that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("whole") / "out"
  assert export_latents.run(config(), epath.Path(workdir))
  return str(workdir / "latents")


def check_equal(found: str, expected: str) -> None:
  """The same objects, with the same bytes; the manifest names devices."""
  found, expected = storage.Storage(found), storage.Storage(expected)
  keys = expected.list_keys()
  assert found.list_keys() == keys and len(keys) > 12
  for key in keys - {"manifest.json"}:
    assert found.read(key) == expected.read(key), key
  manifests = [x.read_json("manifest.json") for x in (found, expected)]
  for manifest in manifests:
    manifest["versions"].pop("devices")
  assert manifests[0] == manifests[1]


def test_rows_are_the_latents_of_the_images(whole, pictures, tiny_autoencoder):
  source = reader.Latents(whole)
  manifest = source.manifest
  names = [
    os.path.relpath(file, pictures)
    for file in sorted(pictures.rglob("*"))
    if file.is_file()
  ]
  good = [name for name in names if name not in BAD]
  assert source.keys() == good and manifest["count"] == 42
  assert source.classes == ["animals", "places", "zoo"]
  classes = [source.classes[label] for label in source.condition("labels")]
  assert classes == [name.split("/")[0] for name in good]
  unreadable = {x["key"]: x["reason"] for x in manifest["unreadable"]}
  assert unreadable.keys() == BAD.keys() and all(unreadable.values())
  assert [names[x["index"]] for x in manifest["unreadable"]] == list(BAD)
  ae = dcae_jax.load(tiny_autoencoder)
  for row in (0, 17, 41):
    file = sources.pictures(str(pictures / good[row]))
    image, _ = images.open_image(file, 0, images.Decoding())
    pixels = images.crop(image, images.Cropping("dm_crop", SIDE), None)
    mirrored = np.stack([pixels, pixels[:, ::-1]])
    expected = np.asarray(ae.encode(mirrored))
    found = source.read_unscaled([row, 42 + row])
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    scaled = source.read([row, 42 + row])["latents"]
    np.testing.assert_allclose(scaled, expected * 0.5, atol=1e-4, rtol=1e-4)
  stored = source.read_unscaled(np.arange(84)).astype(np.float64)
  channels = manifest["statistics"]["channels"]
  np.testing.assert_allclose(channels["mean"], stored.mean((0, 1, 2)))
  np.testing.assert_allclose(channels["std"], stored.std((0, 1, 2)))
  rms = np.sqrt(np.square(stored).mean((0, 1, 2)))
  np.testing.assert_allclose(channels["rms"], rms)
  assert manifest["scaling_factor"] == 0.5
  assert manifest["autoencoder"]["variant"] == "tiny-f8"
  assert manifest["autoencoder"]["init_from"] == str(tiny_autoencoder)
  assert manifest["resolution"] == SIDE
  assert "halved by boxes" in manifest["crop"]["rule"]


def test_the_summary_tells_where_the_time_went(whole):
  result = json.loads((pathlib.Path(whole).parent / "result.json").read_text())
  seconds = result["seconds"]
  parts = sum(value for name, value in seconds.items() if name != "total")
  assert parts == pytest.approx(seconds["total"])
  assert min(seconds.values()) > -0.01
  assert result["encoder_share"] == pytest.approx(
    seconds["encoder"] / seconds["total"]
  )
  assert 0 < result["encoder_share"] < 1


def test_stored_types_round_the_same_latents(whole, config, tmp_path):
  exact = reader.Latents(whole).read_unscaled(np.arange(42))
  for dtype, step in (("float16", 2.0**-11), ("bfloat16", 2.0**-8)):
    workdir = epath.Path(tmp_path / dtype)
    export_latents.run(config(dtype=dtype, flip=False), workdir)
    source = reader.Latents(str(workdir / "latents"))
    found = source.read_unscaled(np.arange(42))
    np.testing.assert_allclose(found, exact, rtol=1.01 * step, atol=1e-5)
    assert (found != exact).any()
    assert source.manifest["views"] == ["latents"] and len(source) == 42


def test_random_crops_follow_the_seed_alone(config, tmp_path):
  found = {}
  for name, seed, size in (("a", 0, 2), ("b", 0, 4), ("c", 1, 2)):
    changes = {
      "crop": "random_resized_crop", "crops_per_image": 3, "seed": seed,
      "batch_size_per_device": size, "flip": False, "max_images": 9,
    }  # fmt: skip
    export_latents.run(config(**changes), epath.Path(tmp_path / name))
    source = reader.Latents(str(tmp_path / name / "latents"))
    assert source.keys() == [k for k in source.keys()[::3] for _ in range(3)]
    found[name] = source.read_unscaled(np.arange(len(source)))
  assert len(found["a"]) == 21
  changes["crops_per_image"], changes["seed"] = 3, 5
  with pytest.raises(ValueError, match=r"crop\.seed: 1 there, 5 now"):
    export_latents.run(config(**changes), epath.Path(tmp_path / "c"))
  np.testing.assert_allclose(found["a"], found["b"], atol=1e-5)
  assert not np.allclose(found["a"], found["c"], atol=1e-2)
  assert not np.allclose(found["a"][0], found["a"][1], atol=1e-2)


class _Killed(BaseException):
  """As a kill: nothing catches it."""


def test_stopped_before_any_write_it_ends_equal(
  whole, config, tmp_path, monkeypatch
):
  """Each start dies at a later write; nothing finished is encoded again."""
  written, limit, encoded = [], [0], []

  def limited(original):
    def write(self, *arguments):
      written.append(arguments)
      if len(written) > limit[0]:
        raise _Killed
      original(self, *arguments)

    return write

  for name in ("write", "write_rows"):
    original = getattr(storage.Storage, name)
    monkeypatch.setattr(storage.Storage, name, limited(original))
  load = rows.Crops.load
  monkeypatch.setattr(
    rows.Crops, "load", lambda *a: encoded.append(a[1]) or load(*a)
  )
  workdir, starts = epath.Path(tmp_path / "out"), 0
  store = latent_store.LatentStore(str(workdir / "latents"))
  while store.manifest() is None:
    limit[0], starts = 2 + starts, starts + 1
    written.clear()
    encoded.clear()
    before = set(store.finished(LAYOUT))
    try:
      export_latents.run(config(), workdir)
    except _Killed:
      assert starts < 60  # a whole export writes fewer times
    assert before <= set(store.finished(LAYOUT)) or (
      store.manifest() is not None
    )
    if before:
      assert len(encoded) <= max(45 - 16 * len(before), 0)
  assert starts > 4
  limit[0] = 10**6
  encoded.clear()
  export_latents.run(config(), workdir)  # and once more, for nothing
  assert not encoded
  monkeypatch.undo()
  check_equal(str(workdir / "latents"), whole)


def test_killed_before_its_result_it_has_one_in_the_end(
  config, tmp_path, monkeypatch, caplog
):
  def kill(*_):
    raise _Killed

  caplog.set_level("INFO")
  few = config(max_images=3, flip=False)
  with monkeypatch.context() as patch, pytest.raises(_Killed):
    patch.setattr(metrics_writer, "write_json", kill)
    export_latents.run(few, epath.Path(tmp_path))
  assert (tmp_path / "latents/manifest.json").exists()
  for _ in range(2):
    assert export_latents.run(few, epath.Path(tmp_path))
    assert said_made(caplog.text) == {"latents", "result"}
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text)["count"] == 3
  export_latents.run(few, epath.Path(tmp_path))
  assert (tmp_path / "result.json").read_text() == text


def test_another_export_is_refused_and_nothing_is_touched(
  whole, config, pictures, tmp_path
):
  other_weights = save_tiny_autoencoder(tmp_path / "weights", seed=1)
  other_source = tmp_path / "pictures"
  for file in sorted(pictures.rglob("*.png"))[:20]:
    target = other_source / file.relative_to(pictures)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(file.read_bytes())
  before = {p: p.stat().st_mtime_ns for p in pathlib.Path(whole).rglob("*")}
  for changes, what in (
    ({"init_from": str(other_weights)}, "autoencoder.encoder_sha256"),
    ({"resolution": 40}, "resolution: 32 there, 40 now"),
    ({"source.path": str(other_source)}, "source.fingerprint"),
    ({"max_images": 9}, "source.images: 45 there, 9 now"),
    ({"dtype": "float16"}, "dtype"),
    ({"flip": False}, "views"),
    ({"crop": "random_crop"}, "crop.kind"),
    ({"min_size": 1}, "crop.min_size: 0 there, 1 now"),
    ({"max_megapixels": 80.0}, "crop.max_megapixels"),
    ({"compute_dtype": "bfloat16"}, "autoencoder.compute_dtype"),
    ({"shard_rows": 32}, "shard_rows: 16 there, 32 now"),
    ({"scaling_factor": 0.25}, "scaling_factor: 0.5 there, 0.25 now"),
  ):
    changed = config(output=whole, **changes)
    with pytest.raises(ValueError, match=f"of another export .*{what}"):
      export_latents.run(changed, epath.Path(tmp_path / "out"))
  after = {p: p.stat().st_mtime_ns for p in pathlib.Path(whole).rglob("*")}
  changed = {p for p in after | before if after.get(p) != before.get(p)}
  assert changed <= {pathlib.Path(whole)}  # where it was tried to write


def test_a_changed_file_is_another_source(config, pictures, tmp_path):
  copy = tmp_path / "pictures"
  shutil.copytree(pictures, copy)
  moved = config(**{"source.path": str(copy), "flip": False})
  export_latents.run(moved, epath.Path(tmp_path / "out"))
  shutil.move(copy, tmp_path / "elsewhere")  # the same images
  moved.source.path = str(tmp_path / "elsewhere")
  export_latents.run(moved, epath.Path(tmp_path / "out"))
  pixels = smooth_image(99, 50, 50)
  Image.fromarray(pixels).save(tmp_path / "elsewhere/zoo/41.png")
  with pytest.raises(ValueError, match=r"source\.fingerprint"):
    export_latents.run(moved, epath.Path(tmp_path / "out"))


def test_what_is_begun_without_a_shard_may_be_corrected(
  whole, config, tmp_path, monkeypatch
):
  with pytest.raises(ValueError, match="none of the 45 images can be used"):
    export_latents.run(config(min_size=10**6), epath.Path(tmp_path))
  with monkeypatch.context() as patch:
    patch.setattr(storage.Storage, "free_bytes", lambda self: 100)
    other = config(max_images=3, dtype="float16", shard_rows=32)
    with pytest.raises(ValueError, match="no space left for latents"):
      export_latents.run(other, epath.Path(tmp_path))
  export_latents.run(config(), epath.Path(tmp_path))
  check_equal(str(tmp_path / "latents"), whole)


def test_a_refined_decoder_goes_on_with_the_latents(
  whole, config, tiny_autoencoder, tmp_path
):
  """The third phase leaves the encoder, and so the latents, as they are."""
  ae = dcae_jax.load(tiny_autoencoder)
  head = ae.variables["params"]["decoder"]["project_out"]["conv"]
  head["kernel"] = head["kernel"] * 0.9
  ae.save(tmp_path / "refined")
  refined = config(init_from=str(tmp_path / "refined"), output=whole)
  assert export_latents.run(refined, epath.Path(tmp_path / "out"))
  _inspect(whole, tmp_path / "in", init_from=refined.init_from, samples=1)


def test_an_unknown_scaling_factor_is_measured(
  config, tiny_autoencoder, tmp_path
):
  folder = tmp_path / "weights"
  folder.mkdir()
  (file,) = tiny_autoencoder.glob("*.safetensors")  # and no config
  shutil.copy(file, folder)
  unknown = config(init_from=str(folder))
  export_latents.run(unknown, epath.Path(tmp_path))
  source = reader.Latents(str(tmp_path / "latents"))
  scaled = source.read(np.arange(len(source)))["latents"]
  assert np.sqrt(np.square(scaled, dtype=float).mean()) == pytest.approx(1)
  assert source.manifest["scaling_factor_origin"].startswith("1 / RMS")
  assert export_latents.run(unknown, epath.Path(tmp_path))  # as it is
  with pytest.raises(ValueError, match="were multiplied by is not known"):
    imported = {"source.kind": "npy", "source.path": str(folder)}
    (folder / "a.npy").write_bytes(b"")
    export_latents.run(
      config(init_from=str(folder), flip=False, **imported),
      epath.Path(tmp_path / "import"),
    )


def test_sigterm_while_images_are_read(whole, config, tmp_path, monkeypatch):
  load = rows.Crops.load
  stop = lambda *a: os.kill(os.getpid(), signal.SIGTERM) or load(*a)
  monkeypatch.setattr(rows.Crops, "load", stop)
  assert not export_latents.run(config(), epath.Path(tmp_path))
  monkeypatch.undo()
  assert latent_store.LatentStore(str(tmp_path / "latents")).manifest() is None
  assert export_latents.run(config(), epath.Path(tmp_path))
  check_equal(str(tmp_path / "latents"), whole)


def test_each_image_is_decoded_once(config, tmp_path, monkeypatch):
  opened, original = [], Image.open
  monkeypatch.setattr(
    Image, "open", lambda *a, **k: opened.append(a) or original(*a, **k)
  )
  export_latents.run(config(), epath.Path(tmp_path))
  assert len(opened) == 42 + len(BAD)


def test_an_image_is_decoded_once_for_its_crops_up_to_a_group(
  config, tmp_path, monkeypatch
):
  opened = []
  original = images.open_image
  monkeypatch.setattr(
    images, "open_image", lambda *a: opened.append(a[1]) or original(*a)
  )
  changes = {"crop": "random_crop", "crops_per_image": 8, "flip": False}
  changes["batch_size_per_device"] = 4
  export_latents.run(config(**changes, max_images=3), epath.Path(tmp_path))
  assert len(opened) == 3 * 2  # for each four of its crops


class _Slow(latent_store.LatentStore):
  """A store that takes its time."""

  def write_shard(self, *arguments):
    time.sleep(0.2)


def test_time_is_told_by_who_waited_for_whom(tmp_path):
  batch = rows.Batch(
    np.zeros((1, 2, 2, 3)), [rows.Group(0, [0], {"labels": [0]}, {})]
  )
  latent = {"latents": np.zeros((1, 2, 2, 3), np.float32)}
  layout = store_layout.Layout(16, (2, 2, 3), "float32", ("latents",), 16)

  def load(count, seconds):
    for _ in range(count):
      time.sleep(seconds)
      yield batch

  def encode(values, seconds):
    time.sleep(seconds)
    return latent

  found = {}
  for name in ("waiting for images", "encoder", "waiting for the store"):
    loading = 0.1 if name == "waiting for images" else 0.0
    slow = functools.partial(encode, seconds=0.1 * (name == "encoder"))
    watch = stopwatch.Stopwatch()
    with latent_encoding.ShardWriter(_Slow(str(tmp_path)), layout) as writer:
      for done, values in latent_encoding.encoded(
        load(6, loading), slow, writer, watch
      ):
        writer.add(values | done.groups[0].conditions, ["a"])
        if name == "waiting for the store":
          writer.finish_shard(0, {})
    found[name] = watch.seconds()
  # An encoder that is called in this thread counts from the call on.
  assert found["encoder"]["encoder"] > 0.5
  assert found["waiting for images"]["waiting for images"] > 0.35
  assert found["waiting for the store"]["waiting for the store"] > 0.15
  assert found["waiting for the store"]["encoder"] < 0.1


def test_a_disk_that_cannot_be_read_is_no_unreadable_image(
  config, tmp_path, monkeypatch
):
  def fail(self, index):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr("dcae_jax.data.sources.Files.__getitem__", fail)
  monkeypatch.setattr(images, "_DELAYS", (0,))
  with pytest.raises(OSError, match="Input/output error"):
    export_latents.run(config(), epath.Path(tmp_path))


def test_latents_that_are_not_finite_are_refused(config, tmp_path, whole):
  folder = tmp_path / "large"
  ae = dcae_jax.load(config().init_from)
  ae.variables = jax.tree.map(lambda x: x, ae.variables)
  out = ae.variables["params"]["encoder"]["project_out"]["conv"]
  out["kernel"] = out["kernel"] * 1e6
  ae.save(folder)
  large = config(init_from=str(folder), dtype="float16")
  with pytest.raises(FloatingPointError, match=r"not finite in float16"):
    export_latents.run(large, epath.Path(tmp_path / "out"))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"init_from": ""}, "init_from is empty"),
    ({"resolution": 36}, "not divisible by 8"),
    (
      {
        "resolution": 2**14,
        "batch_size_per_device": 2**16,
        "shard_rows": 2**16,
      },
      r"too little memory: 65536 images of 16384x16384 px and their latents "
      r"\([\d,]+ GB\) need at least .* lower config\.batch_size_per_device",
    ),
    ({"source.path": ""}, r"^config\.source\.path is empty; name a folder"),
    ({"dtype": "float64"}, "config.dtype='float64' is not among float32"),
    ({"compute_dtype": "int8"}, "int8"),
    ({"shard_rows": 24}, "shard_rows=24 is not a multiple of 16"),
    ({"crop": "middle"}, "unknown crop 'middle'"),
    ({"crops_per_image": 2}, "would all be the same"),
    ({"batch_size_per_device": 0}, "batch_size_per_device=0 is below 1"),
    ({"min_area": float("nan")}, "min_area=nan"),
    ({"retries": -1}, "retries=-1"),
    ({"source.kind": "npy"}, "config.flip and config.crops_per_image need"),
    ({"source.kind": "zip"}, "unknown config.source.kind='zip'"),
    ({"source.kind": "mixture"}, "mixture"),
    (
      {"source.path": "/nowhere"},
      "image folder '/nowhere'",
    ),
    ({"output": "gs://x"}, "neither a local path nor gs://BUCKET/PATH"),
  ],
)
def test_bad_configs_are_refused(changes, message, config, tmp_path):
  with pytest.raises(ValueError, match=message):
    export_latents.run(config(**changes), epath.Path(tmp_path / "out"))
  assert not (tmp_path / "out/latents/zarr.json").exists()


def _start(config, workdir, environment=None, *more, driver=""):
  """The command line in the background; `driver` runs before it."""
  flags = [
    f"--config.{key}={config[key]}"
    for key in ("init_from", "resolution", "dtype", "flip", "threads",
                "batch_size_per_device", "retries", "compilation_cache")
  ]  # fmt: skip
  arguments = [
    "dcae_jax", "--config=configs/f64_export.py", f"--workdir={workdir}",
    f"--config.source.path={config.source.path}",
    f"--config.output={config.output}", *flags, *more,
  ]  # fmt: skip
  script = (
    f"import runpy, sys; sys.argv = {arguments!r}\n{driver}\n"
    "runpy.run_module('dcae_jax.main', run_name='__main__', alter_sys=True)"
  )
  return subprocess.Popen(
    [sys.executable, "-c", script],
    cwd=REPOSITORY,
    env=environment,
    stderr=subprocess.PIPE,
    text=True,
  )


def _end(process) -> str:
  """Its messages; it must have ended well."""
  _, messages = process.communicate(timeout=240)
  assert process.returncode == 0, messages
  return messages


# Kills the process at its n-th write of a shard's record.
_KILL = """
import os, signal
from dcae_jax.runs import storage
write, seen = storage.Storage.write_json, []
def stop(self, key, value):
  if 'shards' in key:
    seen.append(key)
    if len(seen) == {n}:
      os.kill(os.getpid(), signal.{signal})
  write(self, key, value)
storage.Storage.write_json = stop
"""


def test_a_full_disk_loses_nothing(whole, config, tmp_path):
  """No file may grow beyond what the disk has room for."""
  full = (
    "import resource\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
  )
  output = str(tmp_path / "store")
  changes = config(output=output, compilation_cache="")
  process = _start(changes, tmp_path / "out", driver=full)
  _, messages = process.communicate(timeout=240)
  assert process.returncode == 2, messages
  assert "File too large" in messages and "Traceback" not in messages
  assert latent_store.LatentStore(output).manifest() is None
  export_latents.run(config(output=output), epath.Path(tmp_path / "out"))
  check_equal(output, whole)


def test_sigterm_finishes_what_is_begun_and_leaves(whole, config, tmp_path):
  output = str(tmp_path / "store")
  driver = _KILL.format(n=1, signal="SIGTERM")
  process = _start(config(output=output), tmp_path / "out", driver=driver)
  assert "stopped; run again" in _end(process)
  store = latent_store.LatentStore(output)
  finished = store.finished(LAYOUT)
  assert store.manifest() is None and finished
  export_latents.run(config(output=output), epath.Path(tmp_path / "out"))
  check_equal(output, whole)


def _free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def _start_two(config, workdir, environment, killed=None):
  address = f"--coordinator_address=127.0.0.1:{_free_port()}"
  return [
    _start(
      config, workdir, environment, address, "--num_processes=2",
      f"--process_id={i}",
      driver=_KILL.format(n=1, signal="SIGKILL") if i == killed else "",
    )
    for i in range(2)
  ]  # fmt: skip


def test_two_processes_one_of_them_killed_end_equal(
  whole, config, gs, emulator, tmp_path
):
  """Into a bucket, with failing requests; the latents of one process."""
  two = config(output=f"{gs}/two/store")
  environment = emulator.environment
  with emulator.fail(503, times=None, every=7):
    first = _start_two(two, f"{gs}/two", environment, killed=1)
    assert first[1].wait(timeout=240) == -signal.SIGKILL
    store = latent_store.LatentStore(two.output)
    # The other one finishes its own shards, whatever it then waits for.
    deadline = time.monotonic() + 120
    while not {0, 2} <= set(store.finished(LAYOUT)):
      assert time.monotonic() < deadline and first[0].poll() is None
      time.sleep(0.2)
    for process in first:
      process.kill()
      process.communicate()
  assert store.finished(LAYOUT) == [0, 2]
  assert store.manifest() is None
  emulator.forget()
  messages = [
    _end(process) for process in _start_two(two, f"{gs}/two", environment)
  ]
  assert "1 of 3 shards" in messages[0]
  uploads = [x for x in emulator.uploads if "store/latents/c/" in x]
  encoded, *replaced = [x.removeprefix("dcae-gs/two/store/") for x in uploads]
  objects = [f"latents/c/{shard}/0/0/0" for shard in range(3)]
  assert encoded == objects[1] and sorted(replaced) == objects
  check_equal(two.output, whole)
  result = json.loads(emulator.read("dcae-gs", "two/result.json"))
  assert result["count"] == 42 and "encoder" in result["seconds"]


def test_a_bucket_may_be_gone_for_a_while(
  whole, config, gs, emulator, tmp_path
):
  """Once for a moment, which is waited for; once for longer."""
  output = f"{gs}/store"
  into = config(output=output)
  uploads = lambda method, path: path.startswith("/upload/")
  emulator.forget()
  with emulator.fail(500, times=3, every=5, where=uploads, done=True):
    process = _start(into, tmp_path / "out", emulator.environment)
    deadline = time.monotonic() + 120
    identity = "dcae-gs/store/progress/identity.json"
    while identity not in emulator.uploads:  # it goes on writing at once
      assert time.monotonic() < deadline and process.poll() is None
      time.sleep(0.02)
    with emulator.gone():
      time.sleep(2)
      written = list(emulator.uploads)
      assert process.poll() is None  # it waits
    _end(process)
    assert "dcae-gs/store/manifest.json" in emulator.uploads
    assert "dcae-gs/store/manifest.json" not in written
  check_equal(output, whole)
  for name in emulator.names("dcae-gs"):
    emulator.delete("dcae-gs", name)
  records = lambda method, path: uploads(method, path) and "shards" in path
  few = config(output=output, retries=1)
  with (
    emulator.drop(times=None, where=records),
    pytest.raises(OSError, match="does not answer"),
  ):
    export_latents.run(few, epath.Path(tmp_path / "again"))
  assert latent_store.LatentStore(output).manifest() is None
  export_latents.run(few, epath.Path(tmp_path / "again"))
  check_equal(output, whole)


def test_buckets_are_checked_before_an_image_is_read(
  config, gs, emulator, tmp_path, monkeypatch
):
  def read(self, index):
    raise AssertionError("an image was read")

  monkeypatch.setattr("dcae_jax.data.sources.Files.__getitem__", read)
  nowhere = config(output="gs://dcae-nowhere/store")
  with pytest.raises(OSError, match="there is no bucket gs://dcae-nowhere"):
    export_latents.run(nowhere, epath.Path(tmp_path))
  with (
    emulator.forbid("dcae-gs"),
    pytest.raises(PermissionError, match="no permission for"),
  ):
    export_latents.run(config(output=f"{gs}/x"), epath.Path(tmp_path))
  lists = lambda method, path: (
    method == "GET" and path.partition("?")[0].endswith("/o")
  )
  with (
    emulator.fail(403, times=None, where=lists),
    pytest.raises(PermissionError, match="cannot be listed"),
  ):
    export_latents.run(config(output=f"{gs}/x"), epath.Path(tmp_path))
  assert not list(tmp_path.iterdir())
  assert not emulator.names("dcae-gs")


def test_work_directories_are_checked_before_an_image_is_read(
  config, gs, emulator, tmp_path
):
  nowhere = epath.Path("gs://dcae-nowhere/run")
  with pytest.raises(OSError, match="there is no bucket gs://dcae-nowhere"):
    export_latents.run(config(), nowhere)
  with pytest.raises(ValueError, match="is --workdir; use a place of its own"):
    export_latents.run(config(output=str(tmp_path)), epath.Path(tmp_path))
  assert not list(tmp_path.iterdir())


def test_processes_that_do_other_work_are_refused(tmp_path):
  """Of two that start at once, the one that wrote last goes on."""
  one, two = (latent_store.LatentStore(str(tmp_path)) for _ in range(2))
  one.check_identity({"resolution": 32}, begun=False)
  two.check_identity({"resolution": 64}, begun=False)
  one.write_identity({"resolution": 32})
  one.check_identity({"resolution": 32}, begun=True)
  with pytest.raises(ValueError, match="resolution: 32 there, 64 now"):
    two.check_identity({"resolution": 64}, begun=True)
  two.write_identity({"resolution": 64})
  with pytest.raises(ValueError, match="resolution: 64 there, 32 now"):
    one.check_identity({"resolution": 32}, begun=True)


def test_a_place_that_is_not_shared_is_refused(tmp_path):
  with pytest.raises(ValueError, match="is not the same place for all"):
    latent_store.LatentStore(str(tmp_path)).check_identity({}, begun=True)


@pytest.fixture(scope="module")
def authors_files(whole, tmp_path_factory):
  """As the authors' tools leave them: scaled, [c, h, w], class folders."""
  root = tmp_path_factory.mktemp("authors")
  source = reader.Latents(whole)
  found = source.read(np.arange(42))["latents"]
  for key, latent in zip(source.keys(), found, strict=True):
    file = (root / key).with_suffix(".npy")
    file.parent.mkdir(exist_ok=True)
    np.save(file, np.moveaxis(latent, -1, 0))
  np.save(root / "zoo/96.npy", np.full((16, 4, 4), np.nan, np.float32))
  np.savez(root / "zoo/97.npz", np.zeros(3))
  (root / "zoo/97.npz").rename(root / "zoo/97.npy")
  np.save(root / "zoo/98.npy", np.zeros((16, 2, 2), np.float32))
  (root / "zoo/99.npy").write_bytes(b"no array")
  return root


def test_latents_of_the_authors_tools_are_imported(
  whole, config, authors_files, tmp_path
):
  imported = {"source.kind": "npy", "source.path": str(authors_files)}
  export_latents.run(config(flip=False, **imported), epath.Path(tmp_path))
  source = reader.Latents(str(tmp_path / "latents"))
  original = reader.Latents(whole)
  first = np.arange(42)
  np.testing.assert_allclose(
    source.read_unscaled(first), original.read_unscaled(first), rtol=1e-6
  )
  np.testing.assert_array_equal(
    source.condition("labels"), original.condition("labels")
  )
  assert source.classes == original.classes
  assert source.manifest["scaling_factor"] == 0.5
  reasons = [x["reason"] for x in source.manifest["unreadable"]]
  assert "not finite" in reasons[0] and "archive" in reasons[1]
  assert reasons[2] == "float32 [16, 2, 2] instead of float32 [16, 4, 4]"
  assert reasons[3].startswith("no .npy file")
  files = sources.latent_files(str(authors_files))
  shifted = rows.LatentFiles(
    files, (4, 4, 16), scaling_factor=0.5, shift_factor=2.0
  )
  (row,) = shifted.load(0, [0])
  np.testing.assert_allclose(
    row.values, original.read_unscaled([0])[0] + 2, rtol=1e-5, atol=1e-5
  )


def test_links_to_nothing_are_listed_and_lost_files_stop(
  config, tmp_path, monkeypatch
):
  folder = tmp_path / "pictures"
  folder.mkdir()
  for i in range(3):
    Image.fromarray(smooth_image(i, 40, 40)).save(folder / f"{i}.png")
  (folder / "1_link.png").symlink_to(folder / "nothing.png")
  os.mkfifo(folder / "1_pipe.png")
  with (folder / "1_vast.png").open("wb") as file:
    file.truncate(2**42)
  linked = config(**{"source.path": str(folder)})
  export_latents.run(linked, epath.Path(tmp_path / "a"))
  manifest = reader.Latents(str(tmp_path / "a/latents")).manifest
  listed = {x["key"]: x["reason"] for x in manifest["unreadable"]}
  assert manifest["count"] == 3
  assert "no regular file" in listed.pop("1_pipe.png")
  assert "bytes are no image" in listed.pop("1_vast.png")
  assert listed.keys() == {"1_link.png"}
  source = sources.folder(str(folder))
  (folder / "2.png").unlink()
  monkeypatch.setattr(images, "_DELAYS", (0,))
  with pytest.raises(FileNotFoundError):
    images.open_image(source, 5, images.Decoding())


def _inspect(store, workdir, **changes):
  c = base.inspect_latents()
  c.latents, c.compilation_cache = store, ""
  c.samples = 3
  c.update(changes)
  return inspect_latents.run(c, epath.Path(workdir))


def test_inspecting_decodes_rows_as_they_are(
  whole, tiny_autoencoder, tmp_path, caplog
):
  with caplog.at_level("INFO"):
    assert _inspect(whole, tmp_path)
  for text in ("f8c16", "0.5 (the autoencoder's)", "3 images", "no problems",
               "99_cut.png"):  # fmt: skip
    assert text in caplog.text
  assert said_made(caplog.text) == {"pictures", "all of them", "result"}
  files = sorted((tmp_path / "samples").glob("row_*.png"))
  assert len(files) == 3 and (tmp_path / "samples/rows.png").exists()
  ae, source = dcae_jax.load(tiny_autoencoder), reader.Latents(whole)
  for file in files:
    row = int(file.stem.removeprefix("row_"))
    decoded = np.asarray(ae.decode(source.read_unscaled([row])))[0]
    expected = np.clip(np.round(decoded * 127.5 + 127.5), 0, 255)
    found = np.asarray(Image.open(file), np.float32)
    assert np.abs(found - expected).max() <= 1
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["count"] == 42 and result["problems"] == []


def test_an_inspection_that_is_killed_has_no_result(whole, tmp_path):
  """Nor are pictures of the one before beside those of another."""
  _inspect(whole, tmp_path)
  pictures = lambda: {x.name for x in (tmp_path / "samples").glob("row_*.png")}
  before = pictures()
  for number in (1, 3, 8):
    with kills.kill(tmp_path, number) as left:
      _inspect(whole, tmp_path, seed=1, samples=2)
    assert not left() and not (tmp_path / "result.json").exists()
  _inspect(whole, tmp_path, seed=1, samples=2)
  result = json.loads((tmp_path / "result.json").read_text())
  assert pictures() == {f"row_{row:08d}.png" for row in result["samples"]}
  assert len(pictures()) == 2 and pictures() != before
  assert not list(tmp_path.rglob("*.tmp"))
  _inspect(whole, tmp_path, samples=0)
  assert not list((tmp_path / "samples").iterdir())


def test_inspecting_names_a_manifest_that_lacks_what_it_shows(
  tiny_latents, tmp_path
):
  """As that of a store filled by other means."""
  with pytest.raises(ValueError, match=r"manifest\.json is damaged: it has no"):
    _inspect(tiny_latents, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_inspecting_finds_damage_and_the_wrong_autoencoder(
  whole, config, tmp_path
):
  copy = tmp_path / "copy"
  shutil.copytree(whole, copy)
  (copy / "labels/c/1").unlink()
  with pytest.raises(ValueError, match="is damaged: shard 1 of"):
    _inspect(str(copy), tmp_path / "a")
  problems = json.loads((tmp_path / "a/result.json").read_text())["problems"]
  assert len(problems) == 1
  other = save_tiny_autoencoder(tmp_path / "weights", seed=1)
  with pytest.raises(ValueError, match="does not have the encoder"):
    _inspect(whole, tmp_path / "b", init_from=str(other))
  with pytest.raises(ValueError, match="cannot be loaded"):
    _inspect(whole, tmp_path / "b", init_from=str(tmp_path / "nothing"))
  with pytest.raises(ValueError, match="latents is empty"):
    _inspect("", tmp_path / "b")
  with pytest.raises(ValueError, match="is no latent store"):
    _inspect(str(tmp_path), tmp_path / "b")
  assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--num_processes=2", "--process_id=0"], "--coordinator_address is"),
    (
      ["--coordinator_address=127.0.0.1:1", "--num_processes=2",
       "--process_id=2"],
      "--process_id=2 is not from 0 to 1",
    ),
    (
      ["--coordinator_address=here", "--num_processes=2", "--process_id=0"],
      "--coordinator_address=here is not HOST:PORT",
    ),
  ],
)  # fmt: skip
def test_processes_are_named_in_full(flags, message, tmp_path):
  found = run_main(
    "configs/f64_export.py", f"--workdir={tmp_path / 'out'}", *flags
  )
  assert found.returncode == 2 and message in found.stderr
  assert not (tmp_path / "out").exists()
