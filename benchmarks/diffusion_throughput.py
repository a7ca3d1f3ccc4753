"""Diffusion on SD-VAE's and DC-AE's latents: the speed-up of tables 3 and 4.

  python -m benchmarks.diffusion_throughput [--model=PixArt] [--decode]

UViT-H (table 3) or PixArt-XL (table 4) trains and samples on latents of 512 px
images: f8 in patches of 2, f32 and, UViT-H, f64 in patches of 1. A training
step is forward, backward and AdamW, without the encoder: latents are stored.
Sampling is guided: DPM-Solver++(2M) in 30 steps for UViT-H and in 20, equal in
time, for PixArt-XL, so 60 and 40 network calls an image. PixArt-XL is told
states of captions as wide as T5-XXL's; T5-XXL itself is left out, as it costs
the same on all latents. Ratios are throughputs over that of f8.

1. Measured: the denoiser with `depth` and `hidden` made smaller, equally for
   all latents, with heads as wide as at full size. Programs of all latents
   alternate; the least time of each counts. No decoding. On a CPU that others
   use, short programs find quiet moments and long ones do not; so there is the
   ratio of the core seconds, too.
2. Computed: FLOPs and bytes of the real denoiser and of the real decoders, as
   XLA counts them in programs for the TPU that are lowered, not run. A guided
   call counts once a step; the solver's own arithmetic is left out. Bytes are
   those before fusion: an upper bound.
3. With --memory, computed: bytes of the real denoiser's training step, compiled
   for one TPU v5p, without rematerialisation; averages of the parameters, which
   the step here does not update, are added.
4. With --decode, measured: one decode by each real autoencoder, float32.

A small denoiser with a real decoder would compare nothing. So sampling with
decoding is computed only.

The measured ratios are not the paper's, for these reasons:
- Attention between tokens is 2n / 12d of the linear layers' cost. It is 0.15 on
  f8 in UViT-H, and twice that at half its width. That favours f64.
- AdamW costs the same on all latents. With a small batch it is a larger part of
  a step on f64. That favours f8.
- So does what each operation costs besides its arithmetic.
- Attention writes its n^2 weights to memory in float32. On a CPU it runs at
  less than half of the linear layers' rate on f8. That favours f64.
- The paper's are an H100's in half precision, with TensorRT for sampling.
"""

import argparse
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from configs import base
from dcae_jax.autoencoder import families, network
from dcae_jax.diffusion import (
  conditioning,
  guidance,
  objectives,
  samplers,
)
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.training import hardware, optimizer, sharding

_IMAGE_SIDE = 512
_CLASSES = 1000
_ONE_CHIP = "v5p:1x1x1"
_GIB = 2**30


