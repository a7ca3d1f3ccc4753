"""Whole training steps on this machine's CPU, against diffusers and torch.

  python -m benchmarks.training_speed --cases tiny-f8 f32c32:1

The same architecture and step in float32, from uint8 images on: L1 loss, in
phase 3 also the PatchGAN without its adaptive weight, AdamW, averages; no
clipping, no LPIPS. Ours is `autoencoder/train_step` under jit, with the
quickstart's model settings. Theirs is diffusers' AutoencoderDC, eager,
contiguous and channels last, with fused AdamW. What is frozen needs no
gradient, so that autograd records nothing before the first layer that learns.

Every case and layout has a child process, so that its peak of resident memory
is its own (with what compiling takes); children alternate, on all cores this
process may use, and repeats are pooled. The ratio is the faster torch layout's
least time over ours. It needs requirements-reference.txt.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import torchvision_import
from configs import base

SIZES = {"tiny-f8": (16, 64), "tiny-f32": (16, 64), "f32c32": (1, 256)}
PHASES = (1, 2, 3)
LAYOUTS = ("contiguous", "channels_last")
EMA_DECAY = 0.999
# Diffusers' names of what learns in a phase.
TRAINABLE = {
  1: ("",),
  2: ("encoder.conv_out.", "decoder.conv_in."),
  3: ("decoder.norm_out.", "decoder.conv_out."),
}


class Case(NamedTuple):
  """What is measured.

  Attributes:
    variant: a key of `SIZES`.
    phase: 1, 2 or 3.
    batch: images of a step.
    side: of the images, in pixels.
  """

  variant: str
  phase: int
  batch: int
  side: int

  @property
  def images(self) -> np.ndarray:
    shape = (self.batch, self.side, self.side, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)

  @property
  def config(self) -> Any:
    """Of the phase, in float32, without LPIPS, warm-up and clipping."""
    c = getattr(base, f"phase{self.phase}")(self.variant)
    c.model.dtype, c.model.rematerialisation = "float32", False
    c.resolution, c.batch_size = self.side, self.batch
    c.evaluation.resolutions, c.data.min_size = (self.side,), 0
    c.lpips.weight, c.discriminator.adaptive = 0.0, False
    c.optimizer.warmup_steps, c.optimizer.clip_norm = 0, 0.0
    c.ema.decay, c.ema.ramp_steps = EMA_DECAY, 0
    return c


def architecture(variant: str) -> dict[str, Any]:
  """Arguments of diffusers' AutoencoderDC."""
  from dcae_jax.autoencoder.dcae import hub_config, variants

  config = hub_config.to_config(variants.VARIANTS[variant], 3, 1.0, 0.0)
  del config["_class_name"]
  return config


def jax_training(case: Case) -> tuple[Any, Callable[[Any, Any], Any]]:
  """The state at step 0, and the jitted `(state, images)` step."""
  from dcae_jax.runs import host_memory
  from dcae_jax.setup import autoencoder_training

  host_memory.keep_freed()  # as the command line does
  training = autoencoder_training.build(
    case.config, predecessor_is_pending=True
  )
  jitted = training.jitted()
  return training.begin(), lambda state, x: jitted(state, x, {})


def torch_patchgan(width: int, layers: int) -> Any:
  """`autoencoder/patchgan.PatchGAN` in torch; children have the same names."""
  from torch import nn

  modules = nn.Sequential()
  convolution = functools.partial(nn.Conv2d, kernel_size=4, padding=1)
  activate = lambda i: modules.add_module(f"act_{i}", nn.LeakyReLU(0.2, True))
  modules.add_module("conv_0", convolution(3, width, stride=2))
  activate(0)
  before = width
  for i in range(1, layers + 1):
    channels, stride = width * min(2**i, 8), 2 if i < layers else 1
    conv = convolution(before, channels, stride=stride, bias=False)
    modules.add_module(f"conv_{i}", conv)
    norm = nn.BatchNorm2d(channels, track_running_stats=False)
    modules.add_module(f"norm_{i}", norm)
    activate(i)
    before = channels
  modules.add_module("logits", convolution(before, 1))
  return modules


