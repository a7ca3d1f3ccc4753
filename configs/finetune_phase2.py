r"""A released autoencoder adapted to your own images, phase 2.

  python -m dcae_jax.main --config=configs/finetune_phase2.py \
    --workdir=runs/finetune/phase2 \
    --config.init_from=mit-han-lab/dc-ae-f64c128-in-1.0-diffusers \
    --config.data.source.path=/data/train \
    --config.evaluation.source.path=/data/val

The model is that of `init_from`: a hub id, a folder, a file or a run. Meant for
one GPU with 24 GiB. Expected numbers: not yet measured.
"""

from configs import base


def get_config():
  c = base.phase2("")
  c.batch_size, c.steps = 4, 10_000
  c.optimizer.warmup_steps = 500
  c.ema.decay = 0.999
  c.evaluation.every = c.checkpoint.every = 1_000
  return c
