r"""DC-AE f32c32, phase 2: high-resolution latent adaptation.

  python -m dcae_jax.main --config=configs/f32_phase2.py \
    --workdir=gs://BUCKET/f32/phase2 \
    --config.init_from=gs://BUCKET/f32/phase1 \
    --config.data.source.path=gs://BUCKET/images/train \
    --config.evaluation.source.path=gs://BUCKET/images/val

Meant for v5e:2x4, 8 chips of 16 GiB (planned: docs/results.md).
Expected numbers: not yet measured.
"""

from configs import base


def get_config():
  return base.phase2("f32c32")
