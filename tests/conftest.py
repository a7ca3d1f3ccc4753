"""Fake devices, strict JAX, shape checks, and a small world to train in."""

import gc
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# The last three make compiling five times faster; subprocesses inherit them.
# Programs for one device and for eight then differ in the last bits.
_XLA_FLAGS = [
  "--xla_force_host_platform_device_count=8",
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
]
# XLA ends a process that sets a flag which it does not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  _XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(_XLA_FLAGS)
# Workers and subprocesses inherit them, too, and compile nothing twice. Who
# names a directory keeps what is in it for the next session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _COMPILED = tempfile.TemporaryDirectory(prefix="dcae_jax_compiled_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jaxtyping

jaxtyping.install_import_hook("dcae_jax", "typechecker.check")

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from configs import base

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many objects, and most of them stay.
gc.set_threshold(100_000, 20)
REPOSITORY = pathlib.Path(__file__).parent.parent
MITE = {"depth": 2, "hidden": 64, "heads": 2}  # of UViT-mite


def pytest_configure():
  flags.FLAGS.mark_as_parsed()  # grain's loader processes want it


def run_main(config: str, *arguments: str) -> subprocess.CompletedProcess:
  """`python -m dcae_jax.main` on one device, to its end."""
  flags = os.environ["XLA_FLAGS"].replace("count=8", "count=1")
  return subprocess.run(
    [sys.executable, "-m", "dcae_jax.main", f"--config={config}", *arguments],
    cwd=REPOSITORY,
    env=os.environ | {"XLA_FLAGS": flags},
    capture_output=True,
    text=True,
    check=False,
  )


def smooth_image(seed: int, height: int, width: int) -> np.ndarray:
  """Colour gradients and shapes: learnable, and different for each seed."""
  rng = np.random.default_rng(seed)
  coarse = rng.uniform(0, 255, (4, 4, 3)).astype(np.uint8)
  image = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
  return np.asarray(image)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> pathlib.Path:
  """12 images in two classes, sides from 64 to 130 pixels."""
  root = tmp_path_factory.mktemp("photographs")
  for i in range(12):
    directory = root / ("animals" if i % 2 else "places")
    directory.mkdir(exist_ok=True)
    pixels = smooth_image(i, 64 + 6 * i, 130 - 6 * i)
    Image.fromarray(pixels).save(directory / f"{i:02d}.png")
  return root


@pytest.fixture(scope="session")
def compilation_cache() -> str:
  return os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.fixture(scope="session")
def emulator():
  """Google's storage on this machine, healthy; who breaks it heals it."""
  import gcs_emulator

  with gcs_emulator.Emulator() as emulator:
    yield emulator


@pytest.fixture
def gs(emulator, monkeypatch):
  """An empty bucket, and this process's own requests led to it."""
  for key in ("TENSORSTORE_GCS_HTTP_URL", "NO_GCE_CHECK"):
    monkeypatch.setenv(key, emulator.environment[key])
  emulator.forget()
  yield emulator.create("dcae-gs")
  emulator.heal()
  for name in emulator.names("dcae-gs"):
    emulator.delete("dcae-gs", name)


def save_tiny_autoencoder(
  folder: pathlib.Path, seed: int = 0, scaling_factor: float = 1.0
) -> pathlib.Path:
  """Initial values of tiny-f8, in the diffusers layout; returns the folder."""
  import dcae_jax
  from dcae_jax.autoencoder import families
  from dcae_jax.autoencoder.dcae import variants

  variant = variants.VARIANTS["tiny-f8"]
  variables = jax.jit(families.create(variant).init)(
    jax.random.key(seed), np.zeros((1, 8, 8, 3), "float32")
  )
  autoencoder = dcae_jax.Autoencoder(
    variant, variables, scaling_factor=scaling_factor
  )
  autoencoder.save(folder)
  return folder


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> pathlib.Path:
  """A converted file, with random values."""
  from dcae_jax.evaluation.networks import inception

  rng = np.random.default_rng(0)
  file = tmp_path_factory.mktemp("inception") / "random.npz"
  arrays = {}
  for name, shape in inception.parameter_shapes().items():
    if name.endswith("running_var") or name.endswith("bn.weight"):
      arrays[name] = rng.uniform(0.5, 1.5, shape)
    else:
      arrays[name] = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
  np.savez(file, **{k: v.astype("float32") for k, v in arrays.items()})
  return file


