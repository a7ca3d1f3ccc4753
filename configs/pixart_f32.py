r"""PixArt-alpha on latents of f32c32: 256 tokens of 512 px, patches of 1.

  python -m dcae_jax.main --config=configs/pixart_f32.py --workdir=out \
    --config.latents=gs://bucket/captioned_f32_512px

The store has captions if its export read them, and T5-XXL encodes them in each
step; --config.text.cache=PATH reads states of configs/encode_captions.py.
Meant for v5e:4x8 (planned: docs/results.md). Here: not yet measured.
"""

from configs import base


def get_config():
  c = base.pixart("PixArt-XL")
  c.mesh.data, c.mesh.fsdp = 1, -1  # parameters split over all chips
  c.model.rematerialisation = True
  return c
