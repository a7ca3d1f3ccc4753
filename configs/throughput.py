r"""How fast UViT-H learns and draws on latents of f64c128, 512 px.

  python -m dcae_jax.main --config=configs/throughput.py --workdir=out

Beside it: --config.autoencoder=f32c32, or --config.autoencoder=sd-vae-f8c4
with --config.training.model.patch_size=2. On a CPU a small denoiser is
measured, on a GPU or TPU the real one. --config.measured.rounds=0 only counts,
in 20 seconds on a CPU.
"""

from configs import base


def get_config():
  c = base.throughput()
  m = c.measured
  m.depth, m.hidden, m.dtype = 2, 576, "float32"
  m.training_batch, m.sampling_batch = 8, 2
  there = {"depth": 0, "hidden": 0, "dtype": "bfloat16"}
  there |= {"training_batch": 64, "sampling_batch": 32}
  base.on_accelerator(c, {f"measured.{key}": x for key, x in there.items()})
  return c
