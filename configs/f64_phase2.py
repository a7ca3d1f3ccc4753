r"""DC-AE f64c128, phase 2: high-resolution latent adaptation.

  python -m dcae_jax.main --config=configs/f64_phase2.py \
    --workdir=gs://BUCKET/f64/phase2 \
    --config.init_from=gs://BUCKET/f64/phase1 \
    --config.data.source.path=gs://BUCKET/images/train \
    --config.evaluation.source.path=gs://BUCKET/images/val

Meant for v5e:4x4, 16 chips of 16 GiB (planned: docs/results.md).
Expected numbers: not yet measured.
"""

from configs import base


def get_config():
  c = base.phase2("f64c128")
  c.mesh.data, c.mesh.fsdp = 1, -1  # parameters split over all chips
  return c
