r"""Residual autoencoding (section 3.2): with and without, at every compression.

  python -m dcae_jax.main --config=configs/studies/residual_autoencoding.py \
    --workdir=runs/studies/residual_autoencoding

Data: see recipe.py. What was measured is in docs/results.md.
"""

from configs import base
from configs.studies import recipe

_VARIANTS = {
  "f8": "small-f8c2",
  "f16": "small-f16c8",
  "f32": "small-f32c32",
  "f64": "small-f64c128",
}


def get_config():
  c = base.study()
  c.title = "Residual autoencoding"
  c.base = recipe.phase1()
  for arm, variant in _VARIANTS.items():
    c.arms[arm] = {"model": {"variant": variant}}
    plain = {"variant": variant, "residual_autoencoding": False}
    c.arms[f"{arm}-plain"] = {"model": plain}
  c.measures = recipe.measures(64)
  c.pairs = tuple((arm, f"{arm}-plain") for arm in _VARIANTS)
  c.figure.lines = {
    "with shortcuts": tuple(_VARIANTS),
    "without": tuple(f"{arm}-plain" for arm in _VARIANTS),
  }
  c.figure.ticks = ("8", "16", "32", "64")
  c.figure.x_label = "spatial compression"
  c.figure.over_steps = tuple(recipe.measures(64))
  # Figure 3, ImageNet at 256 px.
  c.published["rFID"] = {
    "f8": 0.51, "f32": 0.49, "f64": 0.50,
    "f8-plain": 0.90, "f32-plain": 2.04, "f64-plain": 28.3,
  }  # fmt: skip
  return c
