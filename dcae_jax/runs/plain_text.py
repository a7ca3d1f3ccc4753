"""Names of files, and other texts that may hold anything, where they are shown.

A name can hold the signs that move a terminal's cursor, end a row of a table or
begin a tag. Here they become text; what the name is elsewhere does not change.
"""

import re

# Of Markdown and HTML; underscores within words mark nothing.
_MARKS = re.compile(r"[\\`*\[\]<>|~&]|(?<![^\W_])_|_(?![^\W_])")


def escaped(text: str, kept: str = "") -> str:
  """With escapes, as in Python, for what is no visible character or a space.

  Those in `kept` stay, such as the ends of lines of a table.
  """
  if text.isprintable():
    return text
  return "".join(
    x if x.isprintable() or x in kept else x.encode("unicode_escape").decode()
    for x in text
  )


def markdown(text: str) -> str:
  """As part of a line, or the cell of a table, that shows it as it is."""
  return _MARKS.sub(r"\\\g<0>", escaped(text))
