"""Checkpoints of a run, through orbax: asynchronous, whole or not at all.

The items are separate, so that a later stage restores parameters alone:
`params` and `ema` (each with `params` and `batch_stats`), `optimizer` (the rest
of the state), `data` (the position of the data iterator), `measured` (the last
evaluation before, with its step) and `digests` of all of these, which tell a
damaged checkpoint: then the one before it counts. Local or `gs://`.
"""

import contextlib
import errno
import inspect
import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from dcae_jax import errors
from dcae_jax.runs import json_types, metrics_writer, processes
from dcae_jax.training import digests, sharding
from dcae_jax.training import state as state_lib

_LOG = logging.getLogger(__name__)
_EVALUATION = "evaluation.json"  # in a checkpoint: made after it was written
# Of tensorstore's errors, those that say nothing about what is stored.
_OF_STORAGE = (
  "ABORTED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED",
  "UNAUTHENTICATED", "UNAVAILABLE",
)  # fmt: skip
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
  if "://" in str(path):
    _hasten_retries()
    return path
  return path.expanduser().resolve()


def _hasten_retries() -> None:
  """Of requests to buckets: many of orbax's wait for each other."""
  from dcae_jax.runs import bucket_retries  # gcsfs takes a while to import

  bucket_retries.hasten()
  for context in (
    tensorstore_utils._BASE_TS_CONTEXT,
    tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT,
  ):
    context["gcs_request_retries"] = {
      "max_retries": bucket_retries.ATTEMPTS,
      "initial_delay": f"{bucket_retries.FIRST_DELAY:g}s",
      "max_delay": f"{bucket_retries.LARGEST_DELAY:g}s",
    }


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
  """One line for what orbax raises: a full disk, say."""
  try:
    yield
  except Exception as error:
    several = jax.process_count() > 1
    others = "if another process has ended, see its log; " if several else ""
    reason = _reason(error)
    no_room = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
    advice = "make room" if reason in no_room else "put that right"
    raise errors.UserError(
      f"{what} failed: {reason}; other checkpoints are as they were: "
      f"{others}{advice}, and run again"
    ) from error


def _reason(error: Exception) -> str:
  """In a few words where the system has them for what tensorstore tells."""
  number = re.search(r"os_error_code='(\d+)'", str(error))
  if number:
    return os.strerror(int(number[1]))
  return getattr(error, "strerror", None) or errors.first_line(error)


def _first_cause(error: BaseException) -> BaseException:
  while error.__cause__ is not None:
    error = error.__cause__
  return error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
  """Without what threads and coroutines of orbax print where one has failed.

  Some of these end long after it: from then on, coroutines are not told of.
  """
  thread_hook, hook = threading.excepthook, sys.unraisablehook

  def of_others(told: Any) -> None:
    is_left = isinstance(told.exc_value, RuntimeError)  # its loop is closed
    if not is_left and not inspect.iscoroutine(told.object):
      hook(told)

  threading.excepthook = lambda _: None
  try:
    yield
  except Exception:
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = of_others
    raise
  finally:
    threading.excepthook = thread_hook


def _is_of_storage(error: Exception) -> bool:
  """Whether it is no sign of damage: what is stored may well be whole."""
  if isinstance(error, OSError):
    absent = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
    return not isinstance(error, absent)
  return any(status in str(error)[:500] for status in _OF_STORAGE)


