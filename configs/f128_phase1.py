r"""DC-AE f128c512, phase 1: low-resolution full training.

  python -m dcae_jax.main --config=configs/f128_phase1.py \
    --workdir=gs://BUCKET/f128/phase1 \
    --config.data.source.path=gs://BUCKET/images/train \
    --config.evaluation.source.path=gs://BUCKET/images/val

Meant for v5e:4x8, 32 chips of 16 GiB (planned: docs/results.md).
Expected numbers: not yet measured.
"""

from configs import base


def get_config():
  c = base.phase1("f128c512")
  c.mesh.data, c.mesh.fsdp = 1, -1  # parameters split over all chips
  return c
