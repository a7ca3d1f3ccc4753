r"""Who should compress, the autoencoder or the denoiser? One cell of table 1.

  python -m dcae_jax.main --config=configs/studies/compression.py \
    --workdir=runs/compression/f64 --config.export.init_from=runs/f64 \
    --config.export.source.path=/data/tiles --config.training.model.patch_size=1

Images of 256 px are 16 tokens for f8 with patch size 8, f16 with 4, f32 with 2
and f64 with 1; if their latents have the same size, so have all layers of the
denoiser. Samples are measured against the images that it learned.
"""

from configs import base


def get_config():
  config = base.export_and_diffuse()
  c = config.export
  c.resolution, c.flip = 256, True
  c = config.training
  c.model.variant, c.model.patch_size = "UViT-XS", 8
  c.model.dtype = "float32"
  c.objective.kind = "flow"
  c.objective.logit_normal = (0.0, 1.0)
  c.batch_size, c.steps = 64, 10_000
  c.optimizer.learning_rate, c.optimizer.warmup_steps = 5e-4, 200
  c.ema.decay, c.ema.ramp_steps = 0.999, 500
  c.data.threads = 1
  c.sampler.kind, c.sampler.steps = "heun", 25
  c.samples.every, c.samples.guidance = 0, (1.0,)
  c.checkpoint.every = 2_000
  c = config.samples
  c.samples, c.images = 256, ""
  c.metrics = (
    "frechet_efficientnet_lite0",
    "precision_recall_efficientnet_lite0",
  )
  return config
