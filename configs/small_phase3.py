r"""A small DC-AE on a folder of photographs, phase 3, in minutes.

  python -m dcae_jax.main --config=configs/small_phase3.py \
    --workdir=runs/small/phase3 --config.init_from=runs/small/phase2 \
    --config.data.source.path=FOLDER

The folder is that of phase 1: the same tenth of it is held out.
Expected numbers: not yet measured.
"""

from configs import base


def get_config():
  c = base.small(base.phase3(""))
  c.resolution, c.batch_size, c.steps = 64, 16, 4_000
  c.optimizer.learning_rate = 2e-4
  c.discriminator.width, c.discriminator.weight = 16, 0.1
  c.evaluation.resolutions = (64, 128)
  larger = {"resolution": 128, "batch_size": 64}
  base.on_accelerator(c, larger | {"evaluation.resolutions": (128, 256)})
  return c
