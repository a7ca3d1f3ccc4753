r"""SANA-1600M on latents of f32c32-sana, 256 tokens of a 512 px image.

  python -m dcae_jax.main --config=configs/sana_1600m.py --workdir=out \
    --config.latents=gs://bucket/captioned_f32_sana_512px

The store has captions if its export read them, and Gemma 2 encodes them in each
step; --config.text.instruction=TEXT stands before each of them.
Meant for v5p:2x2x4 (planned: docs/results.md). Here: not yet measured.
"""

from configs import base


def get_config():
  c = base.sana("SANA-1600M")
  c.mesh.data, c.mesh.fsdp = 1, -1  # parameters split over all chips
  c.model.rematerialisation = True
  return c
