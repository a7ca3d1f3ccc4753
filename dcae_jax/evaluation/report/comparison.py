"""What a report says about evaluations in numbers and words: its table, and
notes on what is absent or does not compare. Plain text; nothing is written.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dcae_jax.evaluation import fid
from dcae_jax.evaluation import metrics as metrics_table

# Name and contents of result.json of each evaluation.
Runs = Sequence[tuple[str, Mapping[str, Any]]]


def table(runs: Runs) -> list[list[str]]:
  """The paper's table 2 and the latents' statistics; the first row is heads."""
  columns = metrics_table.columns_of(
    found for _, result in runs for found in result["resolutions"].values()
  )
  header = ["autoencoder", "latent", "px", "images"]
  header += [column.title for column in columns.values()]
  rows = [[*header, "latent mean", "std", "RMS", "scaling factor"]]
  for name, result in runs:
    for resolution, found in result["resolutions"].items():
      latent, autoencoder = found["latent"], result["autoencoder"]
      side = int(resolution) // autoencoder["spatial_compression"]
      shape = f"{side} x {side} x {autoencoder['latent_channels']}"
      row = [name, shape, resolution, f"{found['images']:,}"]
      row += [column.text(found.get(key)) for key, column in columns.items()]
      row += [f"{latent[key]:.4g}" for key in ("mean", "std", "rms")]
      factor = latent["scaling_factor"]
      rows.append([*row, "absent" if factor is None else f"{factor:.4g}"])
  return rows


def notes(runs: Runs) -> list[tuple[str, str]]:
  """What is to be known of the table: what a note is about, and the rest of
  the sentence.
  """
  return _absent(runs) + _unverified(runs) + _differences(runs) + _few(runs)


def _absent(runs: Runs) -> list[tuple[str, str]]:
  reasons = {}
  for _, result in runs:
    for resolution, found in result["resolutions"].items():
      for metric, reason in found["absent"].items():
        reasons.setdefault((metric, reason), set()).add(f"{resolution} px")
  return [
    (metric, f"is absent at {', '.join(sorted(where))}: {reason}")
    for (metric, reason), where in reasons.items()
  ]


def _unverified(runs: Runs) -> list[tuple[str, str]]:
  return [
    (
      metric,
      f"of {name} comes from weights that are not the published file: "
      f"{weights['file']}",
    )
    for name, result in runs
    for metric, weights in result["metric_weights"].items()
    if not weights["is_published"]
  ]


def _differences(runs: Runs) -> list[tuple[str, str]]:
  """What was not the same for all runs, so that their rows do not compare."""
  conditions = [
    {
      "images": result["config"]["source"],
      "crops": result["crop"],
      "references of rFID": result["reference"],
      "number formats": result["config"]["dtype"],
    }
    | {
      f"weights behind {metric}": weights["sha256"]
      for metric, weights in result["metric_weights"].items()
    }
    for _, result in runs
  ]
  found = []
  for what in dict.fromkeys(key for keys in conditions for key in keys):
    values = [json.dumps(of_run.get(what, "none")) for of_run in conditions]
    if len(set(values)) > 1:
      text = "; ".join(
        f"{name}: {value}"
        for (name, _), value in zip(runs, values, strict=True)
      )
      found.append(
        (what, f"differ between rows, which do not compare ({text})")
      )
  return found


def _few(runs: Runs) -> list[tuple[str, str]]:
  counts = {
    found["images"]
    for _, result in runs
    for found in result["resolutions"].values()
    if metrics_table.with_too_few(found, found["images"])
  }
  if not counts:
    return []
  return [
    (
      "Fréchet distances",
      f"of fewer than {fid.FEWEST_IMAGES:,} images order runs at best, at one "
      f"number of images (here {', '.join(map(str, sorted(counts)))})",
    )
  ]
