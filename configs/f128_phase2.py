r"""DC-AE f128c512, phase 2: high-resolution latent adaptation.

  python -m dcae_jax.main --config=configs/f128_phase2.py \
    --workdir=gs://BUCKET/f128/phase2 \
    --config.init_from=gs://BUCKET/f128/phase1 \
    --config.data.source.path=gs://BUCKET/images/train \
    --config.evaluation.source.path=gs://BUCKET/images/val

Meant for v5e:4x8, 32 chips of 16 GiB (planned: docs/results.md).
Expected numbers: not yet measured.
"""

from configs import base


def get_config():
  c = base.phase2("f128c512")
  c.batch_size = 32  # [ours] one image for each chip
  c.resolution = 1024  # [ours] not published per variant
  c.data.min_size = 1024
  c.evaluation.resolutions = (1024, 256)
  c.mesh.data, c.mesh.fsdp = 1, -1  # parameters split over all chips
  return c
