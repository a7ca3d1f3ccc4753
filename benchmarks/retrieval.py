"""Whether samples show what was asked for: the nearest training image.

  python -m benchmarks.retrieval runs/quickstart_text

Draws samples for captions of the store that a run of `export_and_diffuse`
learned from, each caption as often as the others, and looks for the training
image that is nearest to each by its pixels, among all rows of the store: is it
one that has this caption? Chance is one over the number of photographs.
"""

import argparse
import pathlib

import numpy as np

import dcae_jax
from dcae_jax.autoencoder import quantisation
from dcae_jax.data import captions
from dcae_jax.latents import decode, reader

_AT_ONCE = 64


def _training_images(latents: reader.Latents, ae) -> np.ndarray:
  """Decoded, [rows, values]."""
  rows = np.arange(len(latents))
  parts = [
    decode.to_pixels(ae, latents.read_unscaled(rows[i : i + _AT_ONCE]))
    for i in range(0, len(rows), _AT_ONCE)
  ]
  return np.concatenate(parts).reshape(len(rows), -1).astype(np.float32)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("run", help="a work directory of export_and_diffuse")
  parser.add_argument("--samples", type=int, default=100)
  parser.add_argument("--guidance", type=float, default=3.0)
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  run = pathlib.Path(arguments.run)
  latents = reader.Latents(run / "latents")
  of_images = [
    {text for text, _ in captions.split(row)}
    for row in latents.condition("captions")
  ]
  known = sorted(set().union(*of_images))
  order = np.random.default_rng(arguments.seed).permutation(len(known))
  prompts = [known[order[i % len(known)]] for i in range(arguments.samples)]
  denoiser = dcae_jax.load_denoiser(run / "training")
  drawn = denoiser.sample(
    prompts=prompts, guidance=arguments.guidance, seed=arguments.seed
  )
  drawn = np.asarray(quantisation.quantise(drawn)).reshape(len(prompts), -1)
  images = _training_images(latents, denoiser.autoencoder)
  right = 0
  for prompt, pixels in zip(prompts, drawn, strict=True):
    nearest = np.square(images - pixels).sum(1).argmin()
    right += prompt in of_images[nearest % len(of_images)]
  print(
    f"guidance {arguments.guidance:g}: of {len(prompts)} samples of "
    f"{len(known)} captions, the nearest training image has the caption of "
    f"{right} ({100 * right / len(prompts):.0f} %)"
  )


if __name__ == "__main__":
  main()
