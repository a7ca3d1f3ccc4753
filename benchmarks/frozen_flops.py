"""FLOPs of a training step in each phase, against phase 1.

  python -m benchmarks.frozen_flops --variant=tiny-f32 --resolution=64

L1 loss alone, no rematerialisation, same batch and resolution; also the bytes
of the optimizer's state. Nothing is trained or allocated.
"""

import argparse

import jax
import numpy as np

from configs import base
from dcae_jax.autoencoder import families, phases, train_step
from dcae_jax.autoencoder.dcae import variants
from dcae_jax.training import freezing, optimizer
from dcae_jax.training import state as state_lib


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--variant", default="tiny-f32", choices=variants.VARIANTS
  )
  parser.add_argument("--resolution", type=int, default=64)
  parser.add_argument("--batch_size", type=int, default=4)
  arguments = parser.parse_args()
  model = families.create(arguments.variant)
  side, first = arguments.resolution, None
  images = jax.ShapeDtypeStruct((arguments.batch_size, side, side, 3), np.uint8)
  image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  settings = optimizer.Settings(**base.autoencoder().optimizer)
  adamw, schedule = optimizer.create(settings, steps=1)
  for name, phase in phases.PHASES.items():
    mask = freezing.trainable_mask(variables["params"], phase().trainable)
    state = jax.eval_shape(
      lambda v, mask=mask: state_lib.create(v, mask, adamw), variables
    )
    train = train_step.create(
      apply=model.apply,
      phase=phase(),
      mask=mask,
      optimizer=adamw,
      schedule=schedule,
      ema=train_step.Ema(0.999, 0),
    )
    traced = jax.jit(train).trace(state, images, {})
    # As other platforms compute it: the fast convolutions of the CPU are loops,
    # whose body would be counted once.
    lowered = traced.lower(lowering_platforms=("tpu",))
    flops = lowered.cost_analysis()["flops"]
    first = first or flops
    moments = 4 * freezing.count(state.optimizer) / 1e6
    print(
      f"{name:36} {flops / 1e9:12.3f} GFLOP  {flops / first:6.3f} of phase 1"
      f"  optimizer state {moments:10.3f} MB",
      flush=True,
    )


if __name__ == "__main__":
  main()
