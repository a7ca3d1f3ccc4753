"""The weight files of the metric networks: where they lie, whether they are the
published ones, and what is in them.

Numbers computed with other weights than the published ones compare with no
others, so that results name the sha256 of what was read. Published files that
are pickles are read once, without running anything that they contain, and then
as what was kept of them in the cache.
"""

import contextlib
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from etils import epath

from dcae_jax import errors
from dcae_jax.autoencoder.weights import safetensors_files, torch_files
from dcae_jax.runs import installed, metrics_writer, regular_files


class Pretrained(NamedTuple):
  """A network's weights, float32, and the file that they were read from.

  `is_published` tells that it is the published one, bit for bit.
  """

  parameters: dict[str, np.ndarray]
  file: str
  sha256: str
  is_published: bool


class AbsentWeightsError(ValueError):
  """There are no weights; the message ends with the command that gets them."""


def cache_directory() -> pathlib.Path:
  """Where weights are looked for that no package holds, and kept."""
  home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(home).expanduser() / "dcae_jax"


def located(
  path: str, package: str, file: str, extra: str, what: str
) -> pathlib.Path:
  """The path, if there is one, or else a file of an installed package.

  Raises AbsentWeightsError if the package, which an extra of this one installs,
  is not; `what` needs it.
  """
  if path:
    return safetensors_files.find_file(path)
  directory = installed.folder(package)
  if directory is None:
    raise AbsentWeightsError(str(installed.missing(extra, what)))
  return directory / file


def sha256(path: pathlib.Path) -> str:
  """Of a file, in hexadecimal digits; UserError if it cannot be read."""
  try:
    with regular_files.checked(path).open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except FileNotFoundError:
    raise errors.UserError(f"weights: there is no file {path}") from None
  except OSError as error:
    raise errors.UserError(f"weights: cannot read {path}: {error}") from error


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  """All arrays of an `.npz` file; UserError if it is damaged."""
  try:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
      arrays = {name: archive[name] for name in archive.files}
      if not all(isinstance(x, np.ndarray) for x in arrays.values()):
        raise errors.UserError("it holds other things than arrays")
      return arrays
  except Exception as error:  # whatever a damaged file makes of numpy
    raise errors.UserError(
      f"weights: {path} is not a readable .npz file ({error}); make it again"
    ) from error


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    return safetensors.numpy.load_file(path)
  except Exception as error:  # also dtypes that numpy does not have
    raise errors.UserError(
      f"weights: {path} is not a readable .safetensors file ({error}); make it "
      "again"
    ) from error


def checked(
  arrays: Mapping[str, np.ndarray],
  shapes: Mapping[str, tuple[int, ...]],
  path: pathlib.Path,
  network: str,
) -> dict[str, np.ndarray]:
  """The arrays in float32.

  Raises:
    UserError: one is missing, unexpected, mis-shaped or not of real numbers, or
      has values that are not finite.
  """
  wrong = sorted(
    name
    for name in arrays.keys() | shapes.keys()
    if name not in arrays
    or arrays[name].shape != shapes.get(name)
    or arrays[name].dtype.kind not in "fiu"
  )
  if wrong:
    names = ", ".join(wrong[:8])
    more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    raise errors.UserError(
      f"weights: {path} does not hold {network}; missing, unexpected or "
      f"mis-shaped: {names}{more}"
    )
  with np.errstate(over="ignore"):  # it is infinite then
    tensors = {name: np.asarray(arrays[name], np.float32) for name in shapes}
  for name, array in tensors.items():
    is_variance = name.endswith("running_var")
    if not np.isfinite(array).all() or (is_variance and array.min() < 0):
      raise errors.UserError(
        f"weights: {name} in {path} has values that are not finite, or "
        "negative variances; make the file again"
      )
  return tensors


def load(
  path: pathlib.Path,
  shapes: Mapping[str, tuple[int, ...]],
  published: str,
  network: str,
  remedy: str,
  *,
  ignored: str = "",
  read: Callable[[pathlib.Path], Mapping[str, np.ndarray]] = torch_files.read,
) -> Pretrained:
  """A network's arrays, under the names that they have in the published file.

  Args:
    path: of the published file, or of an `.npz` or `.safetensors` with the same
      names and shapes.
    shapes: of the arrays that the network needs.
    published: sha256 of the published file.
    network: its name, for messages.
    remedy: what to do if the published file is damaged, "run ...".
    ignored: regular expression for the names of other arrays in the file.
    read: what is in the published file, if that is a pickle. What it returns is
      kept in the cache, and read there from then on.

  Raises:
    UserError: no such file, another hash, other names or shapes.
  """
  digest = sha256(path)
  readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
  if path.suffix in readers:
    arrays = readers[path.suffix](path)
  else:
    if digest != published:
      raise errors.UserError(
        f"weights: {path} has sha256 {digest}, not the published {published}; "
        f"{remedy}"
      )
    arrays = _converted(path, digest, read)
  arrays = {k: v for k, v in arrays.items() if not re.fullmatch(ignored, k)}
  return Pretrained(
    checked(arrays, shapes, path, network),
    str(path),
    digest,
    digest == published,
  )


def _converted(
  path: pathlib.Path,
  digest: str,
  read: Callable[[pathlib.Path], Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
  """What is in a pickle of a sha256, from the cache once it is there.

  The name of a file in the cache is the sha256 of what it was made of, and its
  own: where that is another one it is damaged, and made again.
  """
  folder = epath.Path(cache_directory() / "weights")
  for file in sorted(folder.glob(f"{digest}.*.safetensors")):
    with contextlib.suppress(OSError, errors.UserError):
      if sha256(pathlib.Path(file)) == file.stem.partition(".")[2]:
        return _read_safetensors(pathlib.Path(file))
  arrays = {name: np.ascontiguousarray(x) for name, x in read(path).items()}
  data = safetensors.numpy.save(arrays)
  name = f"{digest}.{hashlib.sha256(data).hexdigest()}.safetensors"
  with contextlib.suppress(OSError):  # the next start does without it, too
    metrics_writer.write_whole(folder / name, data)
  return arrays


def fold_batch_norm(
  tensors: Mapping[str, np.ndarray], convolution: str, norm: str, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
  """A convolution without bias and the batch normalisation after it, as one.

  The tensors are of a state dict, with kernels OIHW, the names of modules.
  Returns the kernel, HWIO, and the bias, float32.
  """
  scale, bias, mean, variance = (
    tensors[f"{norm}.{leaf}"].astype(np.float64)
    for leaf in ("weight", "bias", "running_mean", "running_var")
  )
  factor = scale / np.sqrt(variance + epsilon)
  kernel = tensors[f"{convolution}.weight"].transpose(2, 3, 1, 0) * factor
  return kernel.astype(np.float32), (bias - mean * factor).astype(np.float32)


def batch_norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
  """Of the tensors of a batch normalisation that `fold_batch_norm` reads."""
  return {
    f"{name}.{leaf}": (channels,)
    for leaf in ("weight", "bias", "running_mean", "running_var")
  }
