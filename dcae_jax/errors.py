"""What is wrong with the input, as opposed to the program."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator


class UserError(ValueError):
  """A mistake that the user can put right; the message says how.

  The command line prints the message alone. Anything else that is raised is a
  bug, and has a traceback.
  """


@contextlib.contextmanager
def renamed(before: str, after: str) -> Iterator[None]:
  """Messages about keys of a config that is part of another one.

  What names them begins with `before` in messages from within, such as
  "config.", and with `after` here, such as "config.phase1.".
  """
  try:
    yield
  except UserError as error:
    names = rf"(?<![\w/.]){re.escape(before)}(?!json\b)"  # no file, no path
    raise UserError(re.sub(names, lambda _: after, str(error))) from error


def meant(name: str, known: Iterable[str]) -> str:
  """Advice for a name that is unknown: the nearest one, or all there are."""
  known = list(known)
  if near := difflib.get_close_matches(name, known, n=1):
    return f"did you mean {near[0]!r}?"
  return f"there are {', '.join(known)}"


@contextlib.contextmanager
def prefixed(prefix: str) -> Iterator[None]:
  """Messages from within begin with what they are about."""
  try:
    yield
  except UserError as error:
    raise UserError(f"{prefix}{error}") from error


def first_line(error: BaseException) -> str:
  """Of the message of another package's error, which can be pages long."""
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
