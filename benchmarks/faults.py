"""Tries to lose something: kills, full disks, flipped bits, failing buckets.

  python -m benchmarks.faults --output=FOLDER [--faults=kill,disk,bits,bucket]
    [--tasks=study,manifest] [--times=20]

A tiny run of each task is disturbed at random moments, and started again until
it ends; then its work directory must hold what that of an undisturbed run does,
but for clocks. SIGTERM and SIGINT must end a run with exit code 0, a full disk
or a bucket that fails for too long with one line. Of each kind of file, single
bits are flipped: that must be noticed, or change nothing that is read.

FOLDER/results.jsonl has a line for each try; started again, those that are
missing are made. It is of one version of the code. What was lost is kept in
FOLDER/lost. Linux, on a CPU, with requirements-dev.txt; where no file system
may be mounted, files must not grow, instead of the disk being full.
"""

import argparse
import hashlib
import importlib
import json
import logging
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks import tiny_runs

_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_backend_optimization_level=0 "
  "--xla_llvm_disable_expensive_passes=true",  # compiles faster
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
_MAY_MOUNT = "DCAE_JAX_FAULTS_MAY_MOUNT"
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_CHAIN = 4  # kills of one work directory
_FLIPS = 2.5  # bits of each kind of file, for each other try


# --- kills and full disks -----------------------------------------------------


def _kill(
  lab: tiny_runs.Lab, task: str, rng: random.Random, how: list[str]
) -> None:
  """Several times in one work directory, unless it ends before."""
  known, place = lab.undisturbed(task), tiny_runs.Place(lab, task)
  for _ in range(_CHAIN):
    moment, number = known.moment(rng), rng.choice(_SIGNALS)
    run = place.start()
    if not run.until(*moment):
      run.end(0)
      break
    how.append(f"{number.name} {moment}")
    ends_well = number != signal.SIGKILL and run.is_under_way()
    run.process.send_signal(number)
    run.end(*(0, 128 + number) if ends_well else ())
  place.check_ends(known.contents)


def _disk(
  lab: tiny_runs.Lab, task: str, rng: random.Random, how: list[str]
) -> None:
  """No room, or no inodes, from a random moment on."""
  known, place = lab.undisturbed(task), tiny_runs.Place(lab, task)
  moment, limit = known.moment(rng), rng.choice(("size", "nr_inodes"))
  if _MAY_MOUNT in os.environ:
    how.append(f"{limit} {moment}")
    _mount(lab.scratch, "size=1g,nr_inodes=64k")
    run = place.start()
    if run.until(*moment):
      _fill(lab.scratch, limit, rng.randrange(32))
    how[-1] += f": exit code {run.end(0, 2)}"
    _mount(lab.scratch, "remount,size=1g,nr_inodes=64k")
  else:
    sizes = [x.stat().st_size for x in (lab.world / task).rglob("*")]
    most = rng.randrange(max(sizes))
    how.append(f"files of at most {most} bytes")
    code = place.start("prlimit", f"--fsize={most}").end(0, 2)
    how[-1] += f": exit code {code}"
  place.check_ends(known.contents)


def _mount(path: pathlib.Path, options: str) -> bool:
  command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
  return not subprocess.run(command, stderr=subprocess.DEVNULL).returncode


def _fill(path: pathlib.Path, limit: str, left: int) -> None:
  """Leaves so little, or what the kernel takes while others write."""
  for more in range(left, 1000, 8):
    disk = os.statvfs(path)
    used = disk.f_files - disk.f_ffree + more
    if limit == "size":
      used = (disk.f_blocks - disk.f_bfree + more) * disk.f_frsize
    if _mount(path, f"remount,{limit}={used}"):
      return


# --- flipped bits, in this process --------------------------------------------


def _digest(array: Any) -> str:
  return hashlib.sha256(np.asarray(array).tobytes()).hexdigest()


def _loaded(lab: tiny_runs.Lab, path: pathlib.Path) -> dict[str, Any]:
  """What anybody gets of a run."""
  import jax

  import dcae_jax

  ae = dcae_jax.load(path)
  leaves = jax.tree.leaves_with_path(ae.variables)
  found = {jax.tree_util.keystr(keys): _digest(x) for keys, x in leaves}
  return found | {"scaling factor": ae.scaling_factor}


