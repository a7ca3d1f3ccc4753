r"""All three phases of a tiny variant, on a CPU, in minutes; nothing downloads.

  python -m dcae_jax.main --config=configs/quickstart.py \
    --workdir=runs/quickstart

Rates and steps are far from the paper's: the network is tiny, and learns from
81 photographs.
"""

from configs import base


def get_config():
  config = base.three_phases("tiny-f8")
  held_out = base.source("embedded", split="validation")
  for c in (config.phase1, config.phase2, config.phase3):
    c.model.rematerialisation = False
    c.model.dtype = "float32"
    c.lpips.network = "alexnet"
    c.optimizer.warmup_steps = 20
    c.ema.decay = 0.99
    c.ema.ramp_steps = 50
    c.data.source = base.source("embedded", split="train")
    c.data.crop = "random_resized_crop"
    c.data.min_size = 0
    c.data.shorter_side = 384
    c.data.cache_megabytes = 200
    c.data.workers = 0
    c.data.threads = 2
    c.evaluation.source = held_out
    c.evaluation.every = 200
    c.evaluation.batch_size = 8
    c.checkpoint.every = 200
    c.log_every = 10
  low, high = 64, 128
  c = config.phase1
  c.resolution, c.batch_size, c.steps = low, 16, 800
  c.optimizer.learning_rate = 2e-3
  c.evaluation.resolutions = (low, high)
  c = config.phase2
  c.resolution, c.batch_size, c.steps = high, 8, 150
  c.optimizer.learning_rate = 5e-4
  c.evaluation.resolutions = (high, low)
  c = config.phase3
  c.resolution, c.batch_size, c.steps = low, 16, 200
  c.optimizer.learning_rate = 2e-4
  c.evaluation.resolutions = (low, high)
  c.discriminator.width = 16
  c.discriminator.weight = 0.1
  config.report.source = held_out
  config.report.resolutions = (low, high)
  config.report.batch_size = 8
  return config
