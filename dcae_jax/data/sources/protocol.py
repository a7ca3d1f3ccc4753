"""What a source is: a random-access sequence of images with labels, captions.

Nothing is decoded here. All sources are picklable, since loader workers are
processes.
"""

import hashlib
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

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


def sizes(source: "Source") -> np.ndarray | None:
  """Widths and heights as shown, int32 [n, 2], if known without reading."""
  known = getattr(source, "sizes", None)
  return known() if known else None


def draws(source: "Source") -> np.ndarray:
  """A number from [0, 1) for each image, which decides what is held out.

  The same in every run, whatever else is in the source; from its key, unless
  the source has better ones.
  """
  if known := getattr(source, "draws", None):
    return known()
  keys = (source.key(i) for i in range(len(source)))
  digests = (
    hashlib.sha256(key.encode("utf-8", "backslashreplace")).digest()
    for key in keys
  )
  return np.array([int.from_bytes(x[:8], "big") / 2**64 for x in digests])


class Groups(NamedTuple):
  """Images that are cheap to read at about the same time.

  Attributes:
    of: the number of the group of each image, int32 [n].
    window: how many groups fit in memory at once.
  """

  of: np.ndarray
  window: int


def groups(source: "Source") -> Groups | None:
  """None where any image is read alone."""
  known = getattr(source, "groups", None)
  return known() if known else None


def limited(source: "Source", most: int) -> int:
  """How many of its records are used; `most` of 0: all."""
  return min(len(source), most or len(source))


@runtime_checkable
class Source(Protocol):
  """A random-access sequence of records.

  Reading one raises OSError with EFBIG, ELOOP or ENXIO if it is no image for
  ever, so that it is left out. Whatever else is raised may pass: it is read
  again, and then stops the run. One that knows the sizes of its images, what
  decides better than keys which are held out, or which are read together, has
  the methods `sizes`, `draws` or `groups`, see the functions of this file.

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
    """Stays the same when the source moves."""
    ...

  def fingerprint(self) -> str:
    """Changes when the images do: an export refuses to mix them."""
    ...