def _goes_on(task: str, steps: int = 0) -> Callable[..., dict[str, str]]:
  """What a task leaves that is started again, maybe for more steps."""

  def read(lab, path):
    import jax
    from etils import epath

    config = lab.configs[task].copy_and_resolve_references()
    if steps:
      config.steps += steps
    if "data" in config:
      config.data.workers = 0
    run = importlib.import_module(f"dcae_jax.tasks.{task}").run
    run(config, epath.Path(path))
    jax.clear_caches()
    return tiny_runs.contents(path)

  return read


def _rows(lab: tiny_runs.Lab, path: pathlib.Path) -> dict[str, Any]:
  """What a latent store gives to those who read it."""
  from dcae_jax.latents import reader

  store = reader.Latents(path / "latents")
  store.check()
  found = {k: x.tolist() for k, x in store.read(range(len(store))).items()}
  return found | {"keys": store.keys(), "manifest": store.manifest}


def _images(lab: tiny_runs.Lab, path: pathlib.Path) -> dict[str, Any]:
  """What record shards give to those who read them."""
  from dcae_jax.data import sources

  source = sources.Records(str(path / "records"), captions=True)
  return {"classes": source.classes} | {
    source.key(i): source[i] for i in range(len(source))
  }


class _Kind(NamedTuple):
  """Files of something in the world, and what reads them."""

  of: str
  files: str
  read: Callable[[tiny_runs.Lab, pathlib.Path], dict[str, Any]]


_TRAIN, _EXPORT = "train_autoencoder", "export_latents"
_LONGER = _goes_on(_TRAIN, tiny_runs.EVERY)
_LAST = f"^checkpoints/{tiny_runs.STEPS}"
_KINDS = {
  "averages": _Kind(_TRAIN, _LAST + "/ema/.*/d/", _loaded),
  "averages' metadata": _Kind(_TRAIN, _LAST + "/ema/(?!.*/d/)", _loaded),
  "measured": _Kind(_TRAIN, _LAST + "/measured/metadata", _loaded),
  "config.json of a run": _Kind(_TRAIN, r"^config\.json", _loaded),
  "state": _Kind(_TRAIN, _LAST + "/(params|ema|optimizer)/", _LONGER),
  "position of the data": _Kind(_TRAIN, _LAST + "/data/metadata", _LONGER),
  "checkpoint's metadata": _Kind(_TRAIN, _LAST + "/[^/]*$", _LONGER),
  "latents": _Kind(_EXPORT, "latents/latents/c/", _rows),
  "labels": _Kind(_EXPORT, "latents/labels/c/", _rows),
  "strings": _Kind(_EXPORT, "latents/(keys|captions)/c/", _rows),
  "zarr.json": _Kind(_EXPORT, r"zarr\.json", _rows),
  "manifest": _Kind(_EXPORT, r"manifest\.json", _rows),
  "records": _Kind("unfinished", "/progress/", _goes_on(_EXPORT)),
  "index": _Kind("prepare", r"index\.parquet", _images),
  "image shards": _Kind("prepare", r"\.array_record", _images),
}


def _prepare(lab: tiny_runs.Lab, of: str) -> pathlib.Path:
  """A fresh copy, in the scratch directory, of what is to be damaged."""
  kept, copy = lab.world / of, lab.scratch / of
  if of in lab.configs:
    lab.undisturbed(of)
  elif not kept.exists():  # an export that was killed in the middle
    lab.undisturbed(_EXPORT)
    run, path = tiny_runs.Place(lab, _EXPORT).start(), lab.scratch / _EXPORT
    while len(list(path.glob("latents/progress/shards/*.json"))) < 2:
      time.sleep(0.001)
    run.process.kill()
    run.end()
    shutil.move(path, kept)
  lab.clear()
  return pathlib.Path(shutil.copytree(kept, copy))


class _Ear(logging.Handler):
  """Hears warnings and errors."""

  def __init__(self):
    super().__init__(logging.WARNING)
    self.lines: list[str] = []

  def emit(self, record: logging.LogRecord) -> None:
    self.lines.append(record.getMessage())


