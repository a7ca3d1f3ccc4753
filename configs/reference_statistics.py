r"""Mean and covariance of Inception features of images, to compute FID with.

  python -m dcae_jax.main --config=configs/reference_statistics.py \
    --workdir=statistics/imagenet_train --config.resolutions='(512,)' \
    --config.source.kind=tfds --config.source.name=imagenet2012 \
    --config.source.split=train

Writes inception_512px.npz, in the layout of pytorch-fid. Meant for any machine;
1.28 million images need an accelerator. What is measured is the result.
"""

from configs import base


def get_config():
  return base.reference_statistics()