def _last_whole(
  directory: epath.Path,
  steps: Iterable[int],
  restore: Callable[[int, dict[str, Any]], Any],
  arguments: dict[str, Any],
) -> tuple[int | None, dict[str, Any], list[int]]:
  """The last step whose items are whole, they, and the damaged ones after it.

  None if there is no step at all. `arguments` are for orbax, by item; `restore`
  takes a step and all arguments. Raises UserError if no step is whole, and for
  storage that refuses.
  """
  damaged = {}
  for step in sorted(steps, reverse=True):
    items, reason, refused = {}, "", None
    has_digests = (directory / str(step) / "digests").exists()  # once not
    more = {"digests": ocp.args.JsonRestore()} if has_digests else {}
    try:
      with _quietly():
        items = dict(restore(step, arguments | more).items())
    except Exception as error:  # whatever damaged files make of orbax
      reason = _reason(_first_cause(error))
      refused = error if _is_of_storage(error) else None
    if processes.total(refused is not None):
      why = _reason(refused) if refused else "storage refuses another process"
      raise errors.UserError(
        f"reading {directory / str(step)} failed: {why}"
      ) from refused
    if processes.total(bool(reason)):
      reason = reason or "another process cannot read it"
    else:
      reason = _damage(items)
    if not reason:
      if damaged:
        _LOG.warning("%s; going back to step %d", _named(damaged), step)
      return step, items, list(damaged)
    damaged[step] = f"{directory / str(step)} is damaged ({reason})"
  if damaged:
    raise errors.UserError(
      f"{_named(damaged)}; there is no whole checkpoint: bring one back, or "
      "begin in another --workdir"
    )
  return None, {}, []


def _named(damaged: dict[int, str]) -> str:
  return "; ".join(damaged.values())


def _damage(items: dict[str, Any]) -> str:
  """What is wrong with restored items; "" where nothing is."""
  expected = items.get("digests")
  trees = {
    k: x for k, x in items.items() if k in ("params", "ema", "optimizer")
  }
  if expected is not None:
    found = digests.digests(trees)
    if "data" in items:
      found["data"] = json_types.digest(items["data"])
    wrong = [key for key, value in found.items() if expected.get(key) != value]
    if wrong:
      return f"{len(wrong)} of its parts are not what was saved: {wrong[0]}"
  if digests.not_finite(trees):
    return "it has values that are not finite"
  return ""


class Checkpoints:
  """The checkpoints of one work directory."""

  def __init__(self, workdir: epath.Path, keep: int):
    """Removes what a killed process left half-written; keeps `keep`."""
    # orbax tells it all, errors with tracebacks: they are raised as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
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
      item_names=("params", "ema", "optimizer", "data", "measured", "digests"),
    )
    self._saved: int | None = None

  def save(
    self,
    step: int,
    state: state_lib.TrainState,
    data_state: dict[str, Any],
    measured: dict[str, float],
  ) -> None:
    """Starts a save; returns when the arrays may be overwritten.

    Raises FloatingPointError for a state that nothing could go on from.
    """
    trees = _items(state)
    if digests.not_finite(trees):
      raise FloatingPointError(
        f"the state after step {step} has values that are not finite, and is "
        "not saved; start another --workdir from the checkpoint before it, if "
        "there is one, with a lower config.optimizer.learning_rate or a "
        "config.optimizer.clip_norm"
      )
    of_json = {"data": data_state, "measured": measured}
    expected = digests.digests(trees)
    expected |= {
      name: json_types.digest(value) for name, value in of_json.items()
    }
    items = {k: ocp.args.StandardSave(x) for k, x in trees.items()} | {
      k: ocp.args.JsonSave(x)
      for k, x in (of_json | {"digests": expected}).items()
    }
    with _explained(f"writing a checkpoint of step {step}"):
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)
    self._saved = step

  def add_evaluation(self, step: int, measured: dict[str, float]) -> None:
    """Writes an evaluation into the checkpoint of its step, if it has one."""
    if step != self._saved:
      return
    self.wait()
    if jax.process_index() == 0:
      path = self._manager.directory / str(step) / _EVALUATION
      value = {"measured": measured, "digest": json_types.digest(measured)}
      metrics_writer.write_json(path, value)

  def restore(
    self, abstract: state_lib.TrainState, shardings: Tree
  ) -> tuple[int, state_lib.TrainState, dict[str, Any]] | None:
    """Step, state and position of the data of the last whole checkpoint.

    The state is placed by `shardings`. None where there is no checkpoint.
    Damaged ones after it are put aside, as `damaged_STEP`.
    """
    targets = _items(sharding.placed(abstract, shardings))
    arguments = {k: ocp.args.StandardRestore(x) for k, x in targets.items()}
    arguments["data"] = ocp.args.JsonRestore()
    directory = self._manager.directory
    step, items, damaged = _last_whole(
      directory,
      self._manager.all_steps(),
      lambda step, x: self._manager.restore(step, args=ocp.args.Composite(**x)),
      arguments,
    )
    if damaged and jax.process_index() == 0:
      for other in damaged:
        aside = directory / f"damaged_{other}"
        if aside.exists():
          aside.rmtree()
        (directory / str(other)).rename(aside)
    if damaged:
      processes.wait_for_all("damaged checkpoints are put aside")
      self._manager.reload()
    if step is None:
      return None
    self._saved = step
    return step, _state({k: items[k] for k in targets}), items["data"]

  def wait(self) -> None:
    """Returns when the last save is complete; raises what it raised."""
    with _explained("writing a checkpoint"):
      self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def restore_variables(
  run: str, item: str, abstract: Tree, shardings: Tree
) -> tuple[int, Tree]:
  """Step, and the item "params" or "ema", of a run's last whole checkpoint.

  Args:
    run: its work directory.
    item: with `{"params": ..., "batch_stats": ...}`.
    abstract: shapes of these.
    shardings: where each leaf goes.
  """
  with ocp.CheckpointManager(
    _absolute(epath.Path(run)) / "checkpoints",
    options=ocp.CheckpointManagerOptions(create=False),
    item_names=(item, "digests"),
  ) as manager:
    target = ocp.args.StandardRestore(sharding.placed(abstract, shardings))
    step, items, _ = _last_whole(
      manager.directory,
      manager.all_steps(),
      lambda step, x: manager.restore(step, args=ocp.args.Composite(**x)),
      {item: target},
    )
  if step is None:
    raise errors.UserError(
      f"{run!r} has no finished checkpoint; let that run go on"
    )
  return step, items[item]


