"""The weights of text encoders, as `transformers` stores them.

They are read tensor by tensor, and each is on its devices before the next one
is read: the host never holds more than one.
"""

import hashlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dcae_jax import errors
from dcae_jax.autoencoder.weights import safetensors_files
from dcae_jax.training import freezing

Tree = Any
_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "embedding": "weight",
  "bias": "bias",
}


class Names(NamedTuple):
  """What a kind of encoder calls its tensors.

  Attributes:
    modules: their names of our modules; "#" is the number of a layer.
    older: patterns in names of files, and what replaces them.
    ignored: a pattern for names of tensors that an encoder does not need.
  """

  modules: Mapping[str, str]
  older: tuple[tuple[str, str], ...]
  ignored: str

  def of(self, path: str) -> str:
    """Of the tensor of our leaf, such as "layer_3/norm/scale"."""
    module, _, leaf = path.rpartition("/")
    number = re.search(r"\d+", module)
    name = self.modules[re.sub(r"\d+", "#", module)]
    return f"{name}.{_LEAVES[leaf]}".replace("#", number[0] if number else "")

  def today(self, name: str) -> str:
    """That of `modules` for a name in a file."""
    for pattern, replacement in self.older:
      name = re.sub(pattern, replacement, name)
    return name


class Stored(NamedTuple):
  """A tensor in a file, under the name that it has there."""

  file: pathlib.Path
  name: str
  shape: tuple[int, ...]


def stored(
  files: list[pathlib.Path], names: Names, parameters: Tree, source: str
) -> dict[str, Stored]:
  """Where the tensor of each parameter is, by our paths.

  Raises UserError with all that is missing, too much or of another shape.
  """
  tensors = {}
  for file in files:
    for name, shape in safetensors_files.header(file).items():
      today = names.today(name)
      if not re.fullmatch(names.ignored, today):
        tensors.setdefault(today, Stored(file, name, shape))
  found, problems = {}, []
  for keys, leaf in jax.tree.leaves_with_path(parameters):
    path = freezing.path_of(keys)
    name, shape = names.of(path), leaf.shape
    shape = shape[::-1] if path.endswith("/kernel") else shape
    tensor = tensors.pop(name, None)
    if tensor is None:
      problems.append(f"missing {name} {list(shape)}")
    elif tensor.shape != shape:
      problems.append(
        f"{name} has the shape {list(tensor.shape)}, not {list(shape)}"
      )
    else:
      found[path] = tensor
  problems += [f"unexpected {name}" for name in sorted(tensors)]
  if problems:
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    raise errors.UserError(
      f"the tensors of {source!r} do not fit its config.json: "
      f"{'; '.join(problems[:8])}{more}"
    )
  return found


def read(found: dict[str, Stored], parameters: Tree) -> tuple[Tree, str]:
  """The parameters, and the sha256 of their values as they are stored.

  Each gets the dtype and the sharding of its shape in `parameters`. Raises
  UserError for values that are not finite.
  """
  digest = hashlib.sha256()

  def of_leaf(keys, leaf):
    path = freezing.path_of(keys)
    tensor = found[path]
    values = safetensors_files.read(tensor.file, tensor.name)
    if not np.isfinite(values).all():
      raise errors.UserError(
        f"{tensor.name} in {tensor.file} has values that are not finite; "
        "download it again"
      )
    digest.update(f"{path} {values.dtype} {values.shape} ".encode())
    digest.update(np.ascontiguousarray(values).view(np.uint8).data)
    ours = values.T if path.endswith("/kernel") else values
    ours = ours.astype(leaf.dtype, order="C", copy=False)
    return jax.make_array_from_callback(
      leaf.shape, leaf.sharding, lambda index: ours[index]
    ).block_until_ready()

  return jax.tree.map_with_path(of_leaf, parameters), digest.hexdigest()
