r"""Who should compress, the autoencoder or the denoiser? (Table 1.)

  python -m dcae_jax.main --config=configs/studies/compression.py \
    --workdir=runs/studies/compression \
    --config.start_from=runs/studies/resolution_adaptation

Images of 128 px are 4 tokens for f8 with patches of 8, f16 with 4, f32 with 2
and f64 with 1, and have latents of the same size: the denoisers are the same.
The autoencoders are those whose middle layers were adapted to 128 px. Samples
are measured against the tiles that they learned.
What was measured is in docs/results.md.
"""

from configs import base
from configs.studies import recipe


def _run():
  config = base.export_and_diffuse()
  c = config.export
  c.source = base.source("folder", recipe.TRAINING)
  c.resolution, c.flip = 128, True
  c.crop, c.min_area, c.crops_per_image = "random_resized_crop", 0.5, 4
  c = config.training
  c.model.variant, c.model.dtype = "UViT-tiny", "float32"
  c.objective.kind = "flow"
  c.objective.logit_normal = (0.0, 1.0)
  c.batch_size, c.steps = 64, 6_000
  c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-3, 100
  c.ema.decay, c.ema.ramp_steps = 0.998, 500
  c.data.threads = 1
  c.sampler.kind, c.sampler.steps = "heun", 25
  c.samples.every, c.samples.guidance = 0, (1.0,)
  c.checkpoint.every, c.log_every = 2_000, 100
  c = config.samples
  c.samples, c.images = 512, ""
  c.metrics = (
    "frechet_efficientnet_lite0",
    "precision_recall_efficientnet_lite0",
  )
  return config


def get_config():
  c = base.study()
  c.title = "Who should compress"
  c.base = _run()
  for f, patch_size in {"f8": 8, "f16": 4, "f32": 2, "f64": 1}.items():
    c.arms[f"{f}-p{patch_size}"] = {
      "export": {"init_from": f"{{study}}/cells/{f}-middle/{{seed}}"},
      "training": {"model": {"patch_size": patch_size}},
    }
  of_samples = "guidance/1"
  c.measures = {
    "Fréchet": f"{of_samples}/frechet_efficientnet_lite0",
    "precision": f"{of_samples}/precision_efficientnet_lite0",
    "recall": f"{of_samples}/recall_efficientnet_lite0",
  }
  # Table 1: UViT-S, ImageNet at 512 px, 64 tokens.
  c.published = {
    "FID": {"f8-p8": 125.08, "f64-p1": 67.30},
    "FID with guidance": {
      "f8-p8": 95.93, "f16-p4": 88.06, "f32-p2": 76.57, "f64-p1": 35.96,
    },
  }  # fmt: skip
  return c
