"""State dicts in PyTorch's files, without PyTorch and without running code.

The format of `torch.save` before 1.6, a row of pickles and then the numbers:
the published files that are read here are all of it. A pickle can name any
function to be called; only the names of tensors, storages and ordered
dictionaries are admitted, and each is plain data here. Little-endian files,
dense tensors on any device.
"""

import io
import os
import pathlib
import pickletools
import struct
from typing import Any, NamedTuple

import numpy as np

from dcae_jax import errors
from dcae_jax.autoencoder.weights import restricted_pickle
from dcae_jax.runs import regular_files

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_HIGHEST_PICKLE_PROTOCOL = 2  # what torch.save writes unless told otherwise
_LARGEST_MEMO = 2**20  # the unpickler allocates up to the index it is told
_DTYPES = {
  "DoubleStorage": "<f8",
  "FloatStorage": "<f4",
  "HalfStorage": "<f2",
  "BFloat16Storage": "<u2",
  "LongStorage": "<i8",
  "IntStorage": "<i4",
  "ShortStorage": "<i2",
  "CharStorage": "i1",
  "ByteStorage": "u1",
  "BoolStorage": "u1",
}


class _Storage(NamedTuple):
  kind: str
  key: str
  size: int


class _Tensor(NamedTuple):
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _StateDict(dict):
  def __setstate__(self, state: Any) -> None:
    """Drops what modules note beside their tensors."""


class _RebuildTensor:
  __slots__ = ()  # a pickle can set attributes of what it is handed

  def __call__(self, storage, offset, shape, strides, *_) -> _Tensor:
    whole = [offset, *shape, *strides]
    if (
      not isinstance(storage, _Storage)
      or not all(type(number) is int and number >= 0 for number in whole)
      or len(shape) != len(strides)
    ):
      raise errors.UserError("it describes a tensor wrongly")
    last = offset
    if 0 not in shape:
      last += 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if last > storage.size:
      raise errors.UserError(
        f"a tensor of shape {shape}, strides {strides} and offset {offset} "
        f"leaves its storage of {storage.size} numbers"
      )
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter:
  __slots__ = ()

  def __call__(self, tensor, *_) -> Any:
    return tensor


_ADMITTED = {
  ("collections", "OrderedDict"): _StateDict,
  ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
  ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
} | {("torch", kind): kind for kind in _DTYPES}


class _Unpickler(restricted_pickle.Unpickler):
  def persistent_load(self, pid: Any) -> _Storage:
    # A sixth item describes views, which no longer exist.
    tag, kind, key, _, size, *view = pid
    is_known = tag == "storage" and kind in _DTYPES and view in ([], [None])
    is_sized = type(key) is str and type(size) is int and size >= 0
    if not (is_known and is_sized):
      raise errors.UserError("it describes a storage wrongly")
    return _Storage(kind, key, size)


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The tensors of what `torch.save(module.state_dict(), path)` wrote.

  By name, in the file's order and dtypes, bfloat16 as float32. The arrays are
  read-only; they may be strided views, and share memory as the tensors did.
  Raises UserError for a file that is missing, of another kind or damaged, or
  holds anything but tensors.
  """
  path = pathlib.Path(path)
  try:
    with regular_files.checked(path).open("rb") as file:
      return _read(file)
  except Exception as error:  # whatever a damaged or hostile file raises
    reason = str(error).split("\n")[0]
    if isinstance(error, EOFError):
      reason = "it ends too early"
    elif not isinstance(error, OSError | ValueError):
      reason = f"it is damaged ({reason})"
    raise errors.UserError(
      f"{path} cannot be read as a state dict of PyTorch: {reason}; download "
      "or copy it again, or convert it to .safetensors where torch is installed"
    ) from error


def _unpickle(file: io.BufferedIOBase) -> Any:
  """The next pickle of a file, after a look at its instructions."""
  start = file.tell()
  for instruction, argument, _ in pickletools.genops(file):
    if instruction.proto > _HIGHEST_PICKLE_PROTOCOL:
      raise errors.UserError(
        f"it is pickled with protocol {instruction.proto}; known are those up "
        f"to {_HIGHEST_PICKLE_PROTOCOL}"
      )
    if "PUT" in instruction.name and argument > _LARGEST_MEMO:
      raise errors.UserError("its pickle asks for an absurd amount of memory")
  file.seek(start)
  return _Unpickler(file, _ADMITTED, encoding="utf-8").load()


def _read(file: io.BufferedIOBase) -> dict[str, np.ndarray]:
  try:
    magic = _unpickle(file)
  except Exception:
    magic = None
  if magic != _MAGIC:
    raise errors.UserError("it is not of the format before torch 1.6")
  protocol = _unpickle(file)
  if protocol != _PROTOCOL:
    known = protocol if isinstance(protocol, int) else type(protocol).__name__
    raise errors.UserError(f"its protocol is {known}, not {_PROTOCOL}")
  if not _unpickle(file)["little_endian"]:
    raise errors.UserError("its byte order is big; only little is known")
  tensors = _checked(_unpickle(file))
  described = {}
  for tensor in tensors.values():
    storage = tensor.storage
    if described.setdefault(storage.key, storage) != storage:
      raise errors.UserError(
        f"its storage {storage.key!r} is described in two ways"
      )
  storages = {}
  for key in _unpickle(file):
    (size,) = struct.unpack("<q", _exactly(file, 8))
    if key not in described or size != described[key].size:
      raise errors.UserError(
        f"its storage {key!r} is not what its tensors expect"
      )
    kind = described[key].kind
    count = size * np.dtype(_DTYPES[kind]).itemsize
    storages[key] = _numbers(kind, _exactly(file, count))
  return {
    name: _array(x, storages[x.storage.key]) for name, x in tensors.items()
  }


def _exactly(file: io.BufferedIOBase, count: int) -> bytes:
  start = file.tell()
  if count > file.seek(0, os.SEEK_END) - start:  # before memory is taken
    raise EOFError
  file.seek(start)
  return file.read(count)


def _checked(tree: Any) -> dict[str, _Tensor]:
  if not isinstance(tree, dict):
    raise errors.UserError(
      f"it holds a {type(tree).__name__}, not a state dict"
    )
  for name, value in tree.items():
    if not isinstance(name, str) or not isinstance(value, _Tensor):
      raise errors.UserError(
        f"{name!r} in it is a {type(value).__name__}, not a tensor; save "
        "the state dict alone"
      )
  return dict(tree)


def _numbers(kind: str, data: bytes) -> np.ndarray:
  numbers = np.frombuffer(data, _DTYPES[kind])
  if kind == "BoolStorage":
    numbers = numbers.astype(bool)
  elif kind == "BFloat16Storage":  # the upper half of a float32
    numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
  numbers.flags.writeable = False
  return numbers


def _array(tensor: _Tensor, numbers: np.ndarray) -> np.ndarray:
  return np.ndarray(
    tensor.shape,
    numbers.dtype,
    numbers,
    tensor.offset * numbers.itemsize,
    [stride * numbers.itemsize for stride in tensor.strides],
  )
