r"""SD-VAE f32c32, the paper's baseline: full training, L1 + LPIPS + KL.

  python -m dcae_jax.main --config=configs/sd_vae_f32_phase1.py \
    --workdir=gs://BUCKET/sd_vae_f32/phase1 \
    --config.data.source.path=gs://BUCKET/images/train \
    --config.evaluation.source.path=gs://BUCKET/images/val

Stages are added to Stable Diffusion's f8c4; their widths are not published.
Meant for 8 chips of 16 GiB or more. Expected numbers: not yet measured.
"""

from configs import base


def get_config():
  return base.phase1("sd-vae-f32c32")
