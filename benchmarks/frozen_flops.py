"""FLOPs of a training step in each phase, against phase 1.

  python -m benchmarks.frozen_flops --variant=tiny-f32 --resolution=64

L1 loss alone, no remat, same batch and resolution; also the bytes
of the optimizer's state. Nothing is trained or allocated.
"""

import argparse
import dataclasses

from configs import base
from dcae_jax.autoencoder.dcae import variants
from dcae_jax.setup import autoencoder_training
from dcae_jax.training import freezing


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--variant", default="tiny-f32", choices=variants.VARIANTS
  )
  parser.add_argument("--resolution", type=int, default=64)
  parser.add_argument("--batch_size", type=int, default=4)
  arguments = parser.parse_args()
  first = None
  for phase in (base.phase1, base.phase2, base.phase3):
    c = phase(arguments.variant)
    c.resolution, c.batch_size = arguments.resolution, arguments.batch_size
    c.evaluation.resolutions, c.data.min_size = (c.resolution,), 0
    c.lpips.weight, c.model.rematerialisation = 0.0, False
    training = autoencoder_training.build(c, predecessor_is_pending=True)
    training = dataclasses.replace(
      training, adversarial=None, discriminator=None
    )
    flops = training.flops(remat=False)
    first = first or flops
    moments = 4 * freezing.count(training.abstract.optimizer) / 1e6
    print(
      f"{c.phase:36} {flops / 1e9:12.3f} GFLOP  {flops / first:6.3f} of phase 1"
      f"  optimizer state {moments:10.3f} MB",
      flush=True,
    )


if __name__ == "__main__":
  main()
