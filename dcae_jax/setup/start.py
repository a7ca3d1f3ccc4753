"""What every task does before it writes anything."""

import json
import logging
import os
import secrets
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.runs import (
  compiling,
  differences,
  metrics_writer,
  resumable,
  resumable_store,
  storage,
  work_directory,
)
from dcae_jax.setup import keys, models

_LOG = logging.getLogger(__name__)


def begin(
  config: ConfigDict, workdir: epath.Path, writes: tuple[str, ...] = ()
) -> None:
  """Checks the work directory, and says where compiled programs are kept.

  Args:
    config: of the run.
    workdir: which need not exist.
    writes: what the task writes there, besides `config.json` and `result.json`.

  Raises:
    UserError: it belongs to a run of another config, or holds something else
      that would be written over.
    OSError: a bucket that is not there, or must not be written.
  """
  check_work_directory(config, workdir)
  work_directory.check_nothing_foreign(workdir, writes)
  keep_programs(config)


def keep_programs(config: ConfigDict) -> None:
  """Keeps compiled programs between runs, where the config says.

  What is compiled for long has lines in the log from here on.
  """
  compiling.listen()
  if config.compilation_cache:
    directory = os.path.expanduser(config.compilation_cache)
    jax.config.update("jax_compilation_cache_dir", directory)


def check_work_directory(config: ConfigDict, workdir: epath.Path) -> None:
  """Raises UserError if the directory belongs to a run of another config.

  OSError for a bucket that is not there, or must not be written.
  """
  if "://" in str(workdir):
    place = storage.Storage(os.fspath(workdir))
    place.check_writable(f"probe_{secrets.token_hex(8)}")
  values = keys.resolved(config)
  _check_outside_images(values, "--workdir", workdir, ("folder", "parquet"))
  if output := values.get("output"):  # it has no images, but maybe an index
    _check_outside_images(values, "config.output", output, ("parquet",))
  path = workdir / "config.json"
  if workdir.exists() and not workdir.is_dir():
    raise errors.UserError(
      f"--workdir={workdir} is not a directory; choose another"
    )
  if not path.exists():
    return
  now = keys.resolved(config)
  before = work_directory.read_config_as_now(path, now)
  if before["task"] != config.task:
    tasks = ({"task": task} for task in (before["task"], config.task))
    changes = differences.differences(*tasks).values()
  else:
    changes = keys.changes(models.in_whole(before), models.in_whole(now))
  if changes:
    raise errors.UserError(
      f"--workdir={workdir} holds a run of another config ({'; '.join(changes)}"
      "); choose another directory, or the same config to go on"
    )


def _check_outside_images(
  config: dict[str, Any],
  key: str,
  written: str | os.PathLike,
  kinds: tuple[str, ...],
  name: str = "config",
) -> None:
  """Raises UserError where what a task writes would become its images."""
  if config.get("kind") in kinds and config.get("path"):
    folder, place = (
      os.path.realpath(os.path.expanduser(os.fspath(x)))
      for x in (config["path"], written)
    )
    if os.path.commonpath([folder, place]) == folder:
      raise errors.UserError(
        f"{key}={written} lies in {name}.path={config['path']}, whose "
        "images would be others with each file that is written; choose "
        "another directory"
      )
  for part, value in config.items():
    if isinstance(value, dict):
      _check_outside_images(value, key, written, kinds, f"{name}.{part}")


def begin_store(
  config: ConfigDict,
  workdir: epath.Path,
  work: resumable.Work,
  store: resumable_store.ResumableStore,
  identity: dict[str, Any],
) -> bool:
  """All processes begin the same work in a store, or find it finished: True.

  Raises UserError if other work was begun or done there.
  """

  def begin():
    write_config(config, workdir)
    store.write_identity(identity)

  work.begin(lambda begun: store.check_identity(identity, begun), begin)
  if store.manifest() is None:
    return False
  _LOG.info("%s is finished", store.storage.path)
  if jax.process_index() == 0:
    store.remove_progress()
  return True


def write_config(config: ConfigDict, workdir: epath.Path) -> None:
  """Writes `config.json`, on the first process; whole or not at all."""
  if jax.process_index() == 0:
    text = json.dumps(keys.recorded(config, workdir), indent=2) + "\n"
    metrics_writer.write_whole(workdir / "config.json", text)
