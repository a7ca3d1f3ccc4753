"""A phase of the quickstart alone, for `python -m benchmarks.learning`.

`--config=configs/studies/learning.py:1` is the first phase; `:3` the third one.
"""

from configs import quickstart


def get_config(phase: str):
  c = quickstart.get_config()[f"phase{phase}"]
  c.evaluation.every = 100
  return c
