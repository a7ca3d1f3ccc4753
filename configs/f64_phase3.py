r"""DC-AE f64c128, phase 3: low-resolution local refinement.

  python -m dcae_jax.main --config=configs/f64_phase3.py \
    --workdir=gs://BUCKET/f64/phase3 \
    --config.init_from=gs://BUCKET/f64/phase2 \
    --config.data.source.path=gs://BUCKET/images/train \
    --config.evaluation.source.path=gs://BUCKET/images/val

Meant for v5e:4x4, 16 chips of 16 GiB (planned: docs/results.md).
The paper reports rFID 0.22, PSNR 26.15 dB on ImageNet val at 512 px;
this configuration: not yet measured.
"""

from configs import base


def get_config():
  c = base.phase3("f64c128")
  c.mesh.data, c.mesh.fsdp = 1, -1  # parameters split over all chips
  return c
