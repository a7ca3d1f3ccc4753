"""What a training step needs of the chips that it is meant for.

Compiles the step of a config for a TPU slice that need not be there, or for the
devices that are, and reads memory, FLOPs, bytes and collectives off the
program. The time is that of a roofline: a bound from published peak rates.
"""

import logging
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.runs import (
  compiling,
  config_files,
  metrics_writer,
  outcome,
  plain_text,
  work_directory,
)
from dcae_jax.setup import (
  autoencoder_training,
  denoising,
  diffusion_training,
  keys,
  models,
  start,
  training_run,
)
from dcae_jax.training import hardware, program_cost

_LOG = logging.getLogger(__name__)
_GIB = 2**30
_OUT_OF_MEMORY = re.compile(
  r"(?:Used |temporaries \()([\d.]+)([KMGT])"
  r"(?: of |\) exceeds available HBM \()([\d.]+)([KMGT])"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Plan(NamedTuple):
  """Of one config on one topology; bytes, FLOPs and seconds are of one chip.

  Attributes:
    batch_size: of all chips together.
    parameters: bytes, with running statistics.
    averages: bytes of the EMA.
    optimizer: bytes of its state, and of all of the discriminator's.
    state: bytes of all that the step is called with.
    temporaries: bytes, above all activations; infinite: it does not fit, and
      the compiler does not say by how much.
    program: bytes of instructions.
    needed: bytes in all.
    available: bytes; 0: not known.
    fits: the compiler had room for all; on devices that are here, no more is
      needed than there is.
    bytes_accessed: read from and written to main memory.
    collectives: kind to number and bytes.
    seconds: the least time that a limit (compute, memory, interconnect) allows;
      empty where no rates are published.
    advice: what to change; empty where it fits.
  """

  config: str
  topology: str
  chips: int
  mesh: dict[str, int]
  batch_size: int
  parameters: int
  averages: int
  optimizer: int
  state: int
  temporaries: float
  program: int
  needed: float
  available: float
  fits: bool
  flops: float
  bytes_accessed: float
  collectives: dict[str, tuple[int, float]]
  seconds: dict[str, float]
  compile_seconds: float
  advice: str

  @property
  def step_seconds(self) -> float:
    """The roofline: the slowest of the limits; NaN: not known."""
    return max(self.seconds.values(), default=float("nan"))

  @property
  def images_per_second(self) -> float:
    return self.batch_size / self.step_seconds


def run(config: ConfigDict, workdir: epath.Path | None) -> bool:
  """Prints a table; into `workdir`, if there is one, goes `result.json`.

  Raises:
    UserError: a config file, topology, batch or change that cannot be.
  """
  keys.check(config)
  start.keep_programs(config)
  options = config.compiler_options.to_dict()
  # All that can be wrong is found before the first of them is compiled.
  jobs = list(_jobs(config))
  plans = []
  for name, topology, training in jobs:
    plans.append(measure(name, topology, training, options))
    print(details(plans[-1]), flush=True)
  print(table(plans), flush=True)
  if workdir is not None:
    start.write_config(config, workdir)
    rows = [
      plan._asdict() | {"step_seconds": plan.step_seconds} for plan in plans
    ]
    metrics_writer.write_json(workdir / "result.json", {"plans": rows})
    outcome.say(workdir, {"result": "result.json"})
  return True


def _jobs(
  config: ConfigDict,
) -> Iterator[tuple[str, str, training_run.Training]]:
  """Names of the config and of the topology, and the training."""
  names = [name.strip() for name in config.of.split(",") if name.strip()]
  if not names:
    raise errors.UserError(
      "config.of is empty; name the config of a training run, such as "
      "configs/f64_phase2.py"
    )
  for name in names:
    for topology in config.topology.split(","):
      devices = devices_of(topology.strip())
      for batch in config.batch_size_per_chip or (None,):
        for part, planned in load(name, config.changes.to_dict()).items():
          planned = keys.for_device(planned, devices[0].platform)
          if batch is not None:
            set_batch_size(planned, batch, len(devices))
          training = build(planned, devices)
          label = plain_text.markdown(f"{pathlib.Path(name).stem}{part}")
          yield label, topology.strip(), training


def build(
  config: ConfigDict, devices: list[jax.Device]
) -> training_run.Training:
  """The training of a run; UserError for a config that cannot be run."""
  return _BUILD[config.task](config, devices)


def _autoencoder(
  config: ConfigDict, devices: list[jax.Device]
) -> training_run.Training:
  return autoencoder_training.build(
    models.with_model(config), devices, predecessor_is_pending=True
  )


def _diffusion(
  config: ConfigDict, devices: list[jax.Device]
) -> training_run.Training:
  if config.latents:
    config = denoising.with_store(config, denoising.open_store(config))
  else:
    config = denoising.with_captions(config)
  return diffusion_training.build(config, devices)


_BUILD = {"train_autoencoder": _autoencoder, "train_diffusion": _diffusion}


def devices_of(topology: str) -> list[jax.Device]:
  """The chips of a slice, or with "" those that are here."""
  return hardware.describe_slice(topology) if topology else jax.devices()


def load(path: str, changes: dict[str, Any]) -> dict[str, ConfigDict]:
  """The training runs of a config file or work directory, by their parts.

  With changes of keys, such as {"mesh": {"spatial": 4}}. Raises UserError if
  there is neither, no training run in it, or an unknown key.
  """
  if work_directory.is_run(path):
    run = epath.Path(path).expanduser() / "config.json"
    config = keys.completed(work_directory.read_config(run), path)
  elif config_files.find(path):
    config = config_files.load(path)
    config_files.import_plugins(config.to_dict())
  else:
    raise errors.UserError(
      f"config.of={path!r} is neither a config file, nor the name of "
      "one, nor the work directory of a run"
    )
  task = config.get("task", "nothing")
  if task == "train_phases":
    runs = {f" phase {i}": config[f"phase{i}"] for i in (1, 2, 3)}
  elif task in _BUILD:
    runs = {"": config}
  else:
    raise errors.UserError(
      f"config.of={path!r} is of the task {task!r}; plans are of "
      f"{', '.join(_BUILD)} and train_phases"
    )
  for planned in runs.values():
    keys.change(planned, ConfigDict(changes), "config.changes")
  return runs


def set_batch_size(config: ConfigDict, per_chip: float, chips: int) -> None:
  """Raises UserError unless it makes a whole number of images."""
  batch_size = per_chip * chips
  if batch_size < 1 or batch_size != int(batch_size):
    raise errors.UserError(
      f"config.batch_size_per_chip={per_chip} is {batch_size:g} images on "
      f"{chips} chips; choose one that makes a whole number"
    )
  config.batch_size = int(batch_size)


def measure(
  name: str,
  topology: str,
  training: training_run.Training,
  compiler_options: dict[str, Any],
) -> Plan:
  """Compiles a step, and reads the program."""
  arguments = training.arguments()
  state = arguments[0]
  devices, failure = list(training.mesh.devices.flat), ""
  chip = hardware.chip(devices[0].device_kind)
  began = time.perf_counter()
  what = f"{name} for {topology or 'the devices here'}"
  try:
    with compiling.announced(what, arguments, devices):
      lowered = training.jitted().lower(*arguments)
      compiled = lowered.compile(compiler_options=compiler_options)
  except jax.errors.JaxRuntimeError as error:
    failure = str(error)
    if "RESOURCE_EXHAUSTED" not in failure:
      first = errors.first_line(error)
      raise errors.UserError(f"{name} does not compile: {first}") from error
  compile_seconds = time.perf_counter() - began
  available = hardware.usable_memory(chip)
  if failure:
    held, program = hardware.bytes_per_device(arguments), 0
    needed, available = _used(failure, available)
    cost = program_cost.Cost(0.0, {})
  else:
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes
    program = memory.generated_code_size_in_bytes
    needed = float(program_cost.memory(compiled))
    cost = program_cost.cost(compiled.as_text())
  chips = training.mesh.size
  flops = training.flops(remat=True) / chips
  plan = Plan(
    config=name,
    topology=topology or f"{chips} x {devices[0].device_kind}",
    chips=chips,
    mesh=dict(training.mesh.shape),
    batch_size=training.config.batch_size,
    parameters=hardware.bytes_per_device(state.variables),
    averages=hardware.bytes_per_device(state.ema),
    optimizer=hardware.bytes_per_device(
      (state.optimizer, state.discriminator, state.discriminator_optimizer)
    ),
    state=held,
    temporaries=needed - held - program,
    program=program,
    needed=needed,
    available=available,
    fits=not failure
    and (bool(topology) or not available or needed <= available),
    flops=flops,
    bytes_accessed=cost.bytes_accessed,
    collectives=cost.collectives,
    seconds={} if failure else _roofline(chip, flops, cost),
    compile_seconds=compile_seconds,
    advice="",
  )
  if plan.fits:
    return plan
  return plan._replace(advice=_advice(plan, training.takes_parts))


def _used(message: str, available: float) -> tuple[float, float]:
  """Bytes needed and available, as the compiler's error has them."""
  match = _OUT_OF_MEMORY.search(message)
  if match is None:
    return float("inf"), available
  used, used_unit, limit, limit_unit = match.groups()
  return float(used) * _UNITS[used_unit], float(limit) * _UNITS[limit_unit]


def _roofline(
  chip: hardware.Chip | None, flops: float, cost: program_cost.Cost
) -> dict[str, float]:
  if chip is None:
    return {}
  seconds = {
    "compute": flops / chip.flops,
    "memory": cost.bytes_accessed / chip.bandwidth,
  }
  if chip.interconnect:
    # An all-reduce is a reduce-scatter and an all-gather.
    moved = sum(
      size * (2 if kind == "all-reduce" else 1)
      for kind, (_, size) in cost.collectives.items()
    )
    seconds["interconnect"] = moved / chip.interconnect
  return seconds


def _advice(plan: Plan, takes_parts: bool) -> str:
  """What makes it fit, the cheapest change first."""
  changes = []
  ways = plan.mesh["data"] * plan.mesh["fsdp"]
  per_chip = plan.batch_size / ways
  if plan.mesh["fsdp"] < ways and plan.state > plan.available / 4:
    changes.append(
      f"split the state of {plan.state / _GIB:.1f} GiB with mesh.data=1 and "
      "mesh.fsdp=-1"
    )
  if per_chip > 1:
    parts = (
      f"take the {per_chip:g} images of a chip in parts, with "
      f"accumulation={int(per_chip)}, or "
    )
    changes.append(f"{parts if takes_parts else 'take '}a smaller batch_size")
  changes.append("set model.rematerialisation=True where it is not")
  if plan.chips > 1 and takes_parts:
    changes.append(
      f"split the rows of images with mesh.spatial={2 * plan.mesh['spatial']}"
    )
  changes.append("take more chips, or ones with more memory")
  return "; ".join(changes)


def details(plan: Plan) -> str:
  """All that is known of a plan, as text."""
  mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
  lines = [
    f"{plan.config} on {plan.topology}: {plan.chips} chips ({mesh}), "
    f"batch {plan.batch_size}, compiled in {plan.compile_seconds:.1f} s",
    f"  memory of a chip: {_gib(plan.parameters)} parameters + "
    f"{_gib(plan.averages)} averages + {_gib(plan.optimizer)} optimizer = "
    f"{_gib(plan.state)} held (with inputs); {_gib(plan.temporaries)} "
    f"activations and other temporaries; {_gib(plan.program)} program",
    f"  {_gib(plan.needed)} needed"
    + (f" of {_gib(plan.available)}" if plan.available else ""),
    f"  step of a chip: {plan.flops / 1e12:.3g} TFLOP, "
    f"{plan.bytes_accessed / 1e9:.3g} GB of memory read and written",
  ]
  for kind, (number, size) in sorted(plan.collectives.items()):
    lines.append(f"  {kind}: {number} times, {size / 1e6:,.1f} MB")
  for limit, seconds in plan.seconds.items():
    lines.append(f"  {limit} takes at least {1e3 * seconds:.1f} ms")
  if plan.seconds:
    lines.append(
      f"  roofline: {1e3 * plan.step_seconds:.1f} ms a step, "
      f"{plan.images_per_second:,.0f} images/s"
    )
  if not plan.fits:
    lines.append(f"  does not fit: {plan.advice}")
  return "\n".join(lines)


def table(plans: list[Plan]) -> str:
  """Markdown, a row for each plan."""
  lines = [
    "| config | topology | mesh | batch | memory of a chip, GiB | step, ms | "
    "images/s | compiled in |",
    "| --- " * 8 + "|",
  ]
  for plan in plans:
    limit = max(plan.seconds, key=plan.seconds.get, default="")
    step = f"{1e3 * plan.step_seconds:.0f} ({limit})" if limit else "-"
    rate = f"{plan.images_per_second:,.0f}" if limit else "-"
    needed = f"{plan.needed / _GIB:.3g}"
    if plan.available:
      needed += f" of {plan.available / _GIB:.4g}"
    if not plan.fits:
      needed, step, rate = f"{needed}: does not fit", "-", "-"
    mesh = " x ".join(map(str, plan.mesh.values()))
    lines.append(
      f"| {plan.config} | {plan.topology} | {mesh} | {plan.batch_size} | "
      f"{needed} | {step} | {rate} | {plan.compile_seconds:.0f} s |"
    )
  return "\n".join(lines)


def _gib(size: float) -> str:
  return f"{size / _GIB:.3g} GiB"
