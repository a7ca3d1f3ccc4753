r"""All three phases of a tiny variant, on a CPU, in minutes; nothing downloads.

  python -m dcae_jax.main --config=configs/quickstart.py \
    --workdir=runs/quickstart

Rates and steps are far from the paper's: the network is tiny, and learns from
38 photographs.
"""

from configs import base


def get_config():
  config = base.three_phases("tiny-f8")
  photographs = base.source("embedded", split="train")
  held_out = base.source("embedded", split="validation")
  for c in (config.phase1, config.phase2, config.phase3):
    c.model.rematerialisation = False
    c.model.dtype = "float32"
    c.lpips.network = "alexnet"
    c.data.source = photographs
    c.data.shorter_side = 384
    c.data.cache_megabytes = 200
    c.data.workers = 0
    c.data.threads = 2
    c.data.min_size = 0
    c.data.crop = "random_resized_crop"
    c.evaluation.source = held_out
    c.evaluation.resolutions = (64, 128)
    c.evaluation.every = 250
    c.evaluation.batch_size = 8
    c.optimizer.warmup_steps = 20
    c.ema.decay = 0.99
    c.ema.ramp_steps = 50
    c.checkpoint.every = 250
    c.log_every = 10
  c = config.phase1
  c.resolution, c.batch_size, c.steps = 64, 16, 1000
  c.optimizer.learning_rate = 2e-3
  c = config.phase2
  c.resolution, c.batch_size, c.steps = 128, 8, 200
  c.optimizer.learning_rate = 5e-4
  c.evaluation.resolutions = (128, 64)
  c = config.phase3
  c.resolution, c.batch_size, c.steps = 64, 16, 200
  c.optimizer.learning_rate = 5e-4
  c.discriminator.width = 16
  config.report.source = held_out
  config.report.resolutions = (64, 128)
  config.report.batch_size = 8
  return config
