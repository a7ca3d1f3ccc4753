"""One of our modules, and what released weights call it."""

from typing import NamedTuple


class Module(NamedTuple):
  """A module's path in our parameters and its name in the two layouts.

  Attributes:
    ours: such as "encoder/stage_3/block_0/context/qkv".
    original: the same with dots; "" if that layout lacks the model.
    diffusers: also; several names if it is divided along its outputs.
    matrix: in the diffusers layout its 1x1 kernel has two axes.
  """

  ours: str
  original: str
  diffusers: str | tuple[str, ...]
  matrix: bool = False

  def inside(self, ours: str, original: str, diffusers: str) -> "Module":
    """The module in another, whose names these are, each with its separator."""
    parts = self.diffusers
    return self._replace(
      ours=ours + self.ours,
      original=original + self.original,
      diffusers=diffusers + parts
      if isinstance(parts, str)
      else tuple(diffusers + part for part in parts),
    )

  def names(self, layout: str) -> tuple[str, ...]:
    """In a layout, in the order of its outputs."""
    theirs = getattr(self, layout)
    return (theirs,) if isinstance(theirs, str) else theirs
