r"""A small DC-AE on a folder of photographs, phase 2, in minutes.

  python -m dcae_jax.main --config=configs/small_phase2.py \
    --workdir=runs/small/phase2 --config.init_from=runs/small/phase1 \
    --config.data.source.path=FOLDER

The folder is that of phase 1: the same tenth of it is held out. Photographs
smaller than the crops are left out. Expected numbers: not yet measured.
"""

from configs import base


def get_config():
  c = base.small(base.phase2(""))
  c.resolution, c.batch_size, c.steps = 128, 8, 2_000
  c.optimizer.learning_rate = 5e-4
  c.data.min_size = 128
  c.evaluation.resolutions = (128, 64)
  larger = {"resolution": 256, "batch_size": 32, "data.min_size": 256}
  base.on_accelerator(c, larger | {"evaluation.resolutions": (256, 128)})
  return c
