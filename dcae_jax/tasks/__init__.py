"""The table of tasks: `config.task`, and the module whose `run` it is.

A task of one's own is a line of it, and its keys a line of `configs/base.py`'s
table, `KEYS`.
"""

_OURS = (
  "prepare", "train_autoencoder", "train_phases", "report", "reconstruct",
  "evaluate_autoencoder", "reference_statistics", "export_latents",
  "inspect_latents", "encode_captions", "train_diffusion", "evaluate_diffusion",
  "export_and_diffuse", "study", "plan", "throughput",
)  # fmt: skip
TASKS: dict[str, str] = {name: f"{__name__}.{name}" for name in _OURS}