def _read(
  lab: tiny_runs.Lab, kind: _Kind, path: pathlib.Path
) -> tuple[Any, set[str]]:
  """What is read, and what is said meanwhile."""
  ear, log = _Ear(), logging.getLogger("dcae_jax")
  log.addHandler(ear)
  signal.alarm(tiny_runs.PATIENCE)
  try:
    return kind.read(lab, path), set(ear.lines)
  finally:
    signal.alarm(0)
    log.removeHandler(ear)


def _bits(
  lab: tiny_runs.Lab, name: str, rng: random.Random, how: list[str]
) -> None:
  """One bit of one file of a kind."""
  kind = _KINDS[name]
  if name not in lab.sound:
    lab.sound[name] = _read(lab, kind, _prepare(lab, kind.of))
  path, (expected, usual) = _prepare(lab, kind.of), lab.sound[name]
  files = {
    str(x.relative_to(path)): x.stat().st_size
    for x in sorted(path.rglob("*"))
    if x.is_file() and re.search(kind.files, str(x.relative_to(path)))
  }
  (chosen,) = rng.choices(list(files), list(files.values()))
  data = bytearray((path / chosen).read_bytes())
  byte, bit = rng.randrange(len(data)), rng.randrange(8)
  how.append(f"bit {bit} of byte {byte} of {chosen}")
  data[byte] ^= 1 << bit
  (path / chosen).write_bytes(data)
  try:
    found, lines = _read(lab, kind, path)
  except Exception as error:
    if not _is_one_line(error):
      why = f"{type(error).__name__}: {str(error)[:200]}"
      raise tiny_runs.Lost(why) from error
    how[-1] += ": refused"
    return
  unlike = tiny_runs.unlike_keys(found, expected)
  if unlike and lines <= usual:
    what = f"{len(unlike)} differ without a word, such as {unlike[0]}"
    raise tiny_runs.Lost(what)
  how[-1] += ": warned of" if lines - usual else ": harmless"


def _is_one_line(error: Exception) -> bool:
  """Whether the command line says it in one, and not as a traceback."""
  from dcae_jax import errors

  if isinstance(error, OSError):
    return error.errno is not None
  return isinstance(error, (errors.UserError, FloatingPointError))


# --- a bucket -----------------------------------------------------------------

_OFTEN = {"times": None, "every": 5}
_REQUESTS: dict[str, Callable[[Any], Any]] = {
  "503": lambda emulator: emulator.fail(503, **_OFTEN),
  "429": lambda emulator: emulator.fail(429, **_OFTEN),
  "dropped": lambda emulator: emulator.drop(**_OFTEN),
  "answers dropped": lambda emulator: emulator.drop(done=True, **_OFTEN),
  "503 of what is done": lambda emulator: emulator.fail(
    503, done=True, where=lambda method, path: method != "GET", **_OFTEN
  ),
  "gone for a while": lambda emulator: emulator.drop(times=100),
}


class _Bucket(tiny_runs.Place):
  """A run whose images and work directory are in a bucket."""

  def __init__(self, lab: tiny_runs.Lab, task: str, emulator: Any):
    self._emulator, root = emulator, emulator.create("dcae-faults")
    for path in (lab.world / "images").rglob("*.*"):
      name = "%2F".join(path.relative_to(lab.world).parts)
      url = f"{emulator.address}/upload/storage/v1/b/dcae-faults/o"
      url += f"?uploadType=media&name={name}"
      urllib.request.urlopen(url, path.read_bytes()).close()
    super().__init__(lab, task, root, f"{root}/images")

  def environment(self) -> dict[str, str]:
    return self._emulator.environment

  def state(self) -> Any:
    return len(self._emulator.uploads)

  def contents(self) -> dict[str, str]:
    self.lab.clear()
    for name in self._emulator.names("dcae-faults", f"{self.task}/"):
      path = self.lab.scratch / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(self._emulator.read("dcae-faults", name))
    return super().contents()


