"""Values of a model's `config.json`, checked one by one."""

from typing import Any

from dcae_jax import errors


def whole(value: Any, name: str, least: int, most: int = 2**20) -> int:
  """`value` itself; UserError unless it is a whole number of that range."""
  is_whole = isinstance(value, int) and not isinstance(value, bool)
  if not is_whole or not least <= value <= most:
    raise errors.UserError(
      f"{name}={value!r} is not a whole number from {least} to {most}"
    )
  return value


def count(c: dict[str, Any], key: str) -> int:
  """The value of a key; UserError unless it is a positive whole number."""
  return whole(c[key], key, 1)


def listed(
  value: Any, name: str, what: str, least: int, most: int = 2**20
) -> Any:
  """`value` itself; UserError unless it is a list with that many of `what`."""
  if not isinstance(value, list | tuple) or not least <= len(value) <= most:
    raise errors.UserError(f"{name}={value!r} is not a list of {what}")
  return value


def known(value: Any, name: str, names: dict[Any, str]) -> Any:
  """Our name of a setting, in any case; `names` goes from ours to theirs.

  Raises UserError for one that is not among them.
  """
  for ours, theirs in names.items():
    if isinstance(value, str) and value.lower() == theirs.lower():
      return ours
  raise errors.UserError(
    f"{name}={value!r} is not among {', '.join(names.values())}"
  )


def flag(c: dict[str, Any], key: str) -> bool:
  """The value of a key; UserError unless it is true or false."""
  if not isinstance(c[key], bool):
    raise errors.UserError(f"{key}={c[key]!r} is neither true nor false")
  return c[key]
