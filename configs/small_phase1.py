r"""A small DC-AE on a folder of photographs, phase 1, in an hour of two cores.

  python -m dcae_jax.main --config=configs/small_phase1.py \
    --workdir=runs/small/phase1 --config.data.source.path=FOLDER

A tenth is held out; on other images: --config.data.source.part=
--config.evaluation.source.part= --config.evaluation.source.path=OTHER. On 170
photographs, measured: 28.09 dB (64 px), 29.14 (128); block PCA 26.19, 27.30.
"""

from configs import base


def get_config():
  c = base.small(base.phase1("tiny-f8-rms"))
  c.resolution, c.batch_size, c.steps = 64, 8, 20_000
  c.initial_branch_scale, c.lpips.weight = 0.0, 0.03
  c.optimizer.kind, c.optimizer.schedule = "muon", "wsd"
  c.optimizer.learning_rate, c.optimizer.adam_learning_rate = 0.01, 2e-3
  c.optimizer.decay_steps, c.optimizer.weight_decay = 10_000, 0.1
  c.optimizer.clip_norm = 0.0
  c.evaluation.resolutions = (64, 128)
  larger = {"resolution": 128, "batch_size": 64}
  base.on_accelerator(c, larger | {"evaluation.resolutions": (128, 256)})
  return c