class TorchTraining:
  """The step as a trainer in torch has it.

  Attributes:
    model: diffusers' AutoencoderDC.
    discriminator: of phase 3, else None.
    averaged: what learns and, in phase 1, the batch statistics.
    averages: of them.
  """

  def __init__(self, case: Case, arguments: dict[str, Any], layout: str):
    torchvision_import.import_first()
    import diffusers
    import torch

    self._torch = torch
    self._layout = {
      "contiguous": torch.contiguous_format,
      "channels_last": torch.channels_last,
    }[layout]
    config = case.config
    torch.manual_seed(0)
    self.model = diffusers.AutoencoderDC(**arguments)
    self.model.to(memory_format=self._layout).train(case.phase == 1)
    for name, parameter in self.model.named_parameters():
      parameter.requires_grad_(name.startswith(TRAINABLE[case.phase]))
    self._settings = config.optimizer
    self._learning, self._optimizer = self._adamw(self.model)
    self.averaged = [parameter.detach() for parameter in self._learning]
    if case.phase == 1:
      buffers = self.model.buffers()
      self.averaged += [x for x in buffers if x.is_floating_point()]
    self.averages = [x.clone() for x in self.averaged]
    self.discriminator = None
    if case.phase == 3:
      self.discriminator = torch_patchgan(
        config.discriminator.width, config.discriminator.layers
      ).to(memory_format=self._layout)
      self._judging, self._judging_optimizer = self._adamw(self.discriminator)
      self._weight = config.discriminator.weight

  def _adamw(self, module: Any) -> tuple[list[Any], Any]:
    """What learns in a module, and its optimizer; kernels alone decay."""
    c = self._settings
    learning = [x for x in module.parameters() if x.requires_grad]
    groups = [
      {"params": [x for x in learning if x.ndim > 1]},
      {"params": [x for x in learning if x.ndim < 2], "weight_decay": 0.0},
    ]
    return learning, self._torch.optim.AdamW(
      groups,
      lr=c.learning_rate,
      betas=(c.beta1, c.beta2),
      weight_decay=c.weight_decay,
      fused=True,
    )

  @property
  def parameters_trained(self) -> int:
    return sum(x.numel() for x in self._learning)

  def step(self, images: Any) -> dict[str, float]:
    """One step; the losses before it. `images` are uint8 [b, h, w, c]."""
    relu = self._torch.nn.functional.relu
    images = images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    images = images.contiguous(memory_format=self._layout)
    reconstructions = self.model(images).sample
    total = self._torch.nn.functional.l1_loss(reconstructions, images)
    losses = {"l1": total.detach()}
    if self.discriminator is not None:
      # Both losses share this pass, as both are of the same discriminator.
      fake = self.discriminator(reconstructions)
      generator = -fake.mean()
      total = total + self._weight * generator
      total.backward(inputs=self._learning, retain_graph=True)
      real = self.discriminator(images)
      loss = 0.5 * (relu(1 - real).mean() + relu(1 + fake).mean())
      loss.backward(inputs=self._judging)
      losses["generator"] = generator.detach()
      losses["discriminator"] = loss.detach()
      self._judging_optimizer.step()
      self._judging_optimizer.zero_grad()
    else:
      total.backward()
    self._optimizer.step()
    self._optimizer.zero_grad()
    self._torch._foreach_lerp_(self.averages, self.averaged, 1 - EMA_DECAY)
    return {name: loss.item() for name, loss in losses.items()}


