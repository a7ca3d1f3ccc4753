r"""DC-AE f128c512 measured as in the paper's table 2: rFID, PSNR, SSIM, LPIPS.

  python -m dcae_jax.main --config=configs/f128_evaluate.py --workdir=out \
    --config.init_from=runs/f128/phase3 \
    --config.source.kind=tfds --config.source.name=imagenet2012 \
    --config.source.split=validation

Meant for any machine; ImageNet's 50,000 images need an accelerator. The authors
give an rFID of 0.23 at 512 px for dc-ae-f128c512-in-1.0. Here: not yet
measured.
"""

from configs import base


def get_config():
  c = base.evaluate()
  c.resolutions = (512,)
  c.batch_size = 16
  return c
