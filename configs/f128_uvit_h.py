r"""UViT-H on latents of f128c512, 64 tokens of a 1024 px image.

  python -m dcae_jax.main --config=configs/f128_uvit_h.py --workdir=out \
    --config.latents=gs://bucket/f128_1024px

Meant for v5e:4x4, 16 chips of 16 GiB (planned: docs/results.md).
The authors give no number for it.
Here: not yet measured.
"""

from configs import base


def get_config():
  c = base.uvit("UViT-H")
  c.mesh.data, c.mesh.fsdp = 1, -1  # parameters split over all chips
  return c
