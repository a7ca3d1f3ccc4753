r"""DC-AE f64c128 measured as in the paper's table 2: rFID, PSNR, SSIM, LPIPS.

  python -m dcae_jax.main --config=configs/f64_evaluate.py --workdir=out \
    --config.init_from=runs/f64/phase3 \
    --config.source.kind=tfds --config.source.name=imagenet2012 \
    --config.source.split=validation

Meant for any machine; ImageNet's 50,000 images need an accelerator. The authors
give 0.22 / 26.15 dB / 0.71 / 0.080 at 512 px for dc-ae-f64c128-in-1.0. Here:
not yet measured.
"""

from configs import base


def get_config():
  return base.evaluate()