def measure(child: str, case: Case, settings: Any, repeats: int) -> None:
  """Prints one line of JSON: seconds, memory, and how many learn."""
  images = case.images
  if child == "jax":
    import jax

    from dcae_jax.training import freezing

    state, train = jax_training(case)
    images = jax.numpy.asarray(images)
    trained = freezing.count(state.optimizer[0].mu)

    def step():
      nonlocal state
      state, metrics = jax.block_until_ready(train(state, images))
      return float(metrics["loss/l1"])
  else:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    training = TorchTraining(case, settings, child)
    images = torch.from_numpy(images)
    trained = training.parameters_trained
    step = lambda: training.step(images)["l1"]
  seconds = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    loss = step()
    seconds.append(time.perf_counter() - start)
  if not math.isfinite(loss):
    sys.exit(f"{child}: the L1 loss of {case} is {loss}")
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(json.dumps([seconds[0], seconds[1:], peak, trained]), flush=True)


def run_child(
  child: str, case: Case, repeats: int
) -> tuple[float, list[float], int, int]:
  """Seconds of the first step and the others, bytes, parameters trained."""
  # Made here, so that JAX is no part of the memory of torch's children.
  settings = architecture(case.variant)
  arguments = json.dumps([child, case, settings, repeats])
  output = subprocess.run(
    [sys.executable, "-m", "benchmarks.training_speed", "--child", arguments],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  ).stdout
  return tuple(json.loads(output.splitlines()[-1]))


def compare(case: Case, rounds: int, repeats: int) -> float:
  """Prints the rows of a case; how many times faster ours is."""
  children = ("contiguous", "jax", "channels_last")
  firsts, seconds, peaks, trained = (defaultdict(list) for _ in range(4))
  for _ in range(rounds):
    for child in children:
      first, others, peak, count = run_child(child, case, repeats)
      firsts[child].append(first)
      seconds[child] += others
      peaks[child].append(peak)
      trained[child].append(count)
  if len({count for counts in trained.values() for count in counts}) > 1:
    sys.exit(f"{case}: not the same parameters learn: {dict(trained)}")
  for child in (*LAYOUTS, "jax"):
    print(
      f"{case.variant:9} {case.phase:5} {case.batch:5} {case.side:4}  "
      f"{child:13} {min(seconds[child]):8.3f} "
      f"{statistics.median(seconds[child]):8.3f} {min(firsts[child]):8.1f} "
      f"{max(peaks[child]) / 1e6:8.0f}",
      flush=True,
    )
  theirs = min(min(seconds[layout]) for layout in LAYOUTS)
  return theirs / min(seconds["jax"])


def cases(names: list[str]) -> list[Case]:
  """Of names such as "tiny-f8", all phases, and "tiny-f8:3"."""
  known = {
    name: Case(variant, phase, *size)
    for variant, size in SIZES.items()
    for phase in PHASES
    for name in [f"{variant}:{phase}"]
  }
  found = []
  for name in names:
    chosen = [
      case for key, case in known.items() if name in (key, case.variant)
    ]
    if not chosen:
      choices = ", ".join([*SIZES, *known])
      sys.exit(f"unknown case {name!r}; known are {choices}")
    found += chosen
  return found


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--cases",
    nargs="+",
    default=list(SIZES),
    help="variants, or variants and phases, as tiny-f8:3; all by default",
  )
  parser.add_argument("--rounds", type=int, default=3, help="of children")
  parser.add_argument("--repeats", type=int, default=5, help="in each child")
  parser.add_argument("--child", help="internal")
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
    child, case, settings, repeats = json.loads(args.child)
    measure(child, Case(*case), settings, repeats)
    return
  chosen = cases(args.cases)
  print(
    f"training steps, float32, {len(os.sched_getaffinity(0))} cores, seconds\n"
    f"{'variant':9} phase batch side  {'':13} {'least':>8} {'median':>8} "
    f"{'first':>8} {'peak MB':>8}"
  )
  ratios = [(case, compare(case, args.rounds, args.repeats)) for case in chosen]
  for case, ratio in ratios:
    print(f"RATIO {case.variant} phase {case.phase} {ratio:.2f}")


if __name__ == "__main__":
  main()
