"""How far the feature networks of the metrics are from their originals.

  python -m benchmarks.metric_networks            # prints the table; needs
                                                  # requirements-reference.txt
  python -m benchmarks.metric_networks --store    # renews the stored outputs in
                                                  # tests/stored

The originals are those of pytorch-fid and efficientnet-lite-pytorch, with
random weights and batch statistics: fresh initial values would hide errors. The
table also tells images per second on this machine.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import pathlib
import tempfile
import time
import zlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks import torchvision_import
from dcae_jax.evaluation.networks import efficientnet, inception

NETWORKS = {"inception": inception, "efficientnet": efficientnet}
# Batch, height, width, channels: smaller and larger than what enters the
# networks; the first two are stored.
SHAPES = (
  (2, 50, 83, 3),
  (1, 331, 307, 1),
  (2, 299, 224, 3),
  (1, 480, 720, 3),
)
STORED_SHAPES = SHAPES[:2]


def stored(network: str) -> pathlib.Path:
  """The file with the original's outputs."""
  return pathlib.Path(__file__).parent.parent / f"tests/stored/{network}.npz"


def random_images(shape: tuple[int, ...]) -> np.ndarray:
  """Squares of random colours, whole numbers from 0 to 255."""
  rng = np.random.default_rng(zlib.crc32(repr(shape).encode()))
  batch, height, width, channels = shape
  squares = rng.integers(
    0, 256, (batch, height // 5 + 1, width // 5 + 1, channels)
  )
  images = squares.repeat(5, axis=1).repeat(5, axis=2)
  return images[:, :height, :width].astype(np.float32)


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """By its name in the state dict, so that it can be made anywhere.

  What enters a norm is small (about 0.1), so that an epsilon of 1e-3 changes
  the result by several percent, and each bias and scale tells.
  """
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  leaf = name.rpartition(".")[2]
  if leaf == "num_batches_tracked":
    return np.array(rng.integers(1, 10**6), np.int64)
  if leaf == "weight" and len(shape) > 1:
    fan_in = np.prod(shape[1:])
    value = rng.standard_normal(shape, np.float32) * (0.02 / fan_in) ** 0.5
  elif leaf == "weight":
    value = rng.uniform(0.5, 1.5, shape)
  elif leaf == "running_var":
    value = rng.uniform(0.005, 0.015, shape)
  else:
    scale = {"bias": 0.3, "running_mean": 0.02}[leaf]
    value = rng.normal(size=shape) * scale
  return value.astype(np.float32)


def random_file(network: str, folder: pathlib.Path) -> str:
  """An `.npz` of random tensors, as the network's `load` takes it."""
  path = folder / f"{network}.npz"
  shapes = NETWORKS[network].parameter_shapes()
  np.savez(path, **{k: random_tensor(k, v) for k, v in shapes.items()})
  return str(path)


def _random_state_dict(network: str) -> dict[str, Any]:
  import torch

  shapes = NETWORKS[network].parameter_shapes()
  return {k: torch.from_numpy(random_tensor(k, v)) for k, v in shapes.items()}


def _inception() -> Callable[[Any], Any]:
  torchvision_import.import_first()
  theirs = importlib.import_module("pytorch_fid.inception")
  tensors = _random_state_dict("inception")
  download = lambda *_, **__: tensors
  with mock.patch.object(theirs, "load_state_dict_from_url", download):
    model = theirs.InceptionV3().eval()

  def features(x):
    pool = model(x / 255)[0][:, :, 0, 0]
    return pool, pool @ tensors["fc.weight"].T

  return features


def _efficientnet() -> Callable[[Any], Any]:
  import efficientnet_lite_pytorch
  import torch

  model = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
  tensors = _random_state_dict("efficientnet")
  missing, unexpected = model.load_state_dict(tensors, strict=False)
  assert not unexpected, unexpected
  assert set(missing) == {"_fc.weight", "_fc.bias"}, missing
  model.eval()

  def features(x):
    x = torch.nn.functional.interpolate(
      x, (224, 224), mode="bilinear", antialias=True
    )
    return model.extract_features((x - 127) / 128).mean((2, 3))

  return features


def reference(network: str) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
  """The original with the random tensors: a function of NHWC images."""
  import torch

  features = {"inception": _inception, "efficientnet": _efficientnet}[network]()

  def outputs(images):
    images = np.broadcast_to(images, (*images.shape[:3], 3))
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
      found = features(x)
    return tuple(y.numpy() for y in as_tuple(found))

  return outputs


def as_tuple(outputs: Any) -> tuple[Any, ...]:
  """Features alone, or features and logits."""
  return outputs if isinstance(outputs, tuple) else (outputs,)


def error(found: Any, expected: np.ndarray) -> float:
  """The largest norm of the difference over the norm, of an image."""
  assert found.shape == expected.shape, (found.shape, expected.shape)
  difference = np.asarray(found, np.float64) - expected
  norm = lambda x: np.linalg.norm(x, axis=1)
  return float(np.max(norm(difference) / norm(expected)))


def _store() -> None:
  for network in NETWORKS:
    outputs = reference(network)
    arrays = {
      f"{i}/{j}": y
      for i, shape in enumerate(STORED_SHAPES)
      for j, y in enumerate(outputs(random_images(shape)))
    }
    np.savez_compressed(stored(network), **arrays)


def _images_per_second(features: Callable, parameters: Any) -> float:
  images = random_images((8, 256, 256, 3))
  seconds = []
  for _ in range(4):
    start = time.perf_counter()
    jax.block_until_ready(features(parameters, images))
    seconds.append(time.perf_counter() - start)
  return len(images) / min(seconds)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--store", action="store_true")
  if parser.parse_args().store:
    _store()
    return
  packages = ("torch", "torchvision", "jax")
  versions = [f"{x} {importlib.metadata.version(x)}" for x in packages]
  device = jax.devices()[0].device_kind
  print(f"{datetime.date.today()}, {', '.join(versions)}, float32, {device}\n")
  print("| network | images | error | images/s |\n| --- | --- | --- | --- |")
  for network, module in NETWORKS.items():
    with tempfile.TemporaryDirectory() as folder:
      parameters = module.load(random_file(network, pathlib.Path(folder)))
    parameters, features = parameters.parameters, jax.jit(module.features)
    rate = _images_per_second(features, parameters)
    original = reference(network)
    for shape in SHAPES:
      images = random_images(shape)
      pairs = zip(
        as_tuple(features(parameters, images)), original(images), strict=True
      )
      worst = max(error(*pair) for pair in pairs)
      print(f"| {network} | {shape} | {worst:.1e} | {rate:.1f} |", flush=True)


if __name__ == "__main__":
  main()
