"""JSON that was written by a run and is read by another: are the types right?

What is expected is a type, a tuple of types, one of which it has; a list of
one expectation for all items, or of one for each; or a dictionary of the keys
that must be there, or may, where "?" is at the end of their names, with that of
all others at "*".
"""

import hashlib
import json
from typing import Any

from dcae_jax import errors

NUMBER = (int, float)
ANYTHING = (dict, list, str, int, float, bool, type(None))
_WORDS = {
  dict: "a mapping", list: "a list", str: "text", int: "a whole number",
  float: "a number", bool: "true or false", type(None): "null",
}  # fmt: skip


def digest(value: Any) -> str:
  """sha256 of a value as JSON has it, whatever the order of its keys."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def parsed(path: str, data: bytes, expected: Any, advice: str) -> Any:
  """The JSON of a file; UserError, with the advice, if it is something else."""
  try:
    value = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise errors.UserError(
      f"{path} is damaged ({errors.first_line(error)}); {advice}"
    ) from error
  check(path, value, expected, advice)
  return value


def check(path: str, value: Any, expected: Any, advice: str) -> None:
  """Raises UserError, which names the file, for a value of other types."""
  if fault := _fault("", value, expected):
    raise errors.UserError(f"{path} is damaged: {fault}; {advice}")


def _fault(name: str, value: Any, expected: Any) -> str:
  """What is wrong first; empty if nothing is."""
  kind = type(expected) if isinstance(expected, dict | list) else expected
  kinds = kind if isinstance(kind, tuple) else (kind,)
  if not (type(value) in kinds or (type(value) is int and float in kinds)):
    words = _WORDS[kinds[-1]]
    shown = repr(value) if len(repr(value)) <= 80 else f"{value!r:.77}..."
    return f"{name or 'it'} is {shown}, where {words} is expected"
  if isinstance(expected, dict):
    return _fault_of_mapping(name, value, expected)
  if isinstance(expected, list):
    of_items = expected * len(value) if len(expected) == 1 else expected
    if len(value) != len(of_items):
      return f"{name or 'it'} has {len(value)} items, not {len(of_items)}"
    faults = (
      _fault(f"{name}[{i}]", x, of_item)
      for i, (x, of_item) in enumerate(zip(value, of_items, strict=True))
    )
    return next(filter(None, faults), "")
  return ""


def _fault_of_mapping(
  name: str, value: dict[str, Any], expected: dict[str, Any]
) -> str:
  prefix = f"{name}." if name else ""
  missing = [
    f"{prefix}{key}"
    for key in expected
    if key != "*" and not key.endswith("?") and value.get(key) is None
  ]
  if missing:
    return f"it has no {', '.join(missing)}"
  known = {key.removesuffix("?"): x for key, x in expected.items()}
  faults = (
    _fault(f"{prefix}{key}", x, known.get(key, known.get("*", ANYTHING)))
    for key, x in value.items()
  )
  return next(filter(None, faults), "")
