r"""Text to image of 38 photographs, on a CPU, in minutes.

  python -m dcae_jax.main --config=configs/quickstart_text.py \
    --workdir=runs/quickstart_text

Needs the autoencoder of launch/quickstart.sh, runs/quickstart/phase3. Random
crops of each photograph are encoded, their captions by MiniLM, and a tiny
PixArt learns them by flow matching. samples/samples.png shows what it draws of
captions that it learned, and of prompts that recombine their words. What was
measured is in docs/results.md.
"""

from configs import base


def get_config():
  config = base.export_and_diffuse()
  c = config.export
  c.init_from = "runs/quickstart/phase3"
  c.source = base.source("embedded", split="train", captions=True)
  c.max_images = 38
  c.crop, c.min_area = "random_resized_crop", 0.8
  c.resolution, c.crops_per_image, c.flip = 64, 32, True
  c.threads = 2
  c = config.training
  c.model.variant, c.model.dtype = "PixArt-tiny", "float32"
  c.model.patch_size = 2  # of latents 8 x 8: 16 tokens
  c.text.max_tokens, c.text.dtype = 24, "float32"
  c.objective.kind = "flow"  # in so few steps, far better than noise
  c.objective.logit_normal = (0.0, 1.0)
  c.batch_size, c.steps = 32, 6000
  c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-3, 100
  c.ema.decay, c.ema.ramp_steps = 0.998, 500
  c.data.threads = 1
  c.sampler.kind, c.sampler.steps = "heun", 25
  c.samples.every = c.checkpoint.every = 2000
  c.log_every = 100
  c = config.samples
  c.prompts = (
    "boy playing football",
    "orange flowers, white pot",
    "white armchair and curtain",
    "neon sign in cafe",
    "retina of an eye",
    # Nobody's captions: words of several.
    "dark cafe with red windows",
    "pink bedroom with plants",
    "red flowers in a white pot",
    "football in a dark room",
  )
  c.samples_per_prompt, c.batch_size = 4, 36
  c.picture.classes = len(c.prompts)
  c.guidance = (1.0, 3.0)
  c.metrics = ()
  return config
