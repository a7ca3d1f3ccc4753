r"""DC-AE f64c128, phase 1: low-resolution full training.

  python -m dcae_jax.main --config=configs/f64_phase1.py \
    --workdir=gs://BUCKET/f64/phase1 \
    --config.data.source.path=gs://BUCKET/images/train \
    --config.evaluation.source.path=gs://BUCKET/images/val

Meant for v5e:4x4, 16 chips of 16 GiB (planned: docs/results.md).
Expected numbers: not yet measured.
"""

from configs import base


def get_config():
  c = base.phase1("f64c128")
  c.mesh.data, c.mesh.fsdp = 1, -1  # parameters split over all chips
  return c
