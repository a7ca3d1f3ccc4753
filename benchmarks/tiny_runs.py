"""A tiny run of each task, for a CPU, and what it leaves but for clocks.

They are chained as in a user's life, below one folder: `world/TASK` is the work
directory of a task. Nothing is measured with them.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from configs import base

STEPS, EVERY = 24, 4  # of trainings, and of their checkpoints
PATIENCE = 300  # seconds, after which a process hangs
_REPOSITORY = pathlib.Path(__file__).parent.parent
_LOUD = ("Traceback (most", "Exception ", "terminate called", "leaked", "Fatal")
_CLOCKED = re.compile("second|utilization|step_gib|encoder_share")
_HOURS = re.compile(rb"took [\d.]+ hours")
_UNLIKE = re.compile(r"events\.out\.|(^|/)\.[^/]+\.tmp$|(^|/)checkpoints/")


def draw_images(folder: pathlib.Path) -> None:
  """Twelve small ones in two classes, all but one with captions."""
  for i in range(12):
    coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
    path = folder / ("animals", "places")[i % 2] / f"{i:02d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((64, 48 + i), Image.BICUBIC).save(path)
    if i != 5:  # that has no row in a store with captions
      path.with_suffix(".txt").write_text(f"picture {i}\nanother of {i % 3}")


def _machine(c: ConfigDict, steps: int) -> None:
  """Of a training."""
  c.model.dtype, c.steps = "float32", steps
  c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-3, 2
  c.ema.decay, c.ema.ramp_steps, c.log_every = 0.9, 2, 1
  c.checkpoint.every, c.checkpoint.keep = EVERY, 3
  c.data.threads = 1


def _autoencoder(c: ConfigDict, source: ConfigDict, steps: int) -> ConfigDict:
  _machine(c, steps)
  c.model.rematerialisation = False
  c.resolution, c.batch_size, c.lpips.weight = 32, 4, 0.0
  c.discriminator.width, c.discriminator.layers = 8, 2
  c.data.source = c.evaluation.source = source
  c.data.min_size = c.data.workers = 0
  c.evaluation.resolutions, c.evaluation.metrics = (32,), ()
  c.evaluation.batch_size, c.evaluation.every = 4, 2 * EVERY
  return c


def _export(c: ConfigDict, world: pathlib.Path, images: str) -> ConfigDict:
  c.init_from = str(world / "train_autoencoder")
  c.source = base.source("folder", images, captions=True)
  c.resolution, c.crop, c.crops_per_image = 16, "random_crop", 8
  c.shard_rows, c.batch_size_per_device, c.threads = 16, 4, 2
  return c


def _diffusion(c: ConfigDict, variant: str, steps: int) -> ConfigDict:
  _machine(c, steps)
  c.model.variant, c.batch_size, c.sampler.steps = variant, 8, 4
  c.samples.every, c.samples.count = 2 * EVERY, 2
  return c


def configs(world: pathlib.Path, images: str = "") -> dict[str, ConfigDict]:
  """By task, in an order in which none needs a later one."""
  images = images or str(world / "images")
  source = base.source("folder", images)
  prepare = base.prepare()
  prepare.source = base.source("folder", images, captions=True)
  prepare.shard_megabytes, prepare.workers = 0.01, 2
  train = _autoencoder(base.phase1("tiny-f8"), source, STEPS)
  train.data.workers = 1
  phases = base.three_phases("tiny-f8")
  for name in ("phase1", "phase2", "phase3"):
    _autoencoder(phases[name], source, 2 * EVERY)
  measured = (phases.report, base.evaluate(), base.report())
  for c in measured:
    c.source, c.resolutions, c.metrics, c.batch_size = source, (32,), (), 4
    c.samples, c.extremes = 2, 1
  _, evaluate, report = measured
  evaluate.init_from = str(world / "train_autoencoder")
  evaluate.compare = ("block_pca",)
  report.runs = {"one": str(world / "train_autoencoder")}
  reconstruct = base.reconstruct()
  reconstruct.init_from = str(world / "train_autoencoder")
  reconstruct.input = f"{world}/images/*/*.png"
  reference = base.reference_statistics()
  reference.source, reference.resolutions = source, (32,)
  reference.networks, reference.batch_size = ("efficientnet_lite0",), 4
  store, inspect = str(world / "export_latents/latents"), base.inspect_latents()
  inspect.latents, inspect.samples = store, 2
  encode = base.encode_captions()
  encode.latents, encode.text.encoder = store, str(world / "encoder")
  encode.text.max_tokens, encode.text.dtype = 12, "float32"
  diffusion = _diffusion(base.uvit("UViT-tiny"), "UViT-tiny", STEPS)
  diffusion.latents = store
  draw = base.evaluate_diffusion()
  draw.init_from = str(world / "train_diffusion")
  draw.samples, draw.batch_size, draw.metrics = 32, 4, ()
  both = base.export_and_diffuse()
  _export(both.export, world, images)
  _diffusion(both.training, "PixArt-tiny", 2 * EVERY)
  both.training.objective.kind, both.training.sampler.kind = "flow", "euler"
  both.training.text.update(encode.text)
  both.samples.prompts, both.samples.metrics = ("picture 1", "another"), ()
  both.samples.samples_per_prompt, both.samples.batch_size = 4, 4
  study = base.study()
  study.base = _autoencoder(base.phase1("tiny-f8"), source, EVERY)
  study.arms = {"slow": {}, "fast": {"optimizer": {"learning_rate": 1e-2}}}
  study.seeds, study.measures = (0, 1), {"PSNR": "eval/psnr"}
  export = _export(base.export_latents(), world, images)
  made = (
    prepare, train, phases, evaluate, reconstruct, report, reference, export,
    inspect, encode, diffusion, draw, both, study,
  )  # fmt: skip
  for c in made:
    for part in (c, *c.values()):
      if isinstance(part, ConfigDict) and "compilation_cache" in part:
        part.compilation_cache = str(world / "compiled")
  return {c.task: c for c in made}


def _timeless(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _timeless(v) for k, v in value.items() if not _CLOCKED.search(k)}
  return [_timeless(x) for x in value] if isinstance(value, list) else value


def _arrays(checkpoint: pathlib.Path) -> Iterator[tuple[str, Any]]:
  import jax
  import orbax.checkpoint as ocp

  for item in ("params", "ema", "optimizer"):
    with ocp.StandardCheckpointer() as checkpointer:
      tree = checkpointer.restore(checkpoint / item)
    for path, leaf in jax.tree.leaves_with_path(tree):
      yield item + jax.tree_util.keystr(path), np.asarray(leaf).tobytes()


def contents(workdir: pathlib.Path) -> dict[str, str]:
  """A digest of each file without clocks, and of each last checkpoint."""
  found: dict[str, bytes] = {}
  for path in sorted(workdir.rglob("*")):
    name = str(path.relative_to(workdir))
    if path.is_dir() and path.name == "checkpoints":
      last = max((x for x in path.iterdir() if x.name.isdigit()), key=_number)
      found |= {f"{name}/{last.name}/{k}": x for k, x in _arrays(last)}
    if not path.is_file() or _UNLIKE.search(name):
      continue
    found[name] = _HOURS.sub(b"", path.read_bytes())
    if path.suffix in (".json", ".jsonl"):
      texts = [found[name]]
      if path.suffix == ".jsonl":
        texts = found[name].splitlines()
      values = [_timeless(json.loads(text)) for text in texts]
      values = [x for x in values if len(x) != 1 or "step" not in x]
      found[name] = json.dumps(values).encode()
  return {k: hashlib.sha256(x).hexdigest() for k, x in found.items()}


def _number(path: pathlib.Path) -> int:
  return int(path.name)


class Lost(Exception):  # noqa: N818
  """What a run did not survive."""


class Undisturbed(NamedTuple):
  """What a run leaves, its seconds, and those until it writes something."""

  contents: dict[str, str]
  seconds: float
  begins: float

  def moment(self, rng: random.Random) -> tuple[bool, float]:
    """Whether to wait for a change, and so many seconds from then on."""
    waits = rng.random() < 0.6
    most = self.seconds - self.begins * waits
    return waits, round(most * rng.random(), 3)


class Run:
  """`python -m dcae_jax.main`, started once."""

  def __init__(self, place: "Place", prefix: tuple[str, ...]):
    self._place, self._before = place, place.state()
    self._log = place.lab.output / "said.txt"
    with self._log.open("wb") as log:
      self.process = subprocess.Popen(
        [*prefix, *place.command], cwd=_REPOSITORY, env=place.environment(),
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
      )  # fmt: skip
    self._began = time.monotonic()
    self._changed = self._handled = False

  def seconds(self) -> float:
    return time.monotonic() - self._began

  def _has_written(self) -> bool:
    self._changed = self._changed or self._place.state() != self._before
    return self._changed

  def _listens(self) -> bool:
    """Whether SIGTERM is handled at the moment."""
    with contextlib.suppress(OSError, TypeError):  # it has just ended
      status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
      caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
      self._handled |= (is_now := bool(caught >> (signal.SIGTERM - 1) & 1))
      return is_now
    return False

  def until(self, waits: bool, seconds: float) -> bool:
    """Returns at that moment, or when it has ended: then False."""
    since = 0.0
    while self.process.poll() is None:
      self._listens()
      if waits and not self._has_written():
        since = self.seconds()
      elif self.seconds() - since >= seconds:
        return True
      time.sleep(0.005)
    return False

  def is_under_way(self) -> bool:
    """Whether it must answer SIGTERM: main has begun, Python does not end."""
    return self._listens() or (self._has_written() and not self._handled)

  def end(self, *codes: int) -> int:
    """Waits for its end, and ends processes that it has left.

    Raises Lost for any but these exit codes, if any are given, or where more
    than one line says why.
    """
    try:
      code = self.process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
      code = -1
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()
    lines = self._log.read_text(errors="replace").splitlines()
    loud = [x for x in lines if any(word in x for word in _LOUD)]
    errors = sum(x.startswith("error: ") for x in lines)
    if codes and (code not in codes or loud or errors != (code == 2)):
      raise Lost(f"ended with {code}: {' | '.join(loud or lines[-3:])[-300:]}")
    return code


class Place:
  """Where a task is tried: the scratch directory."""

  def __init__(self, lab: "Lab", task: str, root: str = "", images: str = ""):
    self.lab, self.task = lab, task
    config = configs(lab.world, images)[task]
    file = lab.output / f"{task}.py"
    file.write_text(
      "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
      f"  return ConfigDict({config.to_dict()!r})\n"
    )
    workdir = f"{root or lab.scratch}/{task}"
    self.command = [sys.executable, "-m", "dcae_jax.main", f"--config={file}"]
    self.command.append(f"--workdir={workdir}")
    lab.clear()

  def environment(self) -> dict[str, str]:
    return dict(os.environ)

  def state(self) -> Any:
    """What changes when something is written."""
    found = []
    for folder, _, names in os.walk(self.lab.scratch):
      for path in (folder, *(os.path.join(folder, name) for name in names)):
        with contextlib.suppress(FileNotFoundError):
          found.append((path, os.stat(path).st_mtime_ns))
    return found

  def start(self, *prefix: str) -> Run:
    return Run(self, prefix)

  def contents(self) -> dict[str, str]:
    return contents(self.lab.scratch / self.task)

  def measure(self) -> Undisturbed:
    run = self.start()
    run.until(True, 0)
    begins = run.seconds()
    run.end(0)
    return Undisturbed(self.contents(), run.seconds(), begins)

  def check_ends(self, expected: dict[str, str]) -> None:
    """Started again, it ends, and leaves what is expected."""
    self.start().end(0)
    if unlike := unlike_keys(self.contents(), expected):
      raise Lost(f"{len(unlike)} differ, such as {', '.join(unlike[:3])}")


def unlike_keys(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
  return [k for k in expected | found if found.get(k) != expected.get(k)]


class Lab:
  """A folder of tiny runs, and of what is tried with them."""

  def __init__(self, output: pathlib.Path):
    self.output, self.world = output, output / "world"
    self.scratch, self.results = output / "scratch", output / "results.jsonl"
    self.sound: dict[str, Any] = {}  # what is read of undamaged files
    self._check_version()
    if not self.world.exists():
      from tests import tiny_text_encoders

      draw_images(self.world / "images")
      tiny_text_encoders.save(self.world / "encoder", "minilm")
    self.configs = configs(self.world)

  def _check_version(self) -> None:
    from dcae_jax.runs import versions

    kept, now = self.output / "versions.json", json.dumps(versions.versions())
    self.output.mkdir(parents=True, exist_ok=True)
    if not kept.exists():
      kept.write_text(now)
    if kept.read_text() != now:
      sys.exit(f"{self.output} is of another version; name another --output")

  def clear(self) -> None:
    """Empties the scratch directory, which may be a disk of its own."""
    command = ["umount", str(self.scratch)]
    subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
    shutil.rmtree(self.scratch, ignore_errors=True)
    self.scratch.mkdir(parents=True)

  def undisturbed(self, task: str) -> Undisturbed:
    """Run once, in the world, where others find it."""
    kept = self.world / f"{task}.json"
    if not kept.exists():
      config = repr(self.configs[task].to_dict())
      for before in self.configs:
        if f"{self.world}/{before}" in config:
          self.undisturbed(before)
      try:
        Place(self, task).measure()  # compiles
        found = Place(self, task).measure()
      except Lost as lost:
        sys.exit(f"{task} {lost}, and nothing had disturbed it")
      shutil.move(self.scratch / task, self.world / task)
      kept.write_text(json.dumps(found))
    return Undisturbed(*json.loads(kept.read_text()))
