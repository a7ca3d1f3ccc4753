r"""What a latent store holds, whether it is intact, what it looks like.

  python -m dcae_jax.main --config=configs/inspect_latents.py --workdir=out \
    --config.latents=gs://bucket/f64_512px

Reads all of it, and decodes a few random rows to PNG. Speed: not yet measured.
"""

from configs import base


def get_config():
  return base.inspect_latents()