def measured(run: str, step: int) -> dict[str, float]:
  """The last evaluation of a run, with its step, up to that checkpoint.

  Raises UserError if it is damaged.
  """
  directory = _absolute(epath.Path(run)) / "checkpoints" / str(step)
  if not (directory / "measured").exists():  # written before there was one
    return metrics_writer.last_values(epath.Path(run) / "metrics.jsonl", step)
  try:
    if (directory / _EVALUATION).exists():
      found = json.loads((directory / _EVALUATION).read_bytes())
      value, digest = found["measured"], found["digest"]
    else:
      with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        value = checkpointer.restore(directory / "measured")
        digest = json_types.digest(value)
        if (directory / "digests").exists():
          digest = checkpointer.restore(directory / "digests")["measured"]
    if json_types.digest(value) == digest:
      return value
    reason = "it is not what was written"
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    reason = errors.first_line(error)
  raise errors.UserError(
    f"the evaluation in {directory} is damaged ({reason}); train from there to "
    "make it again, or remove that checkpoint"
  )


def check_space(workdir: epath.Path, abstract: Tree, keep: int) -> None:
  """Raises UserError if a local disk cannot hold this run's checkpoints.

  While one is written, `keep` older ones still exist.
  """
  if "://" in str(workdir):
    return
  leaves = jax.tree.leaves(abstract)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  steps = workdir / "checkpoints"
  names = [x.name for x in steps.iterdir()] if steps.exists() else []
  existing = sum(name.isdigit() for name in names)
  needed = max(keep + 1 - existing, 1) * size
  parents = (workdir, *workdir.parents)
  free = shutil.disk_usage(next(x for x in parents if x.exists())).free
  if free < needed:
    raise errors.UserError(
      f"no space left for checkpoints: {workdir} has {free / 1e6:,.1f} MB free "
      f"and this run needs {needed / 1e6:,.1f} MB ({size / 1e6:,.1f} MB each); "
      "free some, set config.checkpoint.keep=1, or choose another --workdir"
    )
