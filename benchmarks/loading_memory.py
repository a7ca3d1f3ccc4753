"""Peak memory of loading released weights, against their size in float32.

  python -m benchmarks.loading_memory --variant=f128c512

Writes random weights in the diffusers layout into a temporary folder (f128c512:
4.5 GB) and loads them in a process of its own.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import safetensors.numpy

from dcae_jax.autoencoder import families
from dcae_jax.autoencoder.dcae import variants
from dcae_jax.autoencoder.weights import conversion


def _write(variant: variants.Architecture, folder: pathlib.Path) -> int:
  """Returns the bytes of the parameters and batch statistics in float32."""
  rng = np.random.default_rng(0)
  tensors = {}
  for entry in conversion.table(variant, 3, "diffusers"):
    if not entry.is_count:
      for name, shape in entry.tensor_shapes.items():
        tensors[name] = rng.standard_normal(shape, np.float32)
  file = folder / conversion.LAYOUTS["diffusers"]
  safetensors.numpy.save_file(tensors, file)
  config = families.to_config(variant, 3, 1.0)
  (folder / "config.json").write_text(json.dumps(config))
  return sum(4 * math.prod(tensor.shape) for tensor in tensors.values())


def _peak() -> int:
  """Bytes. (`ru_maxrss` would count what the parent process had.)"""
  status = pathlib.Path("/proc/self/status").read_text()
  (line,) = (x for x in status.splitlines() if x.startswith("VmHWM"))
  return 1024 * int(line.split()[1])


def _load(folder: str) -> None:
  import jax

  import dcae_jax

  jax.devices()
  before = _peak()
  start = time.perf_counter()
  autoencoder = dcae_jax.load(folder)
  seconds = time.perf_counter() - start
  print(autoencoder.variant, before, _peak(), seconds)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--variant", default="f128c512")
  parser.add_argument("--load", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.load:
    _load(options.load)
    return
  with tempfile.TemporaryDirectory() as folder:
    size = _write(variants.check_variant(options.variant), pathlib.Path(folder))
    found = subprocess.run(
      [sys.executable, "-m", "benchmarks.loading_memory", "--load", folder],
      capture_output=True,
      check=True,
      text=True,
    )
  variant, before, peak, seconds = found.stdout.split()
  print(
    f"{variant}: parameters {size / 1e9:.2f} GB, peak of the process "
    f"{int(peak) / 1e9:.2f} GB ({int(peak) / size:.2f} times), of which "
    f"{int(before) / 1e9:.2f} GB before loading; {float(seconds):.1f} s"
  )


if __name__ == "__main__":
  main()
