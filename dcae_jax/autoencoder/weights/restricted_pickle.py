"""Pickles of arrays, read without running code, and in bounded time."""

import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from dcae_jax import errors

_WIDEST_TUPLE = 64  # the most axes that an array has


def _bounded(make: Callable[[Any], None]) -> Callable[[Any], None]:
  """An instruction that makes a tuple, for tuples as arrays need them.

  A few instructions can nest them so that the hash of one, as the key of a
  dictionary, takes for ever.
  """

  def bounded(self) -> None:
    make(self)
    made = self.stack[-1]
    inner = [x for part in made if type(part) is tuple for x in part]
    if len(made) > _WIDEST_TUPLE or any(type(x) is tuple for x in inner):
      raise errors.UserError(
        "it holds longer or deeper tuples than arrays need"
      )

  return bounded


class Unpickler(pickle._Unpickler):  # of which instructions can be replaced
  """Admits the names that it is given: a pickle can call any other function."""

  dispatch = pickle._Unpickler.dispatch | {
    code[0]: _bounded(pickle._Unpickler.dispatch[code[0]])
    for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
  }

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
