r"""DC-AE f32c32, phase 3: low-resolution local refinement.

  python -m dcae_jax.main --config=configs/f32_phase3.py \
    --workdir=gs://BUCKET/f32/phase3 \
    --config.init_from=gs://BUCKET/f32/phase2 \
    --config.data.source.path=gs://BUCKET/images/train \
    --config.evaluation.source.path=gs://BUCKET/images/val

Meant for v5e:2x4, 8 chips of 16 GiB (planned: docs/results.md).
The paper reports rFID 0.69, PSNR 23.85 dB on ImageNet val at 256 px;
this configuration: not yet measured.
"""

from configs import base


def get_config():
  return base.phase3("f32c32")
