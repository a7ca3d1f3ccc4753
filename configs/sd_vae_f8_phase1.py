r"""SD-VAE f8c4, the paper's baseline: full training, L1 + LPIPS + KL.

  python -m dcae_jax.main --config=configs/sd_vae_f8_phase1.py \
    --workdir=gs://BUCKET/sd_vae_f8/phase1 \
    --config.data.source.path=gs://BUCKET/images/train \
    --config.evaluation.source.path=gs://BUCKET/images/val

Meant for 8 chips of 16 GiB or more. Expected numbers: not yet measured.
"""

from configs import base


def get_config():
  return base.phase1("sd-vae-f8c4")
