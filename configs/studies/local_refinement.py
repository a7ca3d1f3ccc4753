r"""Local refinement, phase 3 (section 3.2, figure 5): where the GAN may act.

  python -m dcae_jax.main --config=configs/studies/local_refinement.py \
    --workdir=runs/studies/local_refinement \
    --config.start_from=runs/studies/resolution_adaptation

Starts from the models of resolution_adaptation.py.
What was measured is in docs/results.md.
"""

from configs import base
from configs.studies import recipe


def get_config():
  c = base.study()
  c.title = "Local refinement"
  c.base = recipe.phase3()
  c.base.init_from = "{study}/cells/f32-middle/{seed}"
  c.arms = {
    "unchanged": recipe.UNCHANGED,
    "head-without-GAN": {"discriminator": {"weight": 0.0}},
    "head": {},
    "whole-model": {"trainable": ("*",)},
  }
  c.measures = recipe.measures(64, 128) | {
    "change of latents": "latent_change",
    "steps per second": "train/steps_per_second",
    "GiB of a step": "step_gib",
  }
  c.published["rFID"] = {"unchanged": 3.82, "whole-model": 0.82, "head": 0.69}
  return c
