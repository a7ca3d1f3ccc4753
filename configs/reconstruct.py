r"""Your own images through an autoencoder: files, side by side, PSNR.

  python -m dcae_jax.main --config=configs/reconstruct.py --workdir=out \
    --config.init_from=mit-han-lab/dc-ae-f64c128-in-1.0-diffusers \
    --config.input='holiday/*.jpg'

Meant for any machine; on a CPU, f32c32 takes about a minute and a half for a
megapixel. What is measured is the result.
"""

from configs import base


def get_config():
  return base.reconstruct()
