"""Released weights in and out: the original and the diffusers layout.

One table, `table`, names each of our parameters in a layout, with the order of
its axes; loading and saving read it in opposite directions.
"""

import functools
import hashlib
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange

from dcae_jax import errors
from dcae_jax.autoencoder import families, network
from dcae_jax.autoencoder.weights import safetensors_files
from dcae_jax.training import freezing

Tree = Any

# Layouts, and the file that their libraries look for.
LAYOUTS = {
  "original": "model.safetensors",
  "diffusers": "diffusion_pytorch_model.safetensors",
}
# Our leaf: its name in both layouts, and the order of the axes there and here.
_LEAVES = {
  "kernel": ("weight", "o i h w", "h w i o"),
  "scale": ("weight", "c", "c"),
  "bias": ("bias", "c", "c"),
  "mean": ("running_mean", "c", "c"),
  "var": ("running_var", "c", "c"),
  "count": ("num_batches_tracked", "", ""),
}
_MATRIX = ("o i", "1 1 i o")


class Entry(NamedTuple):
  """One of our arrays, and where it is in a file.

  Attributes:
    path: in our variables, such as "params/encoder/project_in/conv/kernel".
    shape: of ours.
    names: of the tensors which, one after the other, make it.
    theirs: axes of the tensors, in einops' notation.
    ours: axes of our array.
    sizes: of axes that are merged in ours.
  """

  path: str
  shape: tuple[int, ...]
  names: tuple[str, ...]
  theirs: str
  ours: str
  sizes: tuple[tuple[str, int], ...] = ()

  def to_ours(self, tensors: list[np.ndarray]) -> np.ndarray:
    joined = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
    return rearrange(joined, f"{self.theirs} -> {self.ours}")

  def to_theirs(self, ours: np.ndarray) -> list[np.ndarray]:
    axes = f"{self.ours} -> {self.theirs}"
    joined = rearrange(ours, axes, **dict(self.sizes))
    return np.split(joined, len(self.names)) if joined.ndim else [joined]

  @property
  def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
    """Of the tensors, by their names; nothing is allocated."""
    parts = self.to_theirs(np.broadcast_to(np.float32(0), self.shape))
    return {n: p.shape for n, p in zip(self.names, parts, strict=True)}

  @property
  def is_count(self) -> bool:
    return self.path.startswith("batch_counts")


def table(
  architecture: families.Architecture, image_channels: int, layout: str
) -> list[Entry]:
  """Where each of our arrays is in a file of that layout.

  Besides the parameters and batch statistics it has the numbers of batches that
  the statistics have seen, `batch_counts/.../count`, which we do not use.
  Raises UserError for a layout that is unknown, or not of the family.
  """
  if layout not in LAYOUTS:
    raise errors.UserError(
      f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}"
    )
  family = families.of(architecture)
  if layout not in family.layouts:
    raise errors.UserError(
      f"the layout {layout!r} is of authors whose code has no {family.name}; "
      f"use {' or '.join(map(repr, family.layouts))}"
    )
  modules = {module.ours: module for module in family.modules(architecture)}
  entries = []
  for path, shape in _our_shapes(architecture, image_channels).items():
    _, _, rest = path.partition("/")
    module, _, leaf = rest.rpartition("/")
    theirs, *axes = _LEAVES[leaf]
    if leaf == "kernel" and layout == "diffusers" and modules[module].matrix:
      axes = _MATRIX
    names = tuple(f"{name}.{theirs}" for name in modules[module].names(layout))
    entries.append(Entry(path, shape, names, *axes))
  return entries


@functools.lru_cache(maxsize=32)
def _our_shapes(
  architecture: families.Architecture, image_channels: int
) -> dict[str, tuple[int, ...]]:
  model = families.create(architecture, image_channels=image_channels)
  abstract = network.abstract_variables(model, image_channels)
  shapes = {path: leaf.shape for path, leaf in _flat(abstract).items()}
  counts = {
    "batch_counts" + path.removeprefix("batch_stats").removesuffix("mean")
    + "count": ()
    for path in shapes
    if path.startswith("batch_stats") and path.endswith("/mean")
  }  # fmt: skip
  return shapes | counts


def as_stored(
  entry: Entry,
  shapes: dict[str, tuple[int, ...]],
  older_name: Callable[[str], str],
) -> Entry:
  """The entry as a file of these tensors has it, if that is in an older way.

  Names may be those before (`Family.older_name`), and matrices 1x1 kernels.
  """
  older = tuple(map(older_name, entry.names))
  if any(name in shapes for name in set(older) - set(entry.names)):
    entry = entry._replace(names=older)
  if (entry.theirs, entry.ours) == _MATRIX and all(
    len(shapes.get(name, ())) == 4 for name in entry.names
  ):
    entry = entry._replace(theirs=f"{entry.theirs} 1 1")
  return entry


