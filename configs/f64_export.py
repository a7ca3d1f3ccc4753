r"""Images to latents of f64c128, in a store that diffusion models learn from.

  python -m dcae_jax.main --config=configs/f64_export.py --workdir=out \
    --config.init_from=runs/f64/phase3 --config.output=gs://bucket/f64_512px \
    --config.source.path=/data/train

Any autoencoder exports with it: the model is that of `init_from`. Meant for any
machine; ImageNet's 1.28 million images want an accelerator. There, not yet
measured.
"""

from configs import base


def get_config():
  return base.export_latents()
