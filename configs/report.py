r"""Finished runs and their floor side by side: a picture, a table, curves.

  python -m dcae_jax.main --config=configs/report.py --workdir=runs/report \
    --config.runs="{'phase1': 'runs/f64/phase1', 'phase3': 'runs/f64/phase3'}" \
    --config.source.path=/data/val

Meant for any machine that holds the model once. What is measured is the result.
"""

from configs import base


def get_config():
  return base.report()
