"""Metrics of generated images, as a network sees them: Inception Score,
precision and recall with the FID Inception or EfficientNet-Lite0, the CLIP
score with CLIP.
"""

from collections.abc import Iterator

import numpy as np

from dcae_jax import errors

NEIGHBOURS = 3  # of precision and recall
SPLITS = 10  # of the Inception Score
_BLOCK = 1024  # rows whose distances are in memory at a time


def inception_score(
  logits: np.ndarray, splits: int = SPLITS
) -> tuple[float, float]:
  """Inception Score (arXiv 1606.03498): its mean and deviation over splits.

  Images, which may come class after class, are shuffled, the same each time;
  image i then goes to split i modulo `splits`. Logits are [n, classes].

  Raises:
    UserError: fewer than one split, or fewer images than splits.
  """
  if splits < 1:
    raise errors.UserError(f"splits={splits} is below 1")
  if len(logits) < splits:
    raise errors.UserError(
      f"an Inception Score of {splits} splits needs as many images at least, "
      f"not {len(logits)}"
    )
  order = np.random.default_rng(0).permutation(len(logits))
  logits = np.asarray(logits[order], np.float64)
  logits = logits - logits.max(axis=1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  p = np.exp(log_p)
  split = np.arange(len(p)) % splits
  counts = np.bincount(split)
  sums = np.zeros((splits, p.shape[1]))
  negative_entropies = np.zeros(splits)
  np.add.at(sums, split, p)
  np.add.at(negative_entropies, split, (p * log_p).sum(axis=1))
  marginal = sums / counts[:, None]
  log_marginal = np.log(np.where(marginal > 0, marginal, 1.0))
  divergence = negative_entropies / counts
  divergence = divergence - (marginal * log_marginal).sum(axis=1)
  scores = np.exp(divergence)
  return float(scores.mean()), float(scores.std())


def clip_score(images: np.ndarray, texts: np.ndarray) -> float:
  """CLIP score (arXiv 2104.08718), 0 to 100, of images and their texts.

  The mean of 100 max(cos, 0), cos being that of the angle between the features
  of an image and those of its text, each [n, d].
  """
  images, texts = (
    np.asarray(x, np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    for x in (images, texts)
  )
  cosines = np.sum(images * texts, axis=1)
  return float(np.mean(100 * np.maximum(cosines, 0)))


def precision_recall(
  real: np.ndarray, generated: np.ndarray, k: int = NEIGHBOURS
) -> tuple[float, float]:
  """Improved precision and recall (arXiv 1904.06991).

  A point lies in the manifold of a set if it is not farther from one of its
  points than that point's `k`-th nearest neighbour within the set. Features are
  [n, d] and [m, d].

  Returns:
    The part of `generated` in the manifold of `real`, and the reverse.

  Raises:
    UserError: sets of other dimensions, or without `k` neighbours.
  """
  real, generated = (np.asarray(x, np.float64) for x in (real, generated))
  if real.ndim != 2 or real.shape[1:] != generated.shape[1:]:
    raise errors.UserError(
      f"features {real.shape} and {generated.shape} are not [n, d] and [m, d]"
    )
  if k < 1 or min(len(real), len(generated)) <= k:
    raise errors.UserError(
      f"k={k} neighbours need more than {k} points in each set, not "
      f"{len(real)} and {len(generated)}"
    )
  return (
    _part_inside(generated, real, _radii(real, k)),
    _part_inside(real, generated, _radii(generated, k)),
  )


def _squared_distances(
  points: np.ndarray, others: np.ndarray
) -> Iterator[np.ndarray]:
  """Blocks [_BLOCK, m] of squared distances, from each of `points`."""
  # About the mean, so that little cancels in the expanded square.
  centre = others.mean(axis=0)
  points, others = points - centre, others - centre
  lengths = np.sum(np.square(others), axis=1)
  for start in range(0, len(points), _BLOCK):
    block = points[start : start + _BLOCK]
    own = np.sum(np.square(block), axis=1, keepdims=True)
    yield np.maximum(own + lengths - 2 * block @ others.T, 0.0)


def _radii(points: np.ndarray, k: int) -> np.ndarray:
  """Squared distance of each point to its `k`-th nearest other one."""
  radii = []
  for i, block in enumerate(_squared_distances(points, points)):
    rows = np.arange(len(block))
    block[rows, i * _BLOCK + rows] = np.inf  # itself
    radii.append(np.partition(block, k - 1, axis=1)[:, k - 1])
  return np.concatenate(radii)


def _part_inside(
  points: np.ndarray, others: np.ndarray, radii: np.ndarray
) -> float:
  inside = [
    (block <= radii).any(axis=1) for block in _squared_distances(points, others)
  ]
  return float(np.concatenate(inside).mean())
