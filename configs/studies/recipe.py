"""What the studies of autoencoders share: data, optimizer, sizes, measures.

Tiles of photographs, made by

  python -m benchmarks.photo_tiles --photos=FOLDER --output=data/tiles

Other images: --config.base.data.source.path=... and
--config.base.evaluation.source.path=..., or any other kind of source.
"""

from configs import base

TRAINING = "data/tiles/training"
_HELD_OUT = "data/tiles/held_out"
_METRICS = {
  "PSNR": "psnr",
  "LPIPS": "lpips",
  "Fréchet": "frechet_efficientnet_lite0",
}


def _shared(c):
  c = base.small(c)
  c.batch_size, c.log_every = 8, 50
  c.lpips.weight = 0.1
  c.optimizer.kind = "muon"
  c.optimizer.weight_decay = c.optimizer.clip_norm = 0.0
  c.data.source = base.source("folder", TRAINING)
  c.evaluation.source = base.source("folder", _HELD_OUT)
  c.data.shorter_side = 0
  c.evaluation.metrics = ("lpips", "frechet_efficientnet_lite0")
  c.evaluation.max_images, c.evaluation.batch_size = 256, 32
  c.on_accelerator = ()
  return c


def phase1():
  """What docs/learning.md found best, at 64 px."""
  c = _shared(base.phase1(""))
  c.resolution, c.steps = 64, 600
  c.evaluation.resolutions = (64,)
  c.initial_branch_scale = 0.0
  c.optimizer.learning_rate, c.optimizer.adam_learning_rate = 0.01, 2e-3
  c.optimizer.schedule, c.optimizer.decay_steps = "wsd", 300
  c.optimizer.weight_decay = 0.1
  c.evaluation.every = c.checkpoint.every = 200
  return c


def phase2():
  """The middle layers, at 128 px."""
  c = _shared(base.phase2(""))
  c.start_from_averages = True
  c.resolution, c.steps = 128, 200
  c.data.min_size = 0
  c.optimizer.learning_rate, c.optimizer.adam_learning_rate = 1e-3, 2e-4
  c.optimizer.schedule, c.optimizer.warmup_steps = "cosine", 50
  c.evaluation.resolutions = (128, 64, 256)
  return c


def phase3():
  """The decoder's head with a GAN, at 64 px."""
  c = _shared(base.phase3(""))
  c.start_from_averages = True
  c.resolution, c.steps = 64, 400
  c.evaluation.resolutions = (64, 128)
  c.optimizer.kind, c.optimizer.learning_rate = "adamw", 3e-4
  c.optimizer.warmup_steps = 50
  c.discriminator.width, c.discriminator.learning_rate = 16, 1e-4
  c.discriminator.weight = 0.1
  return c


# The run that it starts from, measured once more by a step that learns nothing.
UNCHANGED = {
  "steps": 1,
  "optimizer": {"learning_rate": 0.0, "adam_learning_rate": 0.0},
}


def measures(first, *others):
  """Quality at one resolution, or at several: names to numbers of a run.

  The first one is the first that a run evaluates.
  """
  named = {}
  for name, key in _METRICS.items():
    named[f"{name}, {first} px"] = f"eval/{key}"
    for side in others:
      named[f"{name}, {side} px"] = f"eval/{side}px/{key}"
  return named
