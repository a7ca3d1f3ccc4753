r"""How fast small autoencoders learn: the optimizer, blocks, norms, the GAN.

  python -m dcae_jax.main --config=configs/studies/learning.py:1 \
    --workdir=runs/studies/learning_1
  python -m dcae_jax.main --config=configs/studies/learning.py:3 \
    --workdir=runs/studies/learning_3 \
    --config.start_from=runs/studies/learning_1

Phase 1 of the quickstart with other settings, then its phase 3. It needs
requirements-quickstart.txt. What was measured is in docs/learning.md.
"""

from configs import base, quickstart

_PHASE_1 = {
  "quickstart": {},
  "no-weight-decay": {"optimizer": {"weight_decay": 0.0}},
  "cosine": {"optimizer": {"schedule": "cosine", "decay_steps": 0}},
  "blocks-from-1": {"initial_branch_scale": 1.0},
  "batch-norm": {"model": {"variant": "tiny-f8"}},
  "AdamW": {"optimizer": {"kind": "adamw", "learning_rate": 2e-3}},
}
_PHASE_3 = {
  "quickstart": {},
  "no-GAN": {"discriminator": {"weight": 0.0}},
  "discriminator-1e-3": {"discriminator": {"learning_rate": 1e-3}},
}


def get_config(phase: str):
  c = base.study()
  c.title = f"What makes a small autoencoder learn, phase {phase}"
  c.base = quickstart.get_config()[f"phase{phase}"]
  c.base.evaluation.every = 100
  c.measures = {
    "PSNR, 64 px": "eval/psnr",
    "PSNR, 128 px": "eval/128px/psnr",
    "LPIPS, 64 px": "eval/lpips",
    "LPIPS, 128 px": "eval/128px/lpips",
  }
  if phase == "1":
    c.arms = _PHASE_1
    c.base.steps, c.base.optimizer.decay_steps = 300, 75
    c.measures["seconds of training"] = "train/seconds"
    c.figure.over_steps = ("PSNR, 64 px",)
  else:
    c.arms = _PHASE_3
    c.base.init_from = "{study}/cells/quickstart/{seed}"
    c.measures["discriminator's loss"] = "train/loss/discriminator"
  return c