@pytest.fixture(scope="session")
def tiny_autoencoder(tmp_path_factory) -> pathlib.Path:
  """A folder with initial values of tiny-f8."""
  folder = tmp_path_factory.mktemp("tiny") / "weights"
  return save_tiny_autoencoder(folder, scaling_factor=0.5)


@pytest.fixture(scope="session")
def tiny_latents(tiny_autoencoder, tmp_path_factory) -> str:
  """A store of 48 latents [2, 2, 16] in three classes, filled by hand."""
  labels = np.arange(48, dtype=np.int32) % 3
  path = tmp_path_factory.mktemp("store") / "latents"
  return fill_store(path, tiny_autoencoder, labels, classes=3)


def fill_store(
  path: pathlib.Path,
  folder: pathlib.Path,
  labels: np.ndarray,
  classes: int,
  **conditions: np.ndarray,
) -> str:
  """Latents of classes that each have a mean of their own; returns the path.

  With other conditions, by the names of their arrays.
  """
  import dcae_jax
  from dcae_jax.autoencoder import latent_statistics
  from dcae_jax.autoencoder.weights import conversion
  from dcae_jax.latents import encode
  from dcae_jax.latents import layout as store_layout
  from dcae_jax.latents import store as latent_store

  rows, shape = len(labels), (2, 2, 16)
  store = latent_store.LatentStore(str(path))
  store.check_writable()
  store.write_identity({})
  conditions = {"labels": labels} | conditions
  columns = {
    name: store_layout.Column(
      x.shape[1:], "string" if x.dtype.kind == "U" else x.dtype.name
    )
    for name, x in conditions.items()
  }
  layout = store_layout.Layout(
    rows, shape, "float32", ("latents",), rows, columns
  )
  store.create_arrays(layout)
  rng = np.random.default_rng(0)
  means = rng.normal(size=(int(labels.max()) + 1, *shape))
  values = 2 * means[labels] + 0.1 * rng.normal(size=(rows, *shape))
  store.write_shard(
    layout,
    0,
    {"latents": values.astype(np.float32)} | conditions,
    ["a"] * rows,
    {"moments": {"mean": [0.0]}},
  )
  statistics = latent_statistics.LatentStatistics(shape[-1])
  statistics.add(values)
  encoder = encode.encoder_variables(dcae_jax.load(folder).variables)
  made_with = {
    "init_from": str(folder),
    "space_to_channel": 1,
    "encoder_sha256": conversion.fingerprint(encoder),
  }
  store.finish(
    layout,
    {
      "autoencoder": made_with,
      "classes": [f"class {i}" for i in range(classes)],
      "scaling_factor": 0.5,
      "shift_factor": 0.0,
      "statistics": statistics.compute(),
      "crop": {"kind": "dm_crop"},
      "source": {"kind": "folder", "fingerprint": f"{rows}"},
    },
  )
  return str(path)


@pytest.fixture(scope="session")
def tiny_diffusion(tiny_latents, compilation_cache):
  """A function: four steps of a UViT that is smaller than those with names."""
  from dcae_jax.diffusion.denoisers import families

  def create(**changes):
    c = base.latent_diffusion()
    c.latents = tiny_latents
    c.model.variant, c.model.dtype = "UViT-mite", "float32"
    c.batch_size, c.steps = 16, 4
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-3, 2
    c.ema.decay = 0.9
    c.data.threads = 1
    c.samples.count, c.sampler.steps = 0, 4
    c.samples.every = c.checkpoint.every = 0
    c.log_every = 1
    c.compilation_cache = compilation_cache
    c.update_from_flattened_dict(changes)
    return c

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(families.DENOISERS["UViT"].sizes, "mite", MITE)
    yield create


