"""Phase 1 of the quickstart alone, for `python -m benchmarks.learning`."""

from configs import quickstart


def get_config():
  c = quickstart.get_config().phase1
  c.evaluation.every = 50
  return c
