r"""Samples of a diffusion model: images, gFID, IS, precision, recall, a plot.

  python -m dcae_jax.main --config=configs/evaluate_diffusion.py \
    --workdir=runs/f64/samples --config.init_from=runs/f64/uvit_h \
    --config.guidance="(1.0,1.25,1.5,2.0)" \
    --config.reference=runs/reference/inception_512px.npz

The sampler is that of the training run. On a pod, run it on every host with
--config.compute_dtype=bfloat16. The authors give gFID 3.01 for
f64 and UViT-H with guidance 1.5, 50,000 samples. Here: not yet measured.
"""

from configs import base


def get_config():
  return base.evaluate_diffusion()