def _tables() -> list[dict]:
  from dcae_jax import tasks
  from dcae_jax.autoencoder import families, phases
  from dcae_jax.autoencoder.dcae import variants
  from dcae_jax.data import sources
  from dcae_jax.diffusion.denoisers import families as denoisers
  from dcae_jax.diffusion.text import encoders
  from dcae_jax.evaluation import metrics

  return [
    tasks.TASKS, base.KEYS, families.FAMILIES, phases.PHASES,
    variants.VARIANTS, sources.KINDS, denoisers.DENOISERS, encoders.KINDS,
    metrics.METRICS,
  ]  # fmt: skip


@pytest.fixture(scope="session")
def examples(tmp_path_factory) -> pathlib.Path:
  """A folder with the modules that docs/extend.md shows."""
  folder = tmp_path_factory.mktemp("examples")
  page = (REPOSITORY / "docs" / "extend.md").read_text()
  for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
    if name := re.match(r"# (my_\w+\.py)\n", block):
      (folder / name[1]).write_text(block)
  return folder


@pytest.fixture(scope="module")
def plugin(examples):
  """A function: imports one of `examples`; the tables forget it afterwards."""
  from dcae_jax.runs import config_files

  added, imported = [], []

  def load(name: str):
    before = [(table, set(table)) for table in _tables()]
    config_files.import_plugins({"plugins": (name,)})
    added.extend((x, key) for x, keys in before for key in x.keys() - keys)
    imported.append(name)
    return sys.modules[name]

  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(examples)
    yield load
  for table, key in added:
    del table[key]
  for name in imported:
    sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def tiny_config(photographs, compilation_cache):
  """A function of the phase: a run of four steps of tiny-f2, without LPIPS.

  It has each kind of block and of norm once, and is a line in the table.
  """
  from dcae_jax.autoencoder.dcae import variants

  deepest = variants.Stage(32, 1, "efficientvit")
  convolved = variants.Stage(16, 1, norm="batch_norm", activation="relu")
  tiny_f2 = variants.Architecture(
    4, (variants.Stage(16, 0), deepest), (convolved, deepest)
  )

  def create(number: int = 1, **changes):
    c = getattr(base, f"phase{number}")("tiny-f2")
    c.model.dtype = "float32"
    c.model.rematerialisation = False
    c.resolution, c.batch_size, c.steps = 32, 8, 4
    c.lpips.weight = 0.0
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 2
    c.ema.decay = 0.9
    c.ema.ramp_steps = 2
    c.discriminator.width = 8
    c.discriminator.layers = 2
    c.data.source = base.source("folder", str(photographs))
    c.data.min_size = 0
    c.data.workers = 0
    c.data.threads = 2
    c.evaluation.source = base.source("folder", str(photographs))
    c.evaluation.resolutions = (32,)
    c.evaluation.batch_size = 8
    c.evaluation.samples = 4
    c.evaluation.metrics = ()
    c.evaluation.every = 0
    c.checkpoint.every = 0
    c.log_every = 1
    c.mesh.data = 8
    c.compilation_cache = compilation_cache
    c.update_from_flattened_dict(changes)
    return c

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(variants.VARIANTS, "tiny-f2", tiny_f2)
    yield create


def config_file(path: pathlib.Path, config: ConfigDict) -> str:
  """A config file of a run of `tiny_config`, for other processes.

  They do not know tiny-f2, so that it has the architecture in whole.
  """
  from dcae_jax.autoencoder import families

  config.model.architecture = families.described(config.model.variant, {}, 3)
  path.write_text(
    "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
    f"  return ConfigDict({config.to_dict()!r})\n"
  )
  return str(path)
