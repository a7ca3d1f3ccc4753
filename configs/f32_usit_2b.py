r"""USiT-2B, a UViT that predicts velocity, on latents of f32c32.

  python -m dcae_jax.main --config=configs/f32_usit_2b.py --workdir=out \
    --config.latents=gs://bucket/f32_512px

Meant for v5e:4x4, 16 chips of 16 GiB (planned: docs/results.md).
The authors give gFID 2.90 without and
1.72 with guidance 1.15, ImageNet 512 px, after 500,000 steps.
Here: not yet measured.
"""

from configs import base


def get_config():
  c = base.usit("UViT-2B")
  c.mesh.data, c.mesh.fsdp = 1, -1  # parameters split over all chips
  c.model.rematerialisation = True
  return c
