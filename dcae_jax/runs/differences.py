"""What differs between two descriptions: trees of plain values, as JSON has."""

from typing import Any

from dcae_jax import errors


def flat(tree: dict[str, Any], separator: str = ".") -> dict[str, Any]:
  """Leaves by their path, `a.b.c`."""
  leaves = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      inner = flat(value, separator)
      leaves |= {f"{key}{separator}{path}": x for path, x in inner.items()}
    else:
      leaves[key] = value
  return leaves


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
  """By path, in order: the value there, and the one now."""
  there, here = flat(before), flat(now)
  return {
    key: f"{key}: {there.get(key)!r} there, {here.get(key)!r} now"
    for key in sorted(there.keys() | here.keys())
    if there.get(key) != here.get(key)
  }


def check_same(
  before: dict[str, Any], now: dict[str, Any], what: str, advice: str
) -> None:
  """Raises UserError, "`what` (the differences); `advice`", if there are any.

  Values that would fill the screen are not shown.
  """
  changes = [
    text if len(text) <= 200 else f"{key} differs"
    for key, text in differences(before, now).items()
  ]
  if changes:
    raise errors.UserError(f"{what} ({'; '.join(changes)}); {advice}")
