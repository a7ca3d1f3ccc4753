"""Runs side by side: a picture, a table of PSNR and SSIM, the loss curves."""

import json
import logging
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax.data import images
from dcae_jax.evaluation import figures, reconstruction
from dcae_jax.models import dcae
from dcae_jax.tasks import measuring, wiring
from dcae_jax.training import checkpoint, metrics_writer, sharding

_LOG = logging.getLogger(__name__)
_CURVES = (
  "train/loss/l1", "train/loss/lpips", "train/loss/generator",
  "train/loss/discriminator",
)  # fmt: skip

Results = dict[str, dict[int, reconstruction.Result]]


def check(config: ConfigDict, runs_are_pending: bool = False) -> None:
  """Raises ValueError for a config that cannot be run; touches no file."""
  if not config.runs:
    raise ValueError(
      "config.runs is empty; name the work directories to report"
    )
  if not config.resolutions:
    raise ValueError("config.resolutions is empty; name at least one")
  for key in ("batch_size", "samples", "threads"):
    if not config[key] >= 1:
      raise ValueError(f"config.{key}={config[key]} is below 1")
  if runs_are_pending:
    return
  for run in config.runs.values():
    model = ConfigDict(checkpoint.read_run_config(run)["model"])
    wiring.check_resolutions(config.resolutions, model)


def run(config: ConfigDict, workdir: epath.Path) -> bool:
  """Writes report.md, report.json and the two PNGs into `workdir`.

  Evaluates the averages of each run's last checkpoint.
  """
  check(config)
  wiring.check_work_directory(config, workdir)
  wiring.prepare_jax(config.compilation_cache)
  source = wiring.single_source(config.source)
  images.check_not_empty(source, images.Decoding())
  wiring.write_config(config, workdir)
  results = {
    name: _evaluate(config, run, source) for name, run in config.runs.items()
  }
  if jax.process_index() == 0:
    _write(config, workdir, results)
    _LOG.info("report: %s", workdir / "report.md")
  return True


def _evaluate(
  config: ConfigDict, run: str, source: Any
) -> dict[int, reconstruction.Result]:
  # Runs from before this key have none.
  found = {"scan": False} | checkpoint.read_run_config(run)["model"]
  model_config = ConfigDict(found)
  autoencoder = wiring.model(model_config)
  mesh = sharding.create_mesh(-1, 1, 1)
  abstract = dcae.abstract_variables(autoencoder, model_config.image_channels)
  _, variables = checkpoint.restore_variables(
    run, "ema", abstract, sharding.shardings(abstract, mesh)
  )
  reader = measuring.EvaluationImages(
    source,
    images.Decoding(model_config.image_channels),
    mesh,
    batch_size=config.batch_size,
    max_images=config.max_images,
    threads=config.threads,
  )
  networks = measuring.networks_of(autoencoder)
  evaluation = measuring.Evaluation(
    networks, reader, mesh, samples=config.samples
  )
  return {
    resolution: evaluation.measure(variables, resolution)
    for resolution in config.resolutions
  }


def _write(config: ConfigDict, workdir: epath.Path, results: Results) -> None:
  shown = config.resolutions[-1]
  first = next(iter(results.values()))
  rows = [first[shown].rows[0]]
  rows += [found[shown].rows[1] for found in results.values()]
  picture = figures.grid(rows, ["original", *results])
  metrics_writer.write_png(workdir / "reconstructions.png", picture)
  lines = {
    name: metrics_writer.read_lines(
      epath.Path(run).expanduser() / "metrics.jsonl"
    )
    for name, run in config.runs.items()
  }
  curves = figures.loss_curves(lines, _CURVES)
  (workdir / "loss_curves.png").write_bytes(curves)
  numbers = {
    name: {str(size): result.metrics for size, result in found.items()}
    for name, found in results.items()
  }
  metrics_writer.write_whole(
    workdir / "report.json", json.dumps(numbers, indent=2)
  )
  metrics_writer.write_whole(workdir / "report.md", _markdown(results, shown))


def _markdown(results: Results, shown: int) -> str:
  sizes = list(next(iter(results.values())))
  header = ["run"] + [
    f"{metric} at {size} px" for size in sizes for metric in ("PSNR", "SSIM")
  ]
  rows = [header, ["---"] * len(header)]
  for name, found in results.items():
    row = [name]
    for size in sizes:
      row.append(f"{found[size].metrics['psnr']:.2f} dB")
      row.append(f"{found[size].metrics['ssim']:.4f}")
    rows.append(row)
  table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
  return (
    "# Reconstruction of held-out photographs\n\n"
    "Averaged weights of each run's last checkpoint; means over images.\n\n"
    f"{table}\n\n"
    f"At {shown} px, originals above:\n\n"
    "![reconstructions](reconstructions.png)\n\n"
    "![loss curves](loss_curves.png)\n"
  )
