r"""UViT-H on latents of SD-VAE-f8, the baseline: patches of 2 x 2, 1024 tokens.

  python -m dcae_jax.main --config=configs/sd_vae_f8_uvit_h.py --workdir=out \
    --config.latents=gs://bucket/sd_vae_f8_512px

Meant for a pod slice (batch 1024). The authors give gFID 3.55 with
guidance, ImageNet 512 px.
Here: not yet measured.
"""

from configs import base


def get_config():
  config = base.uvit("UViT-H")
  config.model.patch_size = 2
  return config
