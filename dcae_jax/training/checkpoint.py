"""Checkpoints of a run, through orbax: asynchronous, whole or not at all.

The items are separate, so that a later stage restores parameters alone:
`params` and `ema` (each with `params` and `batch_stats`), `optimizer` (the rest
of the state), `data` (the position of the data iterator) and `measured` (the
last evaluation, with its step). Local or `gs://`.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dcae_jax import errors
from dcae_jax.runs import metrics_writer
from dcae_jax.training import sharding
from dcae_jax.training import state as state_lib

Tree = Any


def _items(state: state_lib.TrainState) -> dict[str, Tree]:
  rest = {
    "step": state.step,
    "optimizer": state.optimizer,
    "discriminator": state.discriminator,
    "discriminator_optimizer": state.discriminator_optimizer,
  }
  return {"params": state.variables, "ema": state.ema, "optimizer": rest}


def _state(items: dict[str, Tree]) -> state_lib.TrainState:
  return state_lib.TrainState(
    **items["params"], ema=items["ema"], **items["optimizer"]
  )


def _absolute(path: epath.Path) -> epath.Path:
  """What orbax wants; remote addresses are absolute as they are."""
  return path if "://" in str(path) else path.expanduser().resolve()


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
  """One line for what orbax raises: a full disk, a damaged file."""
  try:
    yield
  except Exception as error:
    several = jax.process_count() > 1
    others = "if another process has ended, see its log; " if several else ""
    raise errors.UserError(
      f"{what} failed: {errors.first_line(error)}; other checkpoints are as "
      f"they were: {others}make room on a full disk, remove a damaged "
      "checkpoint, and run again"
    ) from error


class Checkpoints:
  """The checkpoints of one work directory."""

  def __init__(self, workdir: epath.Path, keep: int):
    """Removes what a killed process left half-written; keeps `keep`."""
    logging.getLogger("absl").setLevel(logging.WARNING)  # orbax tells it all
    # Cutting small arrays into a slice for each device takes longer, while the
    # training waits, than writing them whole.
    whole = ocp.type_handlers.ArrayHandler(
      min_slice_bytes_for_replica_parallel=2**20
    )
    ocp.type_handlers.register_type_handler(jax.Array, whole, override=True)
    self._manager = ocp.CheckpointManager(
      _absolute(workdir) / "checkpoints",
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True
      ),
      item_names=("params", "ema", "optimizer", "data", "measured"),
    )

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(
    self,
    step: int,
    state: state_lib.TrainState,
    data_state: dict[str, Any],
    measured: dict[str, float],
  ) -> None:
    """Starts a save; returns when the arrays may be overwritten."""
    items = {
      name: ocp.args.StandardSave(item) for name, item in _items(state).items()
    }
    items["data"] = ocp.args.JsonSave(data_state)
    items["measured"] = ocp.args.JsonSave(measured)
    with _explained(f"writing a checkpoint of step {step}"):
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  def restore(
    self, step: int, abstract: state_lib.TrainState, shardings: Tree
  ) -> tuple[state_lib.TrainState, dict[str, Any]]:
    """The state, placed by `shardings`, and the position of the data."""
    targets = _items(sharding.placed(abstract, shardings))
    items = {
      name: ocp.args.StandardRestore(item) for name, item in targets.items()
    }
    items["data"] = ocp.args.JsonRestore()
    with _explained(f"reading {self._manager.directory / str(step)}"):
      items = self._manager.restore(step, args=ocp.args.Composite(**items))
    return _state({name: items[name] for name in targets}), items["data"]

  def wait(self) -> None:
    """Returns when the last save is complete; raises what it raised."""
    with _explained("writing a checkpoint"):
      self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def restore_variables(
  run: str, item: str, abstract: Tree, shardings: Tree
) -> tuple[int, Tree]:
  """Step, and the item "params" or "ema", of a run's last checkpoint.

  Args:
    run: its work directory.
    item: with `{"params": ..., "batch_stats": ...}`.
    abstract: shapes of these.
    shardings: where each leaf goes.
  """
  with ocp.CheckpointManager(
    _absolute(epath.Path(run)) / "checkpoints",
    options=ocp.CheckpointManagerOptions(create=False),
    item_names=(item,),
  ) as manager:
    step = manager.latest_step()
    if step is None:
      raise errors.UserError(
        f"{run!r} has no finished checkpoint; let that run go on"
      )
    target = ocp.args.StandardRestore(sharding.placed(abstract, shardings))
    with _explained(f"reading {manager.directory / str(step)}"):
      items = manager.restore(step, args=ocp.args.Composite(**{item: target}))
  return step, items[item]


def measured(run: str, step: int) -> dict[str, float]:
  """The last evaluation, with its step, before a checkpoint of a run."""
  path = _absolute(epath.Path(run)) / "checkpoints" / str(step)
  if (path / "measured").exists():
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
      return checkpointer.restore(path / "measured")
  # Written before checkpoints had it.
  return metrics_writer.last_values(epath.Path(run) / "metrics.jsonl", step)


def check_space(workdir: epath.Path, abstract: Tree, keep: int) -> None:
  """Raises UserError if a local disk cannot hold this run's checkpoints.

  While one is written, `keep` older ones still exist.
  """
  if "://" in str(workdir):
    return
  leaves = jax.tree.leaves(abstract)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  steps = workdir / "checkpoints"
  existing = len(list(steps.iterdir())) if steps.exists() else 0
  needed = max(keep + 1 - existing, 1) * size
  parents = (workdir, *workdir.parents)
  free = shutil.disk_usage(next(x for x in parents if x.exists())).free
  if free < needed:
    raise errors.UserError(
      f"no space left for checkpoints: {workdir} has {free / 1e6:,.1f} MB free "
      f"and this run needs {needed / 1e6:,.1f} MB ({size / 1e6:,.1f} MB each); "
      "free some, set config.checkpoint.keep=1, or choose another --workdir"
    )
