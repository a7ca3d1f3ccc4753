"""Encoding and decoding on this machine's CPU, against diffusers.

  python -m benchmarks.reconstruction_speed

Seconds for the same architecture with random weights, float32: this library
(jit) and diffusers' AutoencoderDC (torch, eager, contiguous and channels last).
The two run in child processes that alternate, on all cores this process may
use; repeats of all children are pooled. The ratio is the faster torch layout's
least time over ours. It needs requirements-reference.txt.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict

import numpy as np

from benchmarks import torchvision_import

BATCHES = (1, 4)
PARTS = ("encode", "decode")


def timed(name: str, batch: int, repeats: int, f) -> None:
  """Prints one line of JSON: the seconds of the first call and the others."""
  seconds = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    f()
    seconds.append(time.perf_counter() - start)
  print(json.dumps([name, batch, seconds[0], seconds[1:]]), flush=True)


def images(batch: int, side: int) -> np.ndarray:
  shape = (batch, side, side, 3)
  return np.random.default_rng(0).uniform(-1, 1, shape).astype("float32")


def measure_jax(side: int, repeats: int) -> None:
  import jax

  from dcae_jax.autoencoder import families

  model = families.create("f32c32")
  variables = jax.jit(model.init)(jax.random.key(0), images(1, 32))
  encode, decode = (
    jax.jit(lambda v, x, part=part: model.apply(v, x, method=part))
    for part in PARTS
  )
  for batch in BATCHES:
    x = jax.numpy.asarray(images(batch, side))
    run_encode = lambda x=x: jax.block_until_ready(encode(variables, x))
    timed("jax encode", batch, repeats, run_encode)
    z = run_encode()
    run_decode = lambda z=z: jax.block_until_ready(decode(variables, z))
    timed("jax decode", batch, repeats, run_decode)


def measure_torch(side: int, repeats: int) -> None:
  torchvision_import.import_first()
  import diffusers
  import torch

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  res, vit = "ResBlock", "EfficientViTBlock"
  model = diffusers.AutoencoderDC(
    encoder_block_types=(res,) * 3 + (vit,) * 3,
    decoder_block_types=(res,) * 3 + (vit,) * 3,
    encoder_layers_per_block=(0, 4, 8, 2, 2, 2),
    decoder_layers_per_block=(0, 5, 10, 2, 2, 2),
    encoder_qkv_multiscales=((),) * 6,
    decoder_qkv_multiscales=((),) * 6,
    decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * 3,
    decoder_act_fns=("relu",) * 3 + ("silu",) * 3,
  ).eval()
  layouts = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
  }
  with torch.no_grad():
    for name, layout in layouts.items():
      model = model.to(memory_format=layout)
      for batch in BATCHES:
        x = torch.from_numpy(images(batch, side)).permute(0, 3, 1, 2)
        x = x.contiguous(memory_format=layout)
        z = model.encode(x).latent
        for part, f, argument in (
          ("encode", model.encode, x),
          ("decode", model.decode, z),
        ):
          call = lambda f=f, a=argument: f(a)
          timed(f"{name} {part}", batch, repeats, call)


def run_children(
  side: int, rounds: int, repeats: int
) -> dict[tuple[str, int], list[float]]:
  """Seconds by (name, batch), of children that alternate."""
  seconds = defaultdict(list)
  for _ in range(rounds):
    for child in ("torch", "jax"):
      command = [sys.executable, "-m", "benchmarks.reconstruction_speed"]
      options = ["--child", child, "--side", side, "--repeats", repeats]
      command += [str(option) for option in options]
      output = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
      ).stdout
      for line in output.splitlines():
        name, batch, first, others = json.loads(line)
        seconds[name, batch] += others
        if child == "jax":
          seconds[f"{name}, first call", batch].append(first)
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--side", type=int, default=256, help="pixels")
  parser.add_argument("--rounds", type=int, default=3, help="of children")
  parser.add_argument("--repeats", type=int, default=3, help="in each child")
  parser.add_argument("--child", choices=("jax", "torch"), help="internal")
  args = parser.parse_args()
  missing = [
    name
    for name in ("torch", "diffusers")
    if importlib.util.find_spec(name) is None
  ]
  if missing:
    sys.exit(
      f"{' and '.join(missing)} missing: "
      "pip install -r requirements-reference.txt"
    )
  if args.child:
    measure = measure_jax if args.child == "jax" else measure_torch
    measure(args.side, args.repeats)
    return
  seconds = run_children(args.side, args.rounds, args.repeats)
  print(
    f"f32c32, {args.side} px, float32, {len(os.sched_getaffinity(0))} cores, "
    "seconds: least (median)"
  )
  names = ("contiguous", "channels_last", "jax")
  print(f"{'':16}" + "".join(f"{name:>16}" for name in names) + "   ratio")
  for batch in BATCHES:
    for part in PARTS:
      samples = [seconds[f"{name} {part}", batch] for name in names]
      least = [min(sample) for sample in samples]
      cells = [
        f"{low:.2f} ({statistics.median(sample):.2f})"
        for low, sample in zip(least, samples, strict=True)
      ]
      ratio = min(least[:-1]) / least[-1]
      print(
        f"{part}, batch {batch}".ljust(16)
        + "".join(f"{cell:>16}" for cell in cells)
        + f"{ratio:8.2f}"
      )
  for batch in BATCHES:
    firsts = [min(seconds[f"jax {p}, first call", batch]) for p in PARTS]
    encode, decode = firsts
    print(
      f"first call with compilation, batch {batch}: encode {encode:.1f}, "
      f"decode {decode:.1f}"
    )


if __name__ == "__main__":
  main()
