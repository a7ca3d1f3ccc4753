"""The table of a report of evaluations, and notes on what is absent or does not
compare; plain text.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dcae_jax.evaluation import fid
from dcae_jax.evaluation import metrics as metrics_table

# Name and contents of result.json of each evaluation.
Runs = Sequence[tuple[str, Mapping[str, Any]]]


def table(runs: Runs) -> list[list[str]]:
  """The paper's table 2 and the latents' statistics, below a row of heads."""
  columns = metrics_table.columns_of(values for *_, values in _rows(runs))
  header = ["autoencoder", "latent", "px", "images"]
  header += [column.title for column in columns.values()]
  rows = [[*header, "latent mean", "std", "RMS", "scaling factor"]]
  for name, result, resolution, values in _rows(runs):
    latent, autoencoder = values["latent"], result["autoencoder"]
    side = int(resolution) // autoencoder["spatial_compression"]
    shape = f"{side} x {side} x {autoencoder['latent_channels']}"
    row = [name, shape, resolution, f"{values['images']:,}"]
    row += [column.text(values.get(key)) for key, column in columns.items()]
    row += [f"{latent[key]:.4g}" for key in ("mean", "std", "rms")]
    factor = latent["scaling_factor"]
    rows.append([*row, "absent" if factor is None else f"{factor:.4g}"])
  return rows


def kinds(runs: Runs) -> list[tuple[Any, ...]]:
  """Of the rows below the heads: equal where they measure the same images."""
  return [
    (resolution, values["images"], images(result), result["crop"])
    for _, result, resolution, values in _rows(runs)
  ]


def images(result: Mapping[str, Any]) -> str:
  """Where they are from."""
  source = result["config"]["source"]
  keys = [x for x in ("name", "path", "split", "part") if source.get(x)]
  named = [source["kind"], *(f"{key} {source[key]}" for key in keys)]
  return f"{', '.join(named)}: {result['files']:,} files"


def model(autoencoder: Mapping[str, Any]) -> str:
  """What a row is of, and where that is."""
  size = autoencoder["spatial_compression"], autoencoder["latent_channels"]
  described = "{}, {:,} parameters, latents f{}c{}".format(
    autoencoder["variant"], autoencoder["parameters"], *size
  )
  place = autoencoder["init_from"]
  return f"{described}, from {place}" if place else described


def _rows(runs: Runs) -> list[tuple[str, Any, str, Any]]:
  """Name, result, resolution and numbers of each row."""
  return [
    (name, result, resolution, values)
    for name, result in runs
    for resolution, values in result["resolutions"].items()
  ]


def notes(runs: Runs) -> list[tuple[str, str]]:
  """Notes on the table: what each is about, and the rest of the sentence."""
  return _absent(runs) + _unverified(runs) + _differences(runs) + _few(runs)


def _absent(runs: Runs) -> list[tuple[str, str]]:
  reasons = {}
  for *_, resolution, values in _rows(runs):
    for metric, reason in values["absent"].items():
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
  """Conditions that runs do not share, so that their rows do not compare."""
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
  notes = []
  for what in dict.fromkeys(key for keys in conditions for key in keys):
    values = [json.dumps(of_run.get(what, "none")) for of_run in conditions]
    if len(set(values)) > 1:
      text = "; ".join(
        f"{name}: {value}"
        for (name, _), value in zip(runs, values, strict=True)
      )
      notes.append((what, f"differ between rows: do not compare them ({text})"))
  return notes


def _few(runs: Runs) -> list[tuple[str, str]]:
  counts = {
    values["images"]
    for *_, values in _rows(runs)
    if metrics_table.with_too_few(values, values["images"])
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
