r"""Phase 2 against the penalty of higher resolution (figures 3b, 6).

  python -m dcae_jax.main --config=configs/studies/resolution_adaptation.py \
    --workdir=runs/studies/resolution_adaptation \
    --config.start_from=runs/studies/residual_autoencoding

Starts from the models of residual_autoencoding.py, trained at 64 px.
What was measured is in docs/results.md.
"""

from configs import base
from configs.studies import recipe

_COMPRESSIONS = ("f8", "f16", "f32", "f64")
_ARMS = {
  "unchanged": recipe.UNCHANGED,
  "middle": {},
  "everything": {"trainable": ("*",)},
}


def get_config():
  c = base.study()
  c.title = "Adaptation to higher resolution"
  c.base = recipe.phase2()
  for f in _COMPRESSIONS:
    for arm, changes in _ARMS.items():
      start = {"init_from": f"{{study}}/cells/{f}/{{seed}}"}
      c.arms[f"{f}-{arm}"] = start | changes
  c.measures = recipe.measures(128, 64, 256) | {
    "seconds of training": "train/seconds",
    "GiB of a step": "step_gib",
  }
  c.pairs = tuple(
    (f"{f}-{arm}", f"{f}-unchanged")
    for f in _COMPRESSIONS
    for arm in ("middle", "everything")
  )
  c.figure.lines = {
    arm: tuple(f"{f}-{arm}" for f in _COMPRESSIONS) for arm in _ARMS
  }
  c.figure.ticks = ("8", "16", "32", "64")
  c.figure.x_label = "spatial compression"
  # Figure 3b, of f64, tested at 1024 px instead of 256; and f8.
  c.published["rFID at four times the side"] = {
    "f64-unchanged": 7.40, "f64-middle": 0.20, "f8-unchanged": 0.19,
  }  # fmt: skip
  return c
