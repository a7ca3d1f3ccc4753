"""What a source is: a random-access sequence of encoded images with labels.

Nothing is decoded here. All sources are picklable, since loader workers are
processes.
"""

from typing import NamedTuple, Protocol, runtime_checkable


class Record(NamedTuple):
  """One encoded image.

  Attributes:
    name: where it is, for messages.
    encoded: the file's bytes.
    label: index of its class.
  """

  name: str
  encoded: bytes
  label: int


def limited(source: "Source", most: int) -> int:
  """How many of its records are used; `most` of 0: all."""
  return min(len(source), most or len(source))


@runtime_checkable
class Source(Protocol):
  """A random-access sequence of records; reading one may raise OSError."""

  classes: list[str]  # names, by label

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...

  def name(self, index: int) -> str: ...

  def key(self, index: int) -> str: ...

  def fingerprint(self) -> str: ...
