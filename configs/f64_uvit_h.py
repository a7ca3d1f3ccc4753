r"""UViT-H on latents of f64c128, 64 tokens of a 512 px image.

  python -m dcae_jax.main --config=configs/f64_uvit_h.py --workdir=out \
    --config.latents=gs://bucket/f64_512px

Meant for v5e:4x4, 16 chips of 16 GiB (planned: docs/results.md).
The authors give gFID 13.96 without and
3.01 with guidance 1.5, ImageNet 512 px, after 500,000 steps.
Here: not yet measured.
"""

from configs import base


def get_config():
  c = base.uvit("UViT-H")
  c.mesh.data, c.mesh.fsdp = 1, -1  # parameters split over all chips
  return c
