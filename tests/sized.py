"""A folder whose images have sizes that are known, as those of an index."""

import numpy as np
from PIL import Image

from dcae_jax.data import sources


class Sized(sources.Files):
  """As the folder is."""

  def __init__(self, folder: sources.Files):
    self.__dict__ = dict(folder.__dict__)

  def sizes(self):
    found = []
    for path in map(self.name, range(len(self))):
      with Image.open(path) as image:
        found.append(image.size)
    return np.array(found, np.int32)


def folder(path: str) -> Sized:
  return Sized(sources.folder(path))
