"""Who may import whom: an `ast` walk over the design's table."""

import ast
import pathlib
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parent.parent
# Of our own: prefixes. Of others: packages, beyond numpy and the standard ones.
RULES = {
  "dcae_jax/__init__.py": ({"dcae_jax.autoencoder"}, set()),
  "dcae_jax/autoencoder.py": (
    {
      "dcae_jax.architecture",
      "dcae_jax.arrays",
      "dcae_jax.data",
      "dcae_jax.evaluation",
      "dcae_jax.models",
      "dcae_jax.released",
      "dcae_jax.tiling",
      "dcae_jax.training",
      "dcae_jax.weights",
    },
    {"etils", "jax"},
  ),
  "dcae_jax/arrays.py": ({"dcae_jax.models"}, {"jax"}),
  "dcae_jax/block_pca.py": (
    {"dcae_jax.evaluation"},
    {"einops", "jax", "jaxtyping"},
  ),
  "dcae_jax/architecture.py": (
    {
      "dcae_jax.autoencoder_dc",
      "dcae_jax.autoencoder_kl",
      "dcae_jax.models",
    },
    {"jax"},
  ),
  "dcae_jax/autoencoder_dc.py": (
    {"dcae_jax.models", "dcae_jax.settings"},
    set(),
  ),
  "dcae_jax/autoencoder_kl.py": (
    {"dcae_jax.models", "dcae_jax.settings"},
    set(),
  ),
  "dcae_jax/layouts.py": ({"dcae_jax.models"}, set()),
  "dcae_jax/settings.py": (set(), set()),
  "dcae_jax/released.py": (
    {
      "dcae_jax.architecture",
      "dcae_jax.layouts",
      "dcae_jax.safetensors_files",
      "dcae_jax.weights",
    },
    set(),
  ),
  "dcae_jax/safetensors_files.py": (set(), {"huggingface_hub", "safetensors"}),
  "dcae_jax/tiling.py": (set(), {"jax"}),
  "dcae_jax/weights.py": (
    {
      "dcae_jax.architecture",
      "dcae_jax.layouts",
      "dcae_jax.models",
      "dcae_jax.safetensors_files",
    },
    {"einops", "jax", "safetensors"},
  ),
  "configs": ({"configs.base", "configs.quickstart"}, {"ml_collections"}),
  "dcae_jax/host_memory.py": (set(), set()),
  "dcae_jax/main.py": (
    {"dcae_jax.host_memory"},
    {"absl", "etils", "jax", "ml_collections"},
  ),
  "dcae_jax/tasks": (
    {"dcae_jax"},
    {"etils", "jax", "ml_collections", "optax"},
  ),
  "dcae_jax/training": (
    {
      "dcae_jax.training",
      "dcae_jax.phases",
      "dcae_jax.losses",
      "dcae_jax.diffusion",
    },
    {"clu", "etils", "flax", "jax", "jaxtyping", "optax"},
  ),
  "dcae_jax/training/checkpoint.py": (
    {"dcae_jax.training"},
    {"etils", "jax", "orbax"},
  ),
  "dcae_jax/training/metrics_writer.py": (
    set(),
    {"PIL", "etils", "tensorboardX"},
  ),
  "dcae_jax/phases.py": (set(), {"jax", "optax"}),
  "dcae_jax/losses.py": (set(), {"jax", "jaxtyping"}),
  "dcae_jax/diffusion.py": (set(), {"jax", "jaxtyping"}),
  "dcae_jax/samplers.py": ({"dcae_jax.diffusion"}, {"jax", "jaxtyping"}),
  "dcae_jax/evaluation": ({"dcae_jax.evaluation"}, {"jax", "jaxtyping"}),
  "dcae_jax/evaluation/fid.py": (set(), {"etils"}),
  "dcae_jax/evaluation/figures.py": (set(), {"PIL", "matplotlib"}),
  "dcae_jax/models": (
    {"dcae_jax.models"},
    {"einops", "flax", "jax", "jaxtyping"},
  ),
  "dcae_jax/models/pretrained.py": (
    {"dcae_jax.torch_files"},
    {"safetensors"},
  ),
  "dcae_jax/torch_files.py": (set(), set()),
  "dcae_jax/data": (
    {"dcae_jax.data"},
    {"PIL", "etils", "grain", "tensorflow_datasets"},
  ),
  "dcae_jax/data/sources.py": (
    {"dcae_jax.data"},
    {"etils", "fsspec", "tensorflow_datasets"},
  ),
  "dcae_jax/data/batches.py": (set(), {"absl", "grain"}),
  "dcae_jax/data/storage.py": (set(), {"tensorstore"}),
  "dcae_jax/data/latent_store.py": ({"dcae_jax.data"}, {"ml_dtypes"}),
}
FILES = sorted(
  str(path.relative_to(REPOSITORY))
  for folder in ("configs", "dcae_jax")
  for path in (REPOSITORY / folder).rglob("*.py")
  if path.read_text().strip()
)


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES)
def test_imports_follow_the_layers(file):
  rule = max((r for r in RULES if file.startswith(r)), key=len)
  own, others = RULES[rule]
  for name in _imports(REPOSITORY / file):
    package = name.split(".")[0]
    if package in ("configs", "dcae_jax"):
      allowed = any(name == o or name.startswith(f"{o}.") for o in own)
    else:
      allowed = package in others | {"numpy"} | sys.stdlib_module_names
    assert allowed, f"{file} imports {name}"


def test_main_imports_only_flags_at_the_top():
  """Loader processes import it again: nothing heavy may come with it."""
  tree = ast.parse((REPOSITORY / "dcae_jax/main.py").read_text())
  top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
  names = {
    alias.name.split(".")[0] if isinstance(n, ast.Import) else n.module
    for n in top
    for alias in n.names
  }
  assert names - sys.stdlib_module_names == {"absl", "ml_collections"}


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
