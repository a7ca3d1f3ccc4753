"""What a latent store holds, whether it is whole, what it looks like."""

import logging
import os
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.autoencoder import autoencoder
from dcae_jax.evaluation.report import figures
from dcae_jax.latents import decode, reader
from dcae_jax.runs import (
  json_types,
  metrics_writer,
  progress_lines,
  resumable_store,
  work_directory,
)
from dcae_jax.setup import keys, start

_LOG = logging.getLogger(__name__)
_SHOWN = {  # of the manifest, besides what is needed to read latents
  "autoencoder": {
    "variant": str, "spatial_compression": int, "latent_channels": int,
    "weights_sha256": str,
  },
  "scaling_factor_origin": str, "statistics": dict, "resolution": int,
  "crop": dict, "source": dict, "unreadable": list, "versions": dict,
}  # fmt: skip


def check(config: ConfigDict) -> None:
  """Raises UserError for a config that cannot be run."""
  keys.check(config)
  if not config.latents:
    raise errors.UserError(
      "config.latents is empty; name a latent store, a directory or gs:// "
      "prefix"
    )


def run(config: ConfigDict, workdir: epath.Path) -> bool:
  """Prints the manifest; writes `samples/*.png` and `result.json`."""
  check(config)
  start.begin(config, workdir, ("samples",))
  store = reader.Latents(config.latents, retries=config.retries)
  path = f"{store.path}/{resumable_store.MANIFEST}"
  json_types.check(path, store.manifest, _SHOWN, "export it again")
  _LOG.info("%s\n%s", store.path, summary(store.manifest))
  ae = None
  if config.samples:
    ae = decode.load_autoencoder(
      store.manifest,
      config.init_from,
      "name it with config.init_from, or decode nothing with config.samples=0",
    )
  if jax.process_index() == 0:
    written = ("samples/row_*.png", "samples/rows.png")
    work_directory.begin_anew(workdir, written)
  start.write_config(config, workdir)
  problems = _verify(store) if config.verify else []
  rows = _sample(config, len(store)) if not problems else []
  if rows:
    _write_samples(store, ae, rows, workdir / "samples")
  result = {
    "latents": store.path,
    "count": store.manifest["count"],
    "verified": bool(config.verify),
    "problems": problems,
    "samples": rows,
  }
  metrics_writer.write_json(workdir / "result.json", result)
  if problems:
    more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
    raise errors.UserError(
      f"{store.path} is damaged: {'; '.join(problems[:10])}{more}; export it "
      "again to another place"
    )
  return True


def summary(manifest: dict[str, Any]) -> str:
  """The manifest for people: a line for each thing."""
  made_with, statistics = manifest["autoencoder"], manifest["statistics"]
  channels = statistics["channels"]
  kind = f"f{made_with['spatial_compression']}c{made_with['latent_channels']}"
  lines = {
    "rows": f"{manifest['count']} of shape {manifest['shape']}, "
    f"{manifest['dtype']}, in {len(manifest['shards'])} shards",
    "views": ", ".join(manifest["views"]),
    "conditions": ", ".join(manifest["conditions"]),
    "autoencoder": f"{made_with['variant']}, {kind}, {made_with['init_from']}",
    "weights": f"sha256 {made_with['weights_sha256']}",
    "scaling factor": f"{manifest['scaling_factor']:.6g} "
    f"({manifest['scaling_factor_origin']})",
    "shift factor": f"{manifest['shift_factor']:g}",
    "latents": f"mean {statistics['mean']:.4g}, std {statistics['std']:.4g}, "
    f"RMS {statistics['rms']:.4g}",
    "channels": f"RMS {min(channels['rms']):.4g} to {max(channels['rms']):.4g}",
    "resolution": f"{manifest['resolution']} px, {_plain(manifest['crop'])}",
    "source": _plain(manifest["source"]),
    "classes": _classes(manifest["classes"]),
    "unreadable": f"{len(manifest['unreadable'])} images",
    "versions": _plain(manifest["versions"]),
  }
  table = [f"  {name:<15} {text}" for name, text in lines.items()]
  table += [
    f"    {image['key']}: {image['reason']}"
    for image in manifest["unreadable"][:20]
  ]
  return "\n".join(table)


def _classes(names: list[str]) -> str:
  if names in ([], [""]):
    return "none"
  more = ", ..." if len(names) > 8 else ""
  return f"{len(names)}: {', '.join(names[:8])}{more}"


def _plain(values: dict[str, Any]) -> str:
  return ", ".join(f"{key} {value}" for key, value in values.items())


def _verify(store: reader.Latents) -> list[str]:
  count = store.manifest["count"]
  with progress_lines.Progress(count) as progress:
    problems = store.verify(progress.add)
  state = "; ".join(problems[:10]) or "no problems"
  _LOG.info("checksums of %d rows: %s", count, state)
  return problems


def _sample(config: ConfigDict, rows: int) -> list[int]:
  rng = np.random.default_rng(config.seed)
  chosen = rng.choice(rows, min(config.samples, rows), replace=False)
  return np.sort(chosen).tolist()


def _write_samples(
  store: reader.Latents,
  ae: autoencoder.Autoencoder,
  rows: list[int],
  folder: epath.Path,
) -> None:
  """A PNG for each row, and all of them in one with their names."""
  folder.mkdir(parents=True, exist_ok=True)
  keys, count, pictures = store.keys(), store.manifest["count"], []
  for row in rows:  # one at a time: they may be large
    (pixels,) = decode.to_pixels(ae, store.read_unscaled([row]))
    metrics_writer.write_png(folder / f"row_{row:08d}.png", pixels)
    pictures.append(pixels)
    view = ", mirrored" if row >= count else ""
    _LOG.info("row %d: %s%s", row, keys[row % count], view)
  captions = [f"{row}: {os.path.basename(keys[row % count])}" for row in rows]
  together = figures.side_by_side(pictures, captions)
  metrics_writer.write_png(folder / "rows.png", together)
  _LOG.info("pictures: %s", folder / "rows.png")
