r"""DC-AE f32c32 measured as in the paper's table 2: rFID, PSNR, SSIM, LPIPS.

  python -m dcae_jax.main --config=configs/f32_evaluate.py --workdir=out \
    --config.init_from=runs/f32/phase3 \
    --config.source.kind=tfds --config.source.name=imagenet2012 \
    --config.source.split=validation

Meant for any machine; ImageNet's 50,000 images need an accelerator. The authors
give 0.69 / 23.85 dB / 0.66 / 0.082 at 256 px for dc-ae-f32c32-in-1.0. Here: not
yet measured.
"""

from configs import base


def get_config():
  c = base.evaluate()
  c.resolutions = (256,)
  return c
