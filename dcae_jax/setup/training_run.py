"""A training run in its work directory: begins or goes on, saves, ends.

The same for every model; what differs comes as `Training` and `Work`.
"""

import abc
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.data import batches
from dcae_jax.runs import compiling, metrics_writer, outcome, processes
from dcae_jax.setup import start
from dcae_jax.training import (
  checkpoint,
  hardware,
  learning,
  loop,
  optimizer,
  overview,
  profiler,
  program_cost,
  sharding,
)
from dcae_jax.training import state as state_lib

_LOG = logging.getLogger(__name__)
_GIB = 2**30
_MADE = {
  "checkpoints": "checkpoints", "metrics": "metrics.jsonl",
  "pictures": "samples", "Weights & Biases": "wandb", "traces": "profile",
  "result": "result.json",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Training(abc.ABC):
  """What is known of a training before anything is compiled.

  Attributes:
    config: of the run.
    mesh: of the devices.
    learning: how parameters do.
    takes_parts: of a batch (`accumulation`) and of images (`mesh.spatial`).
    advice: for where the devices lack memory.
  """

  config: ConfigDict
  mesh: Mesh
  learning: learning.Learning
  takes_parts: ClassVar[bool]
  advice: ClassVar[str]

  @property
  @abc.abstractmethod
  def abstract(self) -> state_lib.TrainState:
    """Shapes of the state."""

  @functools.cached_property
  def shardings(self) -> Any:
    """Where the leaves of the state live."""
    return sharding.shardings(self.abstract, self.mesh)

  @abc.abstractmethod
  def begin(self) -> state_lib.TrainState:
    """The state at step 0: from `init_from`, or from initial values."""

  @abc.abstractmethod
  def step(self, gather: Callable[[Any], Any]) -> Callable[..., Any]:
    """`(state, batch, ...) -> (state, metrics)`, not jitted.

    `gather` makes parameters whole that devices share.
    """

  def jitted(self) -> Any:
    """The step over the mesh; the state is donated."""
    return jax.jit(
      self.step(sharding.gather(self.shardings.params, self.mesh)),
      donate_argnums=0,
      out_shardings=(self.shardings, sharding.replicated(self.mesh)),
    )

  @abc.abstractmethod
  def inputs(self) -> tuple[Any, ...]:
    """Shapes of what the step takes after the state, and where they live."""

  def arguments(self) -> tuple[Any, ...]:
    """Shapes of all that the step takes, and where they live."""
    return (sharding.placed(self.abstract, self.shardings), *self.inputs())

  def check_machine(self) -> None:
    """Raises UserError for what surely cannot be run on what is here."""
    metrics_writer.check(self.config.writers, jax.process_index() == 0)
    batches.check_workers(self.config.data.workers)
    state, *inputs = self.arguments()
    hardware.check_memory(
      {
        "parameters, averages and the optimizer": hardware.bytes_per_device(
          state
        ),
        f"a batch of config.batch_size={self.config.batch_size}": (
          hardware.bytes_per_device(inputs)
        ),
      },
      self.mesh.devices.flat,
      self.advice,
    )

  @abc.abstractmethod
  def flops(self, remat: bool) -> float:
    """Of a step over all devices; 0 where they cannot be counted.

    With `remat`, what is computed twice counts twice.
    """


def how_parameters_learn(
  config: ConfigDict, mask: Any, mesh: Mesh
) -> learning.Learning:
  """As the config says; those that the mask leaves out do not."""
  transformation, schedule = optimizer.create(
    optimizer.Settings(**config.optimizer),
    config.steps,
    sharding.on_whole_arrays(mesh),
  )
  ema = learning.Ema(config.ema.decay, config.ema.ramp_steps)
  return learning.Learning(mask, transformation, schedule, ema)


class Work(NamedTuple):
  """What a run does with a training.

  Attributes:
    batches: on the host; closed at the end.
    put: from there to the devices.
    constants: what the step is called with after the batch.
    evaluate: `(step, state, writer) -> metrics`.
    evaluate_every: steps; 0: at the beginning and at the end only.
    compare: called with the evaluation before and the new one, each with its
      step; raises UserError where they are not of the same.
    finish: called with the last step and its state, on every process.
  """

  batches: sharding.Batches
  put: Callable[[dict[str, Any]], Any]
  constants: tuple[Any, ...]
  evaluate: Callable[
    [int, state_lib.TrainState, metrics_writer.MetricsWriter], dict[str, float]
  ]
  evaluate_every: int
  compare: Callable[[dict[str, float], dict[str, float]], None]
  finish: Callable[[int, state_lib.TrainState], None]


def run(
  training: Training, work: Work, workdir: epath.Path, sigterm: loop.Sigterm
) -> bool:
  """Trains to `config.steps`; False if SIGTERM ended it early."""
  config, first_step, state = training.config, 0, None
  if not (workdir / "config.json").exists():
    state = training.begin()  # what it refuses leaves nothing behind
    start.write_config(config, workdir)
  checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
  restored = checkpoints.restore(training.abstract, training.shardings)
  if restored is not None:
    first_step, state, data_state = restored
    work.batches.set_state(data_state, accepts=config.data.fingerprint)
    _LOG.info("resuming from step %d in %s", first_step, workdir)
  elif state is None:
    state = training.begin()
  start.write_config(config, workdir)
  step = last_step = max(config.steps, first_step)
  every = work.evaluate_every
  evaluates = first_step in (0, last_step) or (
    every and first_step % every == 0
  )
  measured = {}
  if first_step:
    measured, is_whole = _last_evaluation(workdir, first_step)
    evaluates = bool(evaluates and not is_whole)
  is_done = first_step == last_step and not evaluates
  writer = metrics_writer.MetricsWriter(
    workdir,
    first_step,
    evaluates,
    enabled=jax.process_index() == 0,
    writers=() if is_done else config.writers,
  )

  def evaluate(step, state):
    nonlocal measured
    values = work.evaluate(step, state, writer)
    before, measured = measured, {"step": step} | values
    work.compare(before, measured)
    checkpoints.add_evaluation(step, measured)
    return values

  def save(step, state, position):
    writer.flush()  # who goes on from there has the lines before
    checkpoints.save(step, state, position, measured)

  with _closing(work.batches.close, writer.close, checkpoints.close):
    if not is_done:
      params, placed = training.abstract.params, training.shardings.params
      _LOG.info(overview.table(params, training.learning.mask, placed))
      program = _Program(training, work.constants)
      if needed := program.prepare(training.inputs()[0]):
        writer.scalars(first_step, {"step_gib": needed / _GIB})
      state, step = loop.run(
        loop.Program(
          program,
          evaluate,
          config.batch_size,
          _peak_rate(training),
          program.prepare,
        ),
        state,
        sharding.Prefetch(work.batches, work.put, config.data.prefetch),
        range(first_step + 1, last_step + 1),
        evaluates,
        loop.Cadence(
          log=config.log_every,
          evaluate=work.evaluate_every,
          checkpoint=config.checkpoint.every,
          seconds=config.log_seconds,
        ),
        loop.Outlets(
          save=save,
          writer=writer,
          sigterm=sigterm,
          profiler=profiler.Profiler(
            first_step, str(workdir / "profile"), **config.profile
          ),
        ),
      )
    checkpoints.wait()
    writer.flush()
    if step == last_step:
      work.finish(step, state)
      outcome.say(workdir, _MADE)
  return step == last_step


def _last_evaluation(
  workdir: epath.Path, step: int
) -> tuple[dict[str, float], bool]:
  """The last one up to the checkpoint of a step, and whether it is of that step
  and whole: a kill may come between a checkpoint and its evaluation.
  """
  found: dict[str, float] = {}
  try:
    found = checkpoint.measured(str(workdir), step)
  except errors.UserError as error:
    _LOG.warning("%s", error)
  is_whole = found.get("step") == step
  if is_whole and metrics_writer.is_evaluation(found):
    is_whole = any(
      line["step"] == step and metrics_writer.is_evaluation(line)
      for line in metrics_writer.read_lines(workdir / "metrics.jsonl")
    )
  # The first process writes these files, and knows.
  return found, processes.total(is_whole and jax.process_index() == 0) > 0


@contextlib.contextmanager
def _closing(*closes: Callable[[], None]) -> Iterator[None]:
  """Calls all at the end; after an error, none of theirs takes its place."""
  try:
    yield
  except BaseException:
    for close in closes:
      with contextlib.suppress(Exception):
        close()
    raise
  for close in closes:
    close()


def _peak_rate(training: Training) -> float:
  """Steps per second at the devices' published peak; 0 where it is unknown."""
  chip = hardware.chip(jax.devices()[0].device_kind)
  flops = training.flops(remat=False) if chip else 0.0
  return chip.flops * jax.device_count() / flops if flops else 0.0


class _Program:
  """The training step, compiled once for each shape of a batch."""

  def __init__(self, training: Training, constants: tuple[Any, ...]):
    self._training, self._constants = training, constants
    self._jitted = training.jitted()
    self._compiled: dict[Any, jax.stages.Compiled] = {}

  def prepare(self, batch: Any) -> int:
    """Compiles what a batch, or its shapes, needs, unless it is there.

    Says so, and returns the bytes that a new program needs. Raises UserError if
    the devices lack them.
    """
    if _shapes(batch) in self._compiled:
      return 0
    training = self._training
    what = "the training step"
    if self._compiled:
      shapes = ", ".join(map(str, _shapes(batch)))
      what += f" for batches of {shapes}, shape {len(self._compiled) + 1}"
    state, _, *constants = training.arguments()
    arguments = (state, batch, *constants)
    devices = list(training.mesh.devices.flat)
    with compiling.announced(what, arguments, devices):
      program = self._jitted.lower(*arguments).compile()
    needed = program_cost.memory(program)
    hardware.check_memory(
      {f"a step with config.batch_size={training.config.batch_size}": needed},
      devices,
      training.advice,
    )
    self._compiled[_shapes(batch)] = program
    if needed:
      _LOG.info("it needs %.3g GiB a device", needed / _GIB)
    return needed

  def __call__(self, state: state_lib.TrainState, batch: Any) -> Any:
    return self._compiled[_shapes(batch)](state, batch, *self._constants)


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
  return tuple(x.shape for x in jax.tree.leaves(batch))
