"""A random order in which images that are read together are near each other.

A function of seed and epoch alone, the same for any number of processes.
"""

import numpy as np

from dcae_jax.data import sources


class Order:
  """Which image stands at a position, over all epochs.

  In each epoch, groups are in random order, and dealt in windows of a few of
  them: one image of each group of a window in turn, each group shuffled. So
  each of several processes, which take every n-th image, reads a part of the
  groups of a window.
  """

  def __init__(self, groups: sources.Groups, seed: int):
    self._groups, self._seed = groups, seed
    self._epochs: dict[int, np.ndarray] = {}  # of which threads read two

  def __call__(self, position: int) -> int:
    epoch, place = divmod(position, len(self._groups.of))
    return int(self._images(epoch)[place])

  def _images(self, epoch: int) -> np.ndarray:
    known = self._epochs  # read at once: other threads replace it
    if epoch in known:
      return known[epoch]
    of, window = self._groups
    rng = np.random.default_rng((self._seed, epoch))
    places = rng.permutation(of.max() + 1)[of]  # of groups
    images = rng.permutation(len(of))
    images = images[np.argsort(places[images], kind="stable")]
    counts = np.bincount(places)
    turns = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = places[images]
    images = images[np.lexsort((places, turns, places // window))]
    near = {x: order for x, order in known.items() if abs(x - epoch) == 1}
    self._epochs = near | {epoch: images}
    return images
