"""Imports torchvision beside a build of torch that it was not compiled for.

The package index has CPU builds of torch, but none of torchvision. Its compiled
part does not load then, and its import, also by packages that only look whether
it is there, fails at operators which that part would have defined. Nothing in
this repository calls them.
"""

import importlib
import importlib.util


def import_first() -> None:
  """To be called before a package imports it; does nothing where it is not."""
  if importlib.util.find_spec("torchvision") is None:
    return
  try:
    importlib.import_module("torchvision")
  except RuntimeError:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
      library.define(f"{name}(Tensor dets, Tensor scores, float iou) -> Tensor")
    importlib.import_module("torchvision")