def _bucket(
  lab: tiny_runs.Lab, task: str, rng: random.Random, how: list[str]
) -> None:
  """Requests fail all the time; maybe the run is killed meanwhile."""
  from tests import gcs_emulator

  lab.undisturbed(task)
  kept = lab.world / f"{task}_in_bucket.json"
  if not kept.exists():
    with gcs_emulator.Emulator() as emulator:
      found = _Bucket(lab, task, emulator).measure()
    kept.write_text(json.dumps(found))
  known = tiny_runs.Undisturbed(*json.loads(kept.read_text()))
  fault, is_killed = rng.choice(list(_REQUESTS)), rng.random() < 0.5
  moment = known.moment(rng)
  how.append(fault + f", killed {moment}" * is_killed)
  with gcs_emulator.Emulator() as emulator:
    place = _Bucket(lab, task, emulator)
    with _REQUESTS[fault](emulator):
      if is_killed:
        run = place.start()
        run.until(*moment)
        run.process.kill()
        run.end()
      run = place.start()
      how[-1] += f": exit code {run.end(0, 2)}"
      how[-1] += f" after {run.seconds():.0f} s, else {known.seconds:.0f}"
    place.check_ends(known.contents)


# --- all of it ----------------------------------------------------------------

_FAULTS = {"kill": _kill, "disk": _disk, "bits": _bits, "bucket": _bucket}
_NAMES = {"bits": tuple(_KINDS), "bucket": (_TRAIN, _EXPORT)}  # else all tasks


def _try(
  lab: tiny_runs.Lab, fault: str, name: str, times: int
) -> tuple[int, int]:
  """Makes the tries that are missing; how many were made and survived."""
  text = lab.results.read_text() if lab.results.exists() else ""
  done = [json.loads(line) for line in text.splitlines()]
  done = [x for x in done if x["what"] == [fault, name]]
  while (tried := sum(len(x["how"]) for x in done)) < times:
    rng, how, why = random.Random(f"{fault} {name} {len(done)}"), [], ""
    try:
      _FAULTS[fault](lab, name, rng, how)
    except tiny_runs.Lost as lost:
      why = str(lost)
      if fault != "bits":  # where `how` tells all
        kept = lab.output / "lost" / f"{fault} {name} {len(done)}"
        shutil.copytree(lab.scratch, kept, dirs_exist_ok=True)
        shutil.copy(lab.output / "said.txt", kept)
    done.append({"what": [fault, name], "how": how, "lost": why})
    with lab.results.open("a") as file:
      file.write(json.dumps(done[-1]) + "\n")
    print(json.dumps(done[-1]), flush=True)
  return tried, tried - sum(bool(x["lost"]) for x in done)


def _begin() -> None:
  """Starts anew where file systems may be mounted, and nobody sees them."""
  if _MAY_MOUNT not in os.environ:
    for may in ("-m", "-rm"):
      tried = subprocess.run(
        ["unshare", may, "true"], stderr=subprocess.DEVNULL
      )
      if not tried.returncode:
        command = ["unshare", may, sys.executable, "-m", "benchmarks.faults"]
        os.environ[_MAY_MOUNT] = "1"
        os.execvp("unshare", [*command, *sys.argv[1:]])
  # Jobs in a shell's background are started deaf to it.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  os.environ.update(_ENVIRONMENT)
  for name in ("absl", "gcp_storage_emulator"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  flags.FLAGS.mark_as_parsed()  # grain wants it

  def give_up(*_):
    raise TimeoutError(f"it takes more than {tiny_runs.PATIENCE} s")

  signal.signal(signal.SIGALRM, give_up)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  split = lambda text: text.split(",")
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--faults", type=split, default=list(_FAULTS))
  parser.add_argument("--tasks", type=split, help="or kinds of files; all")
  parser.add_argument("--times", type=int, default=20)
  options = parser.parse_args()
  _begin()
  lab, rows = tiny_runs.Lab(options.output.resolve()), []
  for fault in options.faults:
    times = math.ceil(options.times * (_FLIPS if fault == "bits" else 1))
    for name in _NAMES.get(fault, lab.configs):
      if name in (options.tasks or [name]):
        rows.append((fault, name, *_try(lab, fault, name, times)))
  lab.clear()
  print("| fault | task or files | tried | survived |\n" + "| --- " * 4 + "|")
  for row in rows:
    print(f"| {' | '.join(map(str, row))} |")
  lost = [f"{fault} {name}" for fault, name, tried, n in rows if n < tried]
  if lost:
    sys.exit(f"did not survive: {', '.join(lost)}; see {lab.results}")


if __name__ == "__main__":
  main()
