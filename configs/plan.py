r"""What a training run needs of a TPU slice, before there is one.

  python -m dcae_jax.main --config=configs/plan.py \
    --config.of=configs/f64_phase2.py --config.topology=v5e:4x4

Meant for any machine with 12 GiB of memory; libtpu, an ordinary package,
compiles for slices that are not there. Minutes for each row on two cores. What
it predicts was not yet measured on a TPU.
"""

from configs import base


def get_config():
  return base.plan()
