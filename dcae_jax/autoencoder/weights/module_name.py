"""One of our modules, and what released weights call it."""

from typing import NamedTuple


class Module(NamedTuple):
  """A module's path in our parameters and its name in the two layouts.

  Attributes:
    ours: such as "encoder/stage_3/block_0/context/qkv".
    original: the same with dots; "" where that layout lacks the model.
    diffusers: also; several names where it is divided along its outputs.
    matrix: in the diffusers layout its 1x1 kernel has two axes.
  """

  ours: str
  original: str
  diffusers: str | tuple[str, ...]
  matrix: bool = False
