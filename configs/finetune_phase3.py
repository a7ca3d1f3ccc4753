r"""A released autoencoder refined on your own images, phase 3.

  python -m dcae_jax.main --config=configs/finetune_phase3.py \
    --workdir=runs/finetune/phase3 \
    --config.init_from=runs/finetune/phase2 \
    --config.data.source.path=/data/train \
    --config.evaluation.source.path=/data/val

Latents stay as they are. The model is that of `init_from`: a run, a hub id, a
folder or a file. Meant for one GPU with 24 GiB. Expected numbers: not yet
measured.
"""

from configs import base


def get_config():
  c = base.phase3("")
  c.batch_size, c.steps = 16, 10_000
  c.optimizer.warmup_steps = 500
  c.ema.decay = 0.999
  c.evaluation.every = c.checkpoint.every = 1_000
  return c
