r"""PixArt-alpha on SD-VAE-f8, 1024 tokens of 512 px, patches of 2.

  python -m dcae_jax.main --config=configs/pixart_sd_vae_f8.py --workdir=out \
    --config.latents=gs://bucket/captioned_sd_vae_f8_512px

The baseline: all else is as in pixart_f32.py. Meant for v5p:2x2x4 (planned:
docs/results.md). Here: not yet measured.
"""

from configs import base


def get_config():
  c = base.pixart("PixArt-XL")
  c.model.patch_size = 2
  c.mesh.data, c.mesh.fsdp = 1, -1  # parameters split over all chips
  c.model.rematerialisation = True
  return c