class Latents(NamedTuple):
  """A row of a table.

  Attributes:
    autoencoder: a key of `families.variants()`.
    patch_size: of the denoiser.
    training: the paper's throughput over f8's.
    sampling: the paper's throughput over f8's.
  """

  autoencoder: str
  patch_size: int
  training: str
  sampling: str

  @property
  def shape(self) -> tuple[int, int, int]:
    variant = families.check_variant(self.autoencoder)
    side = _IMAGE_SIDE // variant.spatial_compression
    return side, side, variant.latent_channels

  @property
  def tokens(self) -> int:
    return (self.shape[0] // self.patch_size) ** 2


# Images per second: UViT-H, and on f32 DiT-XL for want of UViT-H.
_UVIT_LATENTS = {
  "f8 p2": Latents("sd-vae-f8c4", 2, "1 (55/s)", "1 (5.85/s)"),
  "f32 p1": Latents(
    "f32c32", 1, f"DiT-XL: {241 / 54:.1f}", f"DiT-XL: {4.03 / 0.85:.1f}"
  ),
  "f64 p1": Latents(
    "f64c128", 1, f"{984 / 55:.1f} (984/s)", f"{111.77 / 5.85:.1f} (111.77/s)"
  ),
}
# Those of DiT-XL, of table 3; it is PixArt-XL without captions.
_PIXART_LATENTS = {
  "f8 p2": Latents("sd-vae-f8c4", 2, "DiT-XL: 1 (54/s)", "DiT-XL: 1 (0.85/s)"),
  "f32 p1": Latents(
    "f32c32",
    1,
    f"DiT-XL: {241 / 54:.1f} (241/s)",
    f"DiT-XL: {4.03 / 0.85:.1f} (4.03/s)",
  ),
}


class Compared(NamedTuple):
  """A denoiser, how it learns and samples, and latents to do so on.

  Attributes:
    variant: a key of `denoisers.variants()`.
    latents: by name; ratios are over the first.
    conditioning: what it is told.
    objective: what it learns.
    sampler: of its images.
    steps: of the sampler.
    guidance: its scale.
    optimizer: settings, as in a config.
  """

  variant: str
  latents: dict[str, Latents]
  conditioning: conditioning.Conditioning
  objective: objectives.Objective
  sampler: samplers.Sampler
  steps: int
  guidance: float
  optimizer: ConfigDict

  @property
  def full_size(self) -> dict[str, int]:
    return denoisers.find(self.variant).fields


MODELS = {
  "UViT": Compared(
    "UViT-H",
    _UVIT_LATENTS,
    conditioning.ClassLabels(_CLASSES),
    objectives.scaled_linear(),
    samplers.DPMSolver(),
    30,
    1.5,
    base.latent_diffusion().optimizer,
  ),
  "PixArt": Compared(
    "PixArt-XL",
    _PIXART_LATENTS,
    conditioning.Captions(120, 4096),
    objectives.improved_ddpm(),
    samplers.TimeDPMSolver(),
    20,
    4.5,
    base.pixart("PixArt-XL").optimizer,
  ),
}


class Cost(NamedTuple):
  """What XLA counts in a program, for one image."""

  flops: float
  bytes: float


class Programs(NamedTuple):
  """A denoiser's programs, to be compiled, and the shapes of their arguments.

  Attributes:
    train: parameters, optimizer's state, key, latents and conditions to the
      first two, updated.
    call: parameters, noisy latents, times and conditions to a guided
      prediction.
    sample: parameters, noise and conditions to latents.
  """

  train: Callable
  train_arguments: tuple
  call: Callable
  call_arguments: tuple
  sample: Callable
  sample_arguments: tuple


def _denoiser(
  compared: Compared, latents: Latents, depth: int, hidden: int, dtype: str
) -> denoisers.Module:
  full_size = compared.full_size
  heads = hidden * full_size["heads"] // full_size["hidden"]
  side, _, channels = latents.shape
  return denoisers.create(
    denoisers.Variant(
      denoisers.find(compared.variant).family,
      {"depth": depth, "hidden": hidden, "heads": heads},
    ),
    latent_size=side,
    latent_channels=channels,
    conditioning=compared.conditioning,
    learn_sigma=compared.objective.output_channels(channels) > channels,
    patch_size=latents.patch_size,
    dtype=dtype,
  )


def _full_size(compared: Compared, latents: Latents) -> denoisers.Module:
  size = compared.full_size
  return _denoiser(compared, latents, size["depth"], size["hidden"], "bfloat16")


def _programs(
  compared: Compared,
  model: denoisers.Module,
  train_batch: int,
  sample_batch: int,
) -> Programs:
  objective, kind = compared.objective, compared.conditioning
  settings = optimizer.Settings(**compared.optimizer)
  adamw, _ = optimizer.create(settings, steps=1)

  def network(parameters, condition):
    return lambda z, t: model.apply({"params": parameters}, z, t, condition)

  def guided(parameters, condition):
    apply = lambda z, t, condition: network(parameters, condition)(z, t)
    null = kind.null(condition)
    return guidance.guided(apply, condition, null, compared.guidance)

  def train(parameters, state, key, z, condition):
    def loss(parameters):
      losses, _ = objective.loss(network(parameters, condition), key, z)
      return jnp.mean(losses)

    gradients = jax.grad(loss)(parameters)
    updates, state = adamw.update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), state

  def call(parameters, z, t, condition):
    return guided(parameters, condition)(z, t)

  def sample(parameters, z, condition):
    model_fn = guided(parameters, condition)
    key = jax.random.key(0)  # the solver is deterministic
    steps = compared.steps
    return compared.sampler.sample(objective, model_fn, key, z, steps)

  parameters = denoisers.abstract_variables(model)["params"]
  state = jax.eval_shape(adamw.init, parameters)
  key = jax.eval_shape(lambda: jax.random.key(0))
  shape = (*model.latent_size, model.latent_channels)
  z = lambda b: jax.ShapeDtypeStruct((b, *shape), "float32")
  t = jax.ShapeDtypeStruct((sample_batch,), "float32")
  b = sample_batch
  return Programs(
    train,
    (parameters, state, key, z(train_batch), kind.abstract(train_batch)),
    call,
    (parameters, z(b), t, kind.abstract(b)),
    sample,
    (parameters, z(b), kind.abstract(b)),
  )


