"""Packages that need not be installed: which ones are, and what installs them.

They are imported where they are used, after one of these.
"""

import importlib.util
import pathlib

from dcae_jax import errors


def folder(package: str) -> pathlib.Path | None:
  """The folder of a package, which is not imported; None: it is not there."""
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.origin:  # a folder may have its name
    return None
  return pathlib.Path(spec.origin).parent


def require(package: str, extra: str, what: str) -> None:
  """Raises UserError, as `missing`, unless a package is installed."""
  if folder(package) is None:
    raise missing(extra, what)


def missing(extra: str, what: str) -> errors.UserError:
  """For what needs a package that an extra of this one installs."""
  return errors.UserError(
    f"{what} needs a package that is not installed; run: "
    f'pip install "dcae_jax[{extra}]"'
  )
