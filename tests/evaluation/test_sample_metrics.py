import numpy as np
import pytest
import scipy.special

from dcae_jax.evaluation import sample_metrics


def _score(logits, splits=4):
  return sample_metrics.inception_score(logits, splits)


def test_inception_score_is_its_definition():
  logits = np.random.default_rng(0).normal(0, 3, (101, 7))
  order = np.random.default_rng(0).permutation(101)
  p = scipy.special.softmax(logits[order], axis=1)
  scores = []
  for split in range(4):
    part = p[split::4]
    divergence = scipy.special.rel_entr(part, part.mean(0)).sum(1)
    scores.append(np.exp(divergence.mean()))
  found = _score(logits)
  np.testing.assert_allclose(found, (np.mean(scores), np.std(scores)))


def test_inception_score_is_1_without_and_n_with_certainty():
  assert _score(np.zeros((8, 5)))[0] == pytest.approx(1)
  certain = 1e4 * np.eye(5)[np.arange(20) % 5]
  assert _score(certain, splits=1)[0] == pytest.approx(5)


def test_inception_score_needs_an_image_in_each_split():
  with pytest.raises(ValueError, match="not 3"):
    _score(np.zeros((3, 5)))
  with pytest.raises(ValueError, match="splits=0"):
    _score(np.zeros((3, 5)), splits=0)


def _expected(real, generated, k):
  """By all distances between single points."""

  def inside(points, manifold):
    found = []
    for x in points:
      found.append(False)
      for i, centre in enumerate(manifold):
        others = np.delete(manifold, i, axis=0)
        radius = np.sort(np.linalg.norm(others - centre, axis=1))[k - 1]
        found[-1] |= bool(np.linalg.norm(x - centre) <= radius)
    return np.mean(found)

  return inside(generated, real), inside(real, generated)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_their_definition(k, monkeypatch):
  monkeypatch.setattr(sample_metrics, "_BLOCK", 7)
  rng = np.random.default_rng(0)
  real = rng.normal(size=(40, 3)) + 100
  generated = rng.normal(0.8, 0.5, size=(30, 3)) + 100
  found = sample_metrics.precision_recall(real, generated, k)
  expected = _expected(real, generated, k)
  assert found == pytest.approx(expected)
  assert 0 < found[1] < found[0] <= 1


def test_precision_and_recall_of_the_same_and_of_distant_sets():
  points = np.random.default_rng(0).normal(size=(20, 4))
  assert sample_metrics.precision_recall(points, points) == (1, 1)
  assert sample_metrics.precision_recall(points, points + 99) == (0, 0)


def test_precision_and_recall_need_neighbours():
  points = np.zeros((3, 2))
  with pytest.raises(ValueError, match="more than 3 points"):
    sample_metrics.precision_recall(points, points)
  with pytest.raises(ValueError, match="are not"):
    sample_metrics.precision_recall(np.zeros((9, 2)), np.zeros((9, 3)))


def test_clip_score_is_of_angles_and_leaves_negative_ones_out():
  images = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
  texts = np.array([[1.0, 1.0], [0.0, 5.0], [-4.0, 0.0]])
  expected = 100 * (0.5**0.5 + 1 + 0) / 3
  assert sample_metrics.clip_score(images, texts) == pytest.approx(expected)
