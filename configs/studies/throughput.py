r"""What deep compression saves (table 3): UViT-H on latents of 512 px images.

  python -m dcae_jax.main --config=configs/studies/throughput.py \
    --workdir=runs/studies/throughput

Run it alone on a machine: it measures. Seeds repeat the measurement. On a CPU
the denoiser that is measured is a small one, and decoding is by itself; what is
counted is always the real one. What was measured is in docs/results.md.
"""

from configs import base, throughput


def get_config():
  c = base.study()
  c.title = "Throughput of diffusion on 512 px images"
  c.base = throughput.get_config()
  patches_of_2 = {"model": {"patch_size": 2}}
  c.arms = {
    "f8-p2": {"autoencoder": "sd-vae-f8c4", "training": patches_of_2},
    "f32-p1": {"autoencoder": "f32c32"},
    "f64-p1": {"autoencoder": "f64c128"},
  }
  c.measures = {
    "training an image, GFLOP": "counted/training_gflop",
    "a sample, TFLOP": "counted/sampling_tflop",
    "a decoded sample, TFLOP": "counted/sampling_with_decoding_tflop",
    "training, images/s": "measured/training_images_per_second",
    "sampling, images/s": "measured/sampling_images_per_second",
    "decoding an image, s": "measured/decoding_seconds",
  }
  c.compare = "ratio"
  # Table 3, an H100; f32 is not there with UViT-H.
  c.published = {
    "training, images/s": {"f8-p2": 55.0, "f64-p1": 984.0},
    "sampling, images/s": {"f8-p2": 5.85, "f64-p1": 111.77},
  }
  return c
