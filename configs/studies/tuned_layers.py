r"""How many layers phases 2 and 3 tune: the projections, and one or two stages.

  python -m dcae_jax.main --config=configs/studies/tuned_layers.py:2 \
    --workdir=runs/studies/tuned_layers_2 \
    --config.start_from=runs/studies/residual_autoencoding

And `tuned_layers.py:3` from runs/studies/resolution_adaptation. The paper has
such a study in its appendix; what it chose is not published.
What was measured is in docs/results.md.
"""

from configs import base
from configs.studies import recipe

_MIDDLE = ("encoder/project_out", "decoder/project_in")
_HEAD = ("decoder/project_out",)


def get_config(phase: str):
  c = base.study()
  c.title = f"Layers that phase {phase} tunes"
  if phase == "2":
    c.base, first, resolutions = recipe.phase2(), _MIDDLE, (128, 64, 256)
    c.base.init_from = "{study}/cells/f32/{seed}"
    deeper = [(f"encoder/stage_{i}", f"decoder/stage_{i}") for i in (5, 4)]
  else:
    c.base, first, resolutions = recipe.phase3(), _HEAD, (64, 128)
    c.base.init_from = "{study}/cells/f32-middle/{seed}"
    deeper = [("decoder/stage_1",), ("decoder/stage_2",)]
  c.arms = {
    "projections": {"trainable": first},
    "one-stage": {"trainable": first + deeper[0]},
    "two-stages": {"trainable": first + deeper[0] + deeper[1]},
  }
  c.measures = recipe.measures(*resolutions) | {
    "change of latents": "latent_change",
    "parameters": "parameters_trained",
    "seconds of training": "train/seconds",
    "GiB of a step": "step_gib",
  }
  return c
