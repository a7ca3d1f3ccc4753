r"""Latents of the authors' tools (one .npy per image), converted to a store.

  python -m dcae_jax.main --config=configs/import_latents.py --workdir=out \
    --config.init_from=mit-han-lab/dc-ae-f64c128-in-1.0-diffusers \
    --config.source.path=/data/latents --config.output=gs://bucket/f64_512px

The files hold float32 [c, h, w], already multiplied by the scaling factor of
`init_from`, in a folder per class. Speed: not yet measured.
"""

from configs import base


def get_config():
  config = base.export_latents()
  config.source = base.source("npy")
  config.dtype = "float32"
  return config