def tensor_shapes(entries: list[Entry]) -> dict[str, tuple[int, ...]]:
  """Of all tensors of a file, by their names."""
  return dict(pair for x in entries for pair in x.tensor_shapes.items())


def check_tensors(
  source: str,
  entries: list[Entry],
  tensors: dict[str, tuple[int, ...]],
) -> None:
  """Raises UserError with all that is missing, too much or of wrong shape."""
  expected = tensor_shapes(entries)
  optional = {name for x in entries if x.is_count for name in x.names}
  problems = [
    f"missing {name} {list(expected[name])}"
    for name in sorted(expected.keys() - tensors.keys() - optional)
  ]
  problems += [
    f"unexpected {name} {list(tensors[name])}"
    for name in sorted(tensors.keys() - expected.keys())
  ]
  problems += [
    f"{name} has the shape {list(tensors[name])}, not {list(expected[name])}"
    for name in sorted(tensors.keys() & expected.keys())
    if tensors[name] != expected[name]
  ]
  if problems:
    raise errors.UserError(
      f"{source!r} does not fit its architecture, {len(problems)} tensors: "
      f"{'; '.join(problems)}"
    )


def read(
  entries: list[Entry],
  files: dict[str, pathlib.Path],
  shardings: Tree | None = None,
) -> tuple[Tree, dict[str, int]]:
  """The variables, and the numbers of batches behind the batch statistics.

  Goes array by array, the largest first, so that little more memory is needed
  than what the variables take in the end. Raises UserError for values that are
  not finite.

  Args:
    entries: of all arrays.
    files: of each tensor.
    shardings: of `{"params": ..., "batch_stats": ...}`; None: one device.

  Returns:
    `{"params": ..., "batch_stats": ...}` in float32, and counts by path.
  """
  placed = {} if shardings is None else _flat(shardings)
  tree, counts = {"params": {}, "batch_stats": {}}, {}
  for entry in sorted(entries, key=lambda e: -math.prod(e.shape)):
    if entry.is_count:
      if entry.names[0] in files:  # else nobody counted
        (name,) = entry.names
        count = safetensors_files.read(files[name], name)
        if count.dtype.kind != "i":
          raise errors.UserError(
            f"{name} in {files[name]} is {count}, not a count"
          )
        counts[entry.path] = int(count)
      continue
    tensors = [safetensors_files.read(files[n], n) for n in entry.names]
    with np.errstate(over="ignore"):  # it is infinite then
      ours = entry.to_ours(tensors).astype(np.float32, order="C", copy=False)
    del tensors
    is_variance = entry.path.endswith("/var")
    if not np.isfinite(ours).all() or (is_variance and ours.min() < 0):
      raise errors.UserError(
        f"{', '.join(entry.names)} in {files[entry.names[0]]} has values that "
        "are not finite, or negative variances; download or convert it again"
      )
    *modules, leaf = entry.path.split("/")
    node = tree
    for module in modules:
      node = node.setdefault(module, {})
    node[leaf] = jax.device_put(ours, placed.get(entry.path))
    node[leaf].block_until_ready()
  return tree, counts


def to_tensors(
  entries: list[Entry], variables: Tree, counts: dict[str, int]
) -> dict[str, np.ndarray]:
  """The inverse of `read`: all tensors of a file."""
  ours, tensors = _flat(variables), {}
  for entry in entries:
    if entry.is_count:
      value = np.array(counts.get(entry.path, 0), np.int64)
    else:
      value = np.asarray(jax.device_get(ours[entry.path]), np.float32)
    parts = zip(entry.names, entry.to_theirs(value), strict=True)
    tensors |= {name: np.asarray(part, order="C") for name, part in parts}
  return tensors


def fingerprint(variables: Tree) -> str:
  """Sha256 of all names, shapes and float32 values: the same on any machine."""
  digest = hashlib.sha256()
  for path, leaf in sorted(_flat(variables).items()):
    values = np.ascontiguousarray(jax.device_get(leaf), np.float32)
    digest.update(f"{path} {values.shape} ".encode())
    digest.update(values.data)
  return digest.hexdigest()


def _flat(tree: Tree) -> dict[str, Any]:
  """Leaves by their path."""
  return {
    freezing.path_of(keys): leaf
    for keys, leaf in jax.tree.leaves_with_path(tree)
  }
