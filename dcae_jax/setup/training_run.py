"""A training run in its work directory: begins or goes on, saves, ends.

The same for every model; what differs comes as functions.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dcae_jax.runs import metrics_writer
from dcae_jax.setup import wiring
from dcae_jax.training import checkpoint, hardware, loop, profiler, sharding
from dcae_jax.training import state as state_lib

_LOG = logging.getLogger(__name__)


class Program(NamedTuple):
  """What the loop calls.

  Attributes:
    step: jitted, `(state, batch) -> (state, metrics)`.
    flops_per_step: of the model, over all devices.
    evaluate: `(step, state) -> metrics`.
  """

  step: Callable[..., tuple[state_lib.TrainState, dict[str, jax.Array]]]
  flops_per_step: float
  evaluate: Callable[[int, state_lib.TrainState], dict[str, float]]


class AbstractStep(NamedTuple):
  """A training step and what it is called with, nothing of it allocated.

  Attributes:
    step: jitted.
    arguments: shapes with their shardings; the first is the state.
    mesh: of the devices that it is for.
    flops: of one step over all devices, with what is computed twice; 0: not
      known.
    takes_parts: of a batch (`accumulation`) and of images (`mesh.spatial`).
  """

  step: Any
  arguments: tuple[Any, ...]
  mesh: Mesh
  flops: float
  takes_parts: bool


def placed(tree: Any, shardings: Any) -> Any:
  """Shapes, with where they live."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def compiled(step: Any, arguments: tuple[Any, ...]) -> Any:
  """A jitted step, compiled for abstract arguments; says how long it took."""
  _LOG.info("compiling the training step")
  start = time.perf_counter()
  found = step.lower(*arguments).compile()
  _LOG.info("compiled in %.1f s", time.perf_counter() - start)
  return found


def run(
  config: ConfigDict,
  workdir: epath.Path,
  sigterm: loop.Sigterm,
  *,
  abstract: state_lib.TrainState,
  shardings: Any,
  batches: sharding.Batches,
  put: Callable[[dict[str, Any]], Any],
  begin: Callable[[], state_lib.TrainState],
  prepare: Callable[[metrics_writer.MetricsWriter], Program],
  evaluate_every: int,
  finish: Callable[[int], None],
) -> bool:
  """Trains to `config.steps`; False if SIGTERM ended it early.

  Args:
    config: of the run, whose keys for the machine are read.
    workdir: of the run.
    sigterm: asks to save and leave.
    abstract: shapes of the state.
    shardings: where its leaves live.
    batches: on the host; closed at the end.
    put: from there to the devices.
    begin: the state at step 0; called where there is no checkpoint.
    prepare: what the loop calls; called where there are steps to do.
    evaluate_every: steps; 0: at the beginning and at the end only.
    finish: called with the last step, on every process.
  """
  checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
  first_step = checkpoints.latest_step() or 0
  if first_step:
    state, data_state = checkpoints.restore(first_step, abstract, shardings)
    batches.set_state(data_state)
    _LOG.info("going on from step %d in %s", first_step, workdir)
  else:
    state = begin()
  wiring.write_config(config, workdir)
  writer = metrics_writer.MetricsWriter(
    workdir, first_step, enabled=jax.process_index() == 0
  )
  last_step = max(config.steps, first_step)
  step = first_step
  try:
    if first_step < last_step:
      program = prepare(writer)
      state, step = loop.run(
        program.step,
        state,
        sharding.Prefetch(batches, put, config.data.prefetch),
        first_step=first_step,
        last_step=last_step,
        images_per_step=config.batch_size,
        flops_per_step=program.flops_per_step,
        peak_flops=hardware.peak_flops(),
        cadence=loop.Cadence(
          log=config.log_every,
          evaluate=evaluate_every,
          checkpoint=config.checkpoint.every,
          seconds=config.log_seconds,
        ),
        save=checkpoints.save,
        evaluate=program.evaluate,
        writer=writer,
        sigterm=sigterm,
        profiler=profiler.Profiler(
          first=first_step,
          directory=str(workdir / "profile"),
          **config.profile,
        ),
      )
    checkpoints.wait()
    if step == last_step:
      finish(step)
  finally:
    batches.close()
    writer.close()
    checkpoints.close()
  return step == last_step
