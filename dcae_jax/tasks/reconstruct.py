"""Reconstructions of your own images, alone and beside them, with PSNR."""

import logging
import os
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.autoencoder import autoencoder, quantisation
from dcae_jax.data import decoding, images, sources
from dcae_jax.evaluation import image_metrics
from dcae_jax.evaluation.report import figures
from dcae_jax.runs import metrics_writer, outcome, plain_text, work_directory
from dcae_jax.setup import keys, start

_LOG = logging.getLogger(__name__)
_FOLDERS = ("reconstructions", "pictures")
_WRITTEN = (*_FOLDERS, "summary.md")
_UNUSABLE = re.compile(r'[\\/:*?"<>|]|^\.')  # in names, on any file system
_MOST_BYTES = 200  # of a name, without its number and ending


def run(config: ConfigDict, workdir: epath.Path) -> bool:
  """Writes reconstructions, pictures of both, summary.md and result.json."""
  keys.check(config)
  pictures = sources.pictures(config.input)
  if not config.init_from:
    raise errors.UserError(
      "config.init_from is empty; name a run, a folder or file of released "
      "weights, or a hub id"
    )
  # Latents are decoded as they are: the scaling factor does not matter.
  ae = autoencoder.load(
    config.init_from, scaling_factor=1.0, dtype=config.dtype
  )
  options = {
    "pad": config.pad,
    "tile": config.tile or None,
    "stride": config.stride or None,
  }
  ae.check_options(**options)
  decoding.check_channels(ae.image_channels)
  originals = [pictures.name(i) for i in range(len(pictures))]
  names = _file_names(originals)
  written = [os.path.realpath(workdir / folder) for folder in _FOLDERS]
  for original in originals:
    path = pathlib.Path(os.path.realpath(original))
    if any(map(path.is_relative_to, written)):
      raise errors.UserError(
        f"{original} would be written over; choose another --workdir"
      )
  start.begin(config, workdir, _WRITTEN)
  how = images.Decoding(
    ae.image_channels,
    max_megapixels=config.max_megapixels,
    shorter_side=config.shorter_side,
  )
  images.check_not_empty(pictures, how)
  if jax.process_index() == 0:
    work_directory.begin_anew(workdir, _WRITTEN)
  start.write_config(config, workdir)
  rows, skipped, begun = [], [], time.monotonic()
  for i, name in enumerate(names):
    try:
      image, _ = images.open_image(pictures, i, how)
    except images.UnusableError as error:
      skipped.append(f"{originals[i]}: {error}")
      _LOG.warning("skipped %s", skipped[-1])
      continue
    original = np.asarray(image).reshape(image.height, image.width, -1)
    made, psnr = _reconstruct(ae, original, options)
    file, both = (f"{folder}/{name}" for folder in _FOLDERS)
    metrics_writer.write_png(workdir / file, made)
    picture = figures.side_by_side(
      [original, made],
      [
        f"original, {image.width} x {image.height}",
        f"{ae.variant}, {psnr:.2f} dB",
      ],
    )
    metrics_writer.write_png(workdir / both, picture)
    rows.append(
      {"image": originals[i], "file": both, "reconstruction": file,
       "width": image.width, "height": image.height, "psnr": psnr}
    )  # fmt: skip
    seconds = (time.monotonic() - begun) / (i + 1) * (len(names) - i - 1)
    _LOG.info(
      "%d/%d %s: %d x %d, %.2f dB; about %.0f s left",
      i + 1, len(names), originals[i], image.width, image.height, psnr, seconds,
    )  # fmt: skip
  _write(workdir, config.init_from, ae.variant, rows, skipped)
  return True


def _reconstruct(
  ae: autoencoder.Autoencoder, original: np.ndarray, options: dict[str, Any]
) -> tuple[np.ndarray, float]:
  """The reconstruction of an image, both uint8 [h, w, c], and its PSNR."""
  y = quantisation.quantise(ae.reconstruct(original[None], **options))
  pixels = jnp.asarray(original[None], jnp.float32)
  psnr = float(image_metrics.psnr(y, pixels)[0])
  return np.asarray(y[0], np.uint8), psnr


def _file_names(paths: list[str]) -> list[str]:
  """PNG names, numbered where pictures of several folders share one."""
  names = {}  # by what a file system without upper case makes of them
  for path in paths:
    stem, number = plain_text.escaped(pathlib.PurePath(path).stem), 1
    stem = _UNUSABLE.sub("_", stem)
    stem = stem.encode()[:_MOST_BYTES].decode(errors="ignore")
    name = f"{stem}.png"
    while name.casefold() in names:
      number += 1
      name = f"{stem}_{number}.png"
    names[name.casefold()] = name
  return list(names.values())


def _write(
  workdir: epath.Path,
  init_from: str,
  variant: str,
  rows: list[dict[str, Any]],
  skipped: list[str],
) -> None:
  mean = float(np.mean([row["psnr"] for row in rows]))
  heads = "| picture | size | PSNR | reconstruction | side by side |"
  lines = [heads, "| --- " * 5 + "|"]
  for row in rows:
    image, made, both = (
      plain_text.markdown(row[key])
      for key in ("image", "reconstruction", "file")
    )
    size, psnr = f"{row['width']} x {row['height']}", f"{row['psnr']:.2f} dB"
    lines.append(f"| {image} | {size} | {psnr} | {made} | {both} |")
  lines.append(f"| mean of {len(rows)} | | {mean:.2f} dB | | |")
  table = "\n".join(lines)
  missing = "".join(
    f"\n- skipped {plain_text.markdown(reason)}" for reason in skipped
  )
  weights = plain_text.markdown(init_from)
  metrics_writer.write_whole(
    workdir / "summary.md",
    f"# Reconstructions by {variant}\n\nWeights: {weights}\n\n{table}\n"
    f"{missing}\n",
  )
  result = {"psnr": mean, "pictures": rows, "skipped": skipped}
  metrics_writer.write_json(workdir / "result.json", result)
  _LOG.info("\n%s\n", table)
  outcome.say(
    workdir,
    {
      "pictures": "pictures",
      "reconstructions": "reconstructions",
      "summary": "summary.md",
      "result": "result.json",
    },
  )
