"""Pickles, read without running code."""

import pickle
from collections.abc import Mapping
from typing import Any, BinaryIO

from dcae_jax import errors


class Unpickler(pickle.Unpickler):
  """Admits the names that it is given: a pickle can call any other function."""

  def __init__(
    self,
    file: BinaryIO,
    admitted: Mapping[tuple[str, str], Any],
    **options: Any,
  ):
    """Takes a value for each admitted (module, name), and pickle's options."""
    super().__init__(file, **options)
    self._admitted = admitted

  def find_class(self, module: str, name: str) -> Any:
    """Raises UserError for a name that is not admitted."""
    if (module, name) not in self._admitted:
      raise errors.UserError(
        f"it names {module}.{name}, which is no part of an array"
      )
    return self._admitted[module, name]
