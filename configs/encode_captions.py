r"""Captions of a latent store to the states of a text encoder, for training.

  python -m dcae_jax.main --config=configs/encode_captions.py --workdir=out \
    --config.latents=gs://bucket/f32_512px --config.output=gs://bucket/t5 \
    --config.text.encoder=PixArt-alpha/PixArt-XL-2-512x512

The store has captions if its export read them (source.captions). Kept
are the states of real tokens alone, in bfloat16: with T5-XXL 8,192 bytes a
token (docs/text_to_image.md). On accelerators: not yet measured.
"""

from configs import base


def get_config():
  return base.encode_captions()
