"""Whether samples show what their prompts ask for: the nearest training image.

  python -m benchmarks.retrieval runs/quickstart_text

Of each PNG of an evaluation of prompts that are captions, by guidance scale: is
the training image that is nearest to it, by pixels, one that has this caption?
Training images are those of the store, decoded. Chance is one over the number
of photographs.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image

from dcae_jax.data import captions
from dcae_jax.latents import decode, reader

_AT_ONCE = 64


def _training_images(latents: reader.Latents) -> np.ndarray:
  ae = decode.load_autoencoder(latents.manifest, "", "keep it where it was")
  rows = np.arange(len(latents))
  return np.concatenate(
    [
      decode.to_pixels(ae, latents.read_unscaled(rows[i : i + _AT_ONCE]))
      for i in range(0, len(rows), _AT_ONCE)
    ]
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("run", help="a work directory of export_and_diffuse")
  run = pathlib.Path(parser.parse_args().run)
  latents = reader.Latents(run / "latents")
  texts = [
    {text for text, _ in captions.split(row)}
    for row in latents.condition("captions")
  ]
  images = _training_images(latents).reshape(len(latents), -1)
  images = images.astype(np.float32)
  known = set().union(*texts)
  for folder in sorted((run / "samples/images").iterdir()):
    right = asked = 0
    for file in sorted(folder.glob("*.png")):
      with Image.open(file) as sample:
        prompt, pixels = sample.text["prompt"], np.asarray(sample, np.float32)
      if prompt in known:
        distances = np.square(images - pixels.reshape(1, -1)).sum(1)
        asked += 1
        right += prompt in texts[distances.argmin() % len(texts)]
    print(f"{folder.name}: {right} of {asked} ({100 * right / asked:.0f} %)")


if __name__ == "__main__":
  main()
