"""What a source is: a random-access sequence of images with labels, captions.

Nothing is decoded here. All sources are picklable, since loader workers are
processes.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from dcae_jax.data import captions as image_captions


class Record(NamedTuple):
  """One encoded image.

  Attributes:
    name: where it is, for messages.
    encoded: the file's bytes.
    label: index of its class.
    captions: where the source was asked for them; () for an image without any.
  """

  name: str
  encoded: bytes
  label: int
  captions: tuple[image_captions.Caption, ...] = ()


def limited(source: "Source", most: int) -> int:
  """How many of its records are used; `most` of 0: all."""
  return min(len(source), most or len(source))


@runtime_checkable
class Source(Protocol):
  """A random-access sequence of records.

  Reading one raises OSError with EFBIG, ELOOP or ENXIO if it is no image for
  ever, so that it is left out. Whatever else is raised may pass: it is read
  again, and then stops the run.

  Attributes:
    classes: names, by label.
  """

  classes: list[str]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...

  def name(self, index: int) -> str:
    """For messages."""
    ...

  def key(self, index: int) -> str:
    """Stays the same when the source moves; decides what is held out."""
    ...

  def fingerprint(self) -> str:
    """Changes when the images do: an export refuses to mix them."""
    ...