def _cost(program: Callable, arguments: tuple, images: int) -> Cost:
  """Of one image; nothing is compiled or allocated."""
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    traced = jax.jit(program).trace(*arguments)
    # As other platforms compute it: the fast convolutions of the CPU are loops,
    # whose body would be counted once.
    lowered = traced.lower(lowering_platforms=("tpu",))
    counted = lowered.cost_analysis()
  return Cost(counted["flops"] / images, counted["bytes accessed"] / images)


def _decoder(latents: Latents, dtype: str) -> tuple[Callable, tuple]:
  model = families.create(latents.autoencoder, dtype=dtype)
  decode = lambda variables, z: model.apply(variables, z, method="decode")
  z = jax.ShapeDtypeStruct((1, *latents.shape), "float32")
  return decode, (network.abstract_variables(model, 3), z)


def _filled(arguments: Any) -> Any:
  """Arguments of these shapes: small numbers, not negative; labels; bits."""
  keys = iter(jax.random.split(jax.random.key(0), 10_000))

  def fill(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return next(keys)
    if jnp.issubdtype(x.dtype, jnp.integer):
      return jax.random.randint(next(keys), x.shape, 0, _CLASSES, x.dtype)
    if x.dtype == jnp.bool_:
      return jax.random.bernoulli(next(keys), shape=x.shape)
    return 0.02 * jnp.abs(jax.random.normal(next(keys), x.shape, x.dtype))

  return jax.tree.map(fill, arguments)


class Times(NamedTuple):
  """What a program took: seconds, and those of all cores together."""

  seconds: float
  core_seconds: float


def _timed(f: Callable, *arguments) -> tuple[Times, Any]:
  start, core_start = time.perf_counter(), time.process_time()
  result = jax.block_until_ready(f(*arguments))
  seconds = time.perf_counter() - start
  return Times(seconds, time.process_time() - core_start), result


def _least(times: list[Times]) -> Times:
  return Times(*map(min, zip(*times, strict=True)))


def _table(columns: dict[str, Iterable[str]]) -> None:
  rows = zip(*columns.values(), strict=True)
  for cells in (columns, ["---"] * len(columns), *rows):
    print(f"| {' | '.join(cells)} |")
  print(flush=True)


def _over_first(costs: list[float]) -> list[str]:
  """Throughput ratios: the first cost divided by each."""
  return [f"{costs[0] / cost:.1f}" for cost in costs]


def _measure(compared: Compared, arguments: argparse.Namespace) -> None:
  """Trains and samples with small denoisers on this machine."""
  compiled, times, flops = {}, {}, {}
  train_batch, sample_batch = arguments.train_batch, arguments.sample_batch
  for name, latents in compared.latents.items():
    model = _denoiser(
      compared, latents, arguments.depth, arguments.hidden, arguments.dtype
    )
    p = _programs(compared, model, train_batch, sample_batch)
    train = jax.jit(p.train, donate_argnums=(0, 1))
    compiled[name] = (
      train.lower(*p.train_arguments).compile(),
      list(_filled(p.train_arguments)),
      jax.jit(p.sample).lower(*p.sample_arguments).compile(),
      _filled(p.sample_arguments[1:]),
    )
    times[name] = ([], [])
    flops[name] = (
      _cost(p.train, p.train_arguments, train_batch).flops,
      _cost(p.call, p.call_arguments, sample_batch).flops,
    )
  for _ in range(arguments.rounds):
    for name, (train, state, sample, noise) in compiled.items():
      for _ in range(arguments.train_steps):
        taken, state[:2] = _timed(train, *state)
        times[name][0].append(taken)
      taken, _ = _timed(sample, state[0], *noise)
      times[name][1].append(taken)
  print(
    f"Measured: {arguments.model} of depth {arguments.depth}, hidden "
    f"{arguments.hidden}, "
    f"{arguments.dtype}; batch {train_batch} in training, {sample_batch} in "
    f"sampling; least of {arguments.rounds * arguments.train_steps} steps and "
    f"{arguments.rounds} samplings; without decoding.\n"
  )
  for i, (part, batch) in enumerate(
    (("training", train_batch), ("sampling", sample_batch))
  ):
    least = [_least(x[i]) for x in times.values()]
    columns = {
      "latents": compared.latents,
      "patches": [str(x.tokens) for x in compared.latents.values()],
      f"{part}, s": [f"{x.seconds:.3f}" for x in least],
      "images/s": [f"{batch / x.seconds:.3f}" for x in least],
      "ratio": _over_first([x.seconds for x in least]),
      "by core seconds": _over_first([x.core_seconds for x in least]),
      "by FLOPs at this size": _over_first([x[i] for x in flops.values()]),
      "paper's": [getattr(x, part) for x in compared.latents.values()],
    }
    if jax.default_backend() != "cpu":
      del columns["by core seconds"]
    _table(columns)


def _compute(compared: Compared, batch: int) -> None:
  """Counts the real denoisers and decoders; nothing runs."""
  training, calls, decodes = [], [], []
  for latents in compared.latents.values():
    p = _programs(compared, _full_size(compared, latents), batch, batch)
    training.append(_cost(p.train, p.train_arguments, batch))
    calls.append(_cost(p.call, p.call_arguments, batch))
    decodes.append(_cost(*_decoder(latents, "bfloat16"), 1))
  size = compared.full_size
  print(
    f"Computed: {compared.variant} of depth {size['depth']}, hidden "
    f"{size['hidden']}, bfloat16; for one image of a batch of {batch}; "
    "decoders, bfloat16, for one image; bytes before fusion.\n"
  )
  _table(
    {
      "latents": compared.latents,
      "patches": [str(x.tokens) for x in compared.latents.values()],
      "training, GFLOP": [f"{x.flops / 1e9:.0f}" for x in training],
      "ratio": _over_first([x.flops for x in training]),
      "training, GB": [f"{x.bytes / 1e9:.1f}" for x in training],
      "ratio by bytes": _over_first([x.bytes for x in training]),
      "paper's": [x.training for x in compared.latents.values()],
    }
  )
  # A guided call is two network calls for each image.
  networks = [compared.steps * x.flops for x in calls]
  totals = [x + y.flops for x, y in zip(networks, decodes, strict=True)]
  _table(
    {
      "latents": compared.latents,
      "network call, GFLOP": [f"{x.flops / 2e9:.1f}" for x in calls],
      f"{2 * compared.steps} calls, TFLOP": [
        f"{x / 1e12:.2f}" for x in networks
      ],
      "ratio": _over_first(networks),
      "ratio by bytes": _over_first([x.bytes for x in calls]),
      "decode, TFLOP": [f"{x.flops / 1e12:.2f}" for x in decodes],
      "with decode, TFLOP": [f"{x / 1e12:.2f}" for x in totals],
      "ratio with decode": _over_first(totals),
      "paper's": [x.sampling for x in compared.latents.values()],
    }
  )


def _compute_memory(compared: Compared, batch: int) -> None:
  """Of training the real denoisers on one chip; nothing runs."""
  chip = hardware.describe_slice(_ONE_CHIP)[0]
  place = jax.sharding.SingleDeviceSharding(chip)
  parameters, states, temporaries = [], [], []
  for latents in compared.latents.values():
    p = _programs(compared, _full_size(compared, latents), batch, 1)
    placed = sharding.placed(
      p.train_arguments, jax.tree.map(lambda _: place, p.train_arguments)
    )
    train = jax.jit(p.train, donate_argnums=(0, 1))
    memory = train.lower(*placed).compile().memory_analysis()
    sizes = [
      sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
      for tree in p.train_arguments[:2]
    ]
    parameters.append(sizes[0])
    states.append(sizes[1])
    temporaries.append(
      memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    )
  totals = [
    2 * x + y + z
    for x, y, z in zip(parameters, states, temporaries, strict=True)
  ]
  gib = lambda sizes: [f"{size / _GIB:.1f}" for size in sizes]
  print(
    f"Computed: training of {compared.variant}, bfloat16, batch {batch}, "
    f"compiled for {_ONE_CHIP}; GiB.\n"
  )
  _table(
    {
      "latents": compared.latents,
      "parameters": gib(parameters),
      "averages": gib(parameters),
      "optimizer": gib(states),
      "activations and other temporaries": gib(temporaries),
      "in all": gib(totals),
      "part of f8's": [f"{total / totals[0]:.2f}" for total in totals],
    }
  )


def _measure_decoding(compared: Compared, rounds: int) -> None:
  """One image by each real decoder on this machine, float32."""
  compiled = {}
  for name, latents in compared.latents.items():
    decode, arguments = _decoder(latents, "float32")
    decode = jax.jit(decode).lower(*arguments).compile()
    compiled[name] = (decode, _filled(arguments))
  times = {name: [] for name in compared.latents}
  for _ in range(rounds):
    for name, (decode, arguments) in compiled.items():
      times[name].append(_timed(decode, *arguments)[0])
  least = [_least(x).seconds for x in times.values()]
  print(
    f"Measured: one {_IMAGE_SIDE} px image decoded by the real autoencoders, "
    f"float32; least of {rounds}.\n"
  )
  _table(
    {
      "latents": compared.latents,
      "autoencoder": [x.autoencoder for x in compared.latents.values()],
      "decode, s": [f"{seconds:.1f}" for seconds in least],
      "ratio": _over_first(least),
    }
  )


def _hardware() -> str:
  device = jax.devices()[0]
  if device.platform != "cpu":
    return f"{jax.device_count()} x {device.device_kind}"
  lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  names = [x.partition(":")[2] for x in lines if x.startswith("model name")]
  cores = len(os.sched_getaffinity(0))
  return f"{names[0].strip() if names else 'CPU'}, {cores} cores"


def _commit() -> str:
  command = ["git", "describe", "--always", "--dirty"]
  folder = pathlib.Path(__file__).parent
  return subprocess.run(
    command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True
  ).stdout.strip()


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", choices=MODELS, default="UViT")
  parser.add_argument("--depth", type=int, default=2, help="blocks; even")
  parser.add_argument("--hidden", type=int, default=576, help="72 a head")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--train_batch", type=int, default=8)
  parser.add_argument("--sample_batch", type=int, default=2)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--train_steps", type=int, default=2, help="in a round")
  parser.add_argument(
    "--full_size_batch", type=int, default=256, help="of what is computed"
  )
  parser.add_argument(
    "--memory", action="store_true", help="compile the real training steps, too"
  )
  parser.add_argument(
    "--memory_batch", type=int, default=8, help="of these steps"
  )
  parser.add_argument(
    "--decode", action="store_true", help="measure the real decoders, too"
  )
  arguments = parser.parse_args()
  compared = MODELS[arguments.model]
  head = compared.full_size["hidden"] // compared.full_size["heads"]
  if arguments.hidden % head:
    parser.error(f"--hidden={arguments.hidden} is not a multiple of {head}")
  print(f"Diffusion on latents of {_IMAGE_SIDE} px images.")
  print(f"Commit {_commit()}; jax {jax.__version__}; {_hardware()}.\n")
  _compute(compared, arguments.full_size_batch)
  if arguments.memory:
    _compute_memory(compared, arguments.memory_batch)
  loads = [os.getloadavg()[0]]
  _measure(compared, arguments)
  if arguments.decode:
    _measure_decoding(compared, arguments.rounds)
  loads.append(os.getloadavg()[0])
  print("Load of the machine before and after what is measured (it adds 1 for")
  print(f"each core it keeps busy): {loads[0]:.1f}, {loads[1]:.1f}.")


if __name__ == "__main__":
  main()
