r"""All three phases of a tiny variant, on a CPU, in minutes; nothing downloads.

  python -m dcae_jax.main --config=configs/quickstart.py \
    --workdir=runs/quickstart

Rates and steps are far from the paper's: the network is tiny, and learns from
81 photographs.
"""

from configs import base


def get_config():
  config = base.three_phases("tiny-f8-rms")
  held_out = base.source("embedded", split="validation")
  for c in (config.phase1, config.phase2, config.phase3):
    c.model.rematerialisation, c.model.dtype = False, "float32"
    c.lpips.network, c.lpips.weight = "alexnet", 0.1
    c.optimizer.kind, c.optimizer.schedule = "muon", "cosine"
    c.optimizer.warmup_steps = 20
    c.optimizer.weight_decay = c.optimizer.clip_norm = 0.0
    c.ema.decay, c.ema.ramp_steps = 0.99, 50
    c.data.source = base.source("embedded", split="train")
    c.data.crop = "random_resized_crop"
    c.data.min_size, c.data.shorter_side = 0, 384
    c.data.cache_megabytes = 200
    c.data.workers, c.data.threads = 0, 2
    c.evaluation.source = held_out
    c.evaluation.batch_size = 8
    c.evaluation.every = c.checkpoint.every = 400
    c.log_every = 10
  low, high = 64, 128
  c = config.phase1
  c.initial_branch_scale = 0.0
  c.resolution, c.batch_size, c.steps = low, 8, 1600
  c.optimizer.learning_rate, c.optimizer.adam_learning_rate = 0.01, 2e-3
  c.optimizer.schedule, c.optimizer.decay_steps = "wsd", 400
  c.optimizer.weight_decay = 0.1  # without, weights grow and steps get small
  c.evaluation.resolutions = (low, high)
  c = config.phase2
  c.resolution, c.batch_size, c.steps = high, 8, 100
  c.optimizer.learning_rate, c.optimizer.adam_learning_rate = 1e-3, 2e-4
  c.evaluation.resolutions = (high, low)
  c = config.phase3
  c.resolution, c.batch_size, c.steps = low, 16, 200
  c.optimizer.kind, c.optimizer.schedule = "adamw", "constant"
  c.optimizer.learning_rate = 3e-4
  c.evaluation.resolutions = (low, high)
  c.discriminator.width, c.discriminator.weight = 16, 0.1
  c.discriminator.learning_rate = 1e-4  # at 3e-4 it wins within 200 steps
  config.report.source = held_out
  config.report.resolutions = (low, high)
  config.report.batch_size = 8
  return config
