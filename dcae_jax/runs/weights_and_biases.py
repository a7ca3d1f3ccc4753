"""Weights & Biases: a run there for each work directory.

Which project, server or mode is said by the package's own environment
variables. A restart goes on in the same run, whose id the work directory keeps.
"""

import contextlib
import io
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from dcae_jax import errors
from dcae_jax.runs import installed, regular_files, storage, work_directory

_LOG = logging.getLogger(__name__)
_SECONDS_TO_BEGIN = 30
_SECONDS_TO_END = 10  # a machine that is taken away gives hardly more


class WeightsAndBiases:
  """Sends metrics and pictures; without a network they are kept in files."""

  @staticmethod
  def check() -> None:
    """Raises UserError without the package, or where nobody is logged in.

    Nobody is asked on a terminal, where a run may be alone.
    """
    installed.require("wandb", "wandb", "config.writers=wandb")
    import wandb

    try:
      with contextlib.redirect_stderr(io.StringIO()):  # no terminal
        wandb.login(verify=False)
    except (wandb.errors.Error, ValueError) as error:
      raise _refusal(error) from error

  def __init__(self, workdir: epath.Path, first_step: int):
    """Begins a run or goes on with it.

    Raises UserError if nobody is logged in.
    """
    import wandb

    is_local = "://" not in str(workdir)
    folder = str(workdir) if is_local else tempfile.mkdtemp(prefix="wandb_")
    settings = wandb.Settings(
      # Where the environment says nothing.
      **{
        name: value
        for variable, name, value in (
          ("WANDB_PROJECT", "project", "dcae_jax"),
          ("WANDB_NAME", "run_name", workdir.name),
          ("WANDB_RUN_ID", "run_id", _stored_id(workdir)),
          ("WANDB_DIR", "root_dir", folder),
          ("WANDB_INIT_TIMEOUT", "init_timeout", _SECONDS_TO_BEGIN),
          ("WANDB_FINISH_TIMEOUT", "finish_timeout", _SECONDS_TO_END),
          ("WANDB_CONSOLE", "console", "off"),
          ("WANDB_SILENT", "silent", True),
          ("WANDB_DISABLE_CODE", "disable_code", True),
          ("WANDB_DISABLE_GIT", "disable_git", True),
        )
        if variable not in os.environ
      },
      resume="allow",
    )
    config = work_directory.read_config(workdir / "config.json")
    begin = lambda **changes: wandb.init(
      config=config, settings=settings, **changes
    )
    try:
      self._run = begin()
    except wandb.errors.UsageError as error:
      raise _refusal(error) from error
    except wandb.errors.CommError as error:
      _LOG.warning(
        "Weights & Biases does not answer: %s", errors.first_line(error)
      )
      wandb.teardown()  # what was begun has the id
      self._run = begin(mode="offline")
    place = self._run.settings.sync_dir
    offline = f"offline; `wandb sync {place}` sends it"
    where = offline if self._run.offline else self._run.url
    _LOG.info("Weights & Biases: %s", where or "disabled")
    self._image = wandb.Image

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._log(step, dict(values))

  def image(self, step: int, name: str, pixels: np.ndarray) -> None:
    squeezed = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    self._log(step, {name: self._image(Image.fromarray(squeezed))})

  def _log(self, step: int, values: dict[str, Any]) -> None:
    # Steps that come again after a kill are there, and would be refused.
    if step >= self._run.starting_step:
      self._run.log(values, step=step)

  def close(self) -> None:
    """Waits for what is not sent yet, but not for long."""
    is_error = sys.exception() is not None  # one that is being handled
    self._run.finish(exit_code=int(is_error))


def _refusal(error: Exception) -> errors.UserError:
  return errors.UserError(
    f"Weights & Biases refuses: {' '.join(str(error).split())[:300]}; set "
    "WANDB_MODE=offline to keep all in files, or leave wandb out of "
    "config.writers"
  )


def _stored_id(workdir: epath.Path) -> str:
  path = workdir / "wandb_id"
  if path.exists():
    return regular_files.checked(path).read_text()
  found = secrets.token_hex(8)
  storage.Storage(str(workdir)).write(path.name, found.encode())
  return found
