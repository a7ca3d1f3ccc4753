"""How fast small autoencoders learn, and what the GAN of phase 3 does to them.

  python -m benchmarks.learning --workdir=runs/learning

Trains phase 1 of configs/quickstart.py once for each row of `TRIALS` and each
seed, then phase 3 for each row of `REFINEMENTS`, from the first trial of the
same seed. Writes docs/learning.md (at the end: mean and range over seeds,
beside block PCA) and docs/learning.png (held-out PSNR over seconds of
training). Runs that are finished are not run again, and one that was stopped
goes on. It needs requirements-quickstart.txt. An accelerator may train several
at once; set XLA_PYTHON_CLIENT_PREALLOCATE=false, so that they share its memory.
"""

import argparse
import concurrent.futures
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any

import jax
from matplotlib.figure import Figure

from dcae_jax.evaluation.report import text_table
from dcae_jax.runs import metrics_writer

_ADAMW = {"optimizer.kind": "adamw", "optimizer.learning_rate": 2e-3}
# Name to what differs from phase 1 of the quickstart.
TRIALS = {
  "quickstart": {},
  "no weight decay": {"optimizer.weight_decay": 0.0},
  "cosine": {"optimizer.schedule": "cosine", "optimizer.decay_steps": 0},
  "blocks from 1": {"initial_branch_scale": 1.0},
  "batch norm": {"model.variant": "tiny-f8"},
  "AdamW": _ADAMW,
}
# Name to what differs from phase 3 of the quickstart.
REFINEMENTS = {
  "quickstart": {},
  "no GAN": {"discriminator.weight": 0.0},
  "discriminator's rate 1e-3": {"discriminator.learning_rate": 1e-3},
}
_CURVES = ("quickstart", "AdamW")
_PSNR = {"PSNR, 64 px": "eval/psnr", "PSNR, 128 px": "eval/128px/psnr"}
_LPIPS = {"LPIPS, 64 px": "eval/lpips", "LPIPS, 128 px": "eval/128px/lpips"}

Runs = dict[str, list[pathlib.Path]]


def train(phase: int, changes: dict[str, Any], workdir: pathlib.Path) -> None:
  """Runs a trial, or what is left of it: a finished one ends at once."""
  command = [sys.executable, "-m", "dcae_jax.main", f"--workdir={workdir}"]
  command += [f"--config=configs/studies/learning.py:{phase}"]
  command += [f"--config.{key}={value}" for key, value in changes.items()]
  subprocess.run(command, check=True)


def _lines(workdir: pathlib.Path) -> list[dict[str, float]]:
  return list(metrics_writer.read_lines(workdir / "metrics.jsonl"))


def seconds_and_psnr(workdir: pathlib.Path) -> tuple[list[float], list[float]]:
  """Of each evaluation: seconds of training before it, and its PSNR."""
  lines = _lines(workdir)
  seconds = metrics_writer.seconds_of_training(lines)
  found = [
    (before, line["eval/psnr"])
    for before, line in zip(itertools.accumulate(seconds), lines, strict=True)
    if "eval/psnr" in line
  ]
  return tuple(zip(*found, strict=True))


def discriminator_loss(workdir: pathlib.Path) -> float:
  """The mean over the last quarter of a run."""
  lines = [x for x in _lines(workdir) if "train/loss/discriminator" in x]
  lines = lines[-(len(lines) // 4) :]
  return statistics.mean(x["train/loss/discriminator"] for x in lines)


def _cell(values: list[float], digits: int) -> str:
  low, mean, high = min(values), statistics.mean(values), max(values)
  if len(values) == 1:
    return f"{mean:.{digits}f}"
  return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _results(workdirs: list[pathlib.Path]) -> list[dict[str, float]]:
  return [json.loads((w / "result.json").read_text()) for w in workdirs]


def _measured(results: list[dict[str, float]]) -> list[str]:
  return [
    _cell([result[key] for result in results], digits)
    for keys, digits in ((_PSNR, 2), (_LPIPS, 4))
    for key in keys.values()
  ]


def _differences(trials: dict[str, dict[str, Any]]) -> str:
  return "\n".join(
    f"- {name}: `{json.dumps(changes)}`"
    for name, changes in trials.items()
    if changes
  )


def write(trials: Runs, refinements: Runs, folder: pathlib.Path) -> None:
  """The tables and the plot."""
  rows = []
  for name, workdirs in trials.items():
    results = _results(workdirs)
    seconds = [seconds_and_psnr(w)[0][-1] for w in workdirs]
    rows.append([name, _cell(seconds, 0), *_measured(results)])
  floor = {
    key: value for key, value in results[0].items() if key.startswith("floor/")
  }
  floors = [{key.replace("floor", "eval"): x for key, x in floor.items()}]
  rows.append(["floor: block PCA", "", *_measured(floors)])
  steps, seeds = results[0]["step"], len(results)
  learning = text_table.markdown([["trial", "seconds", *_PSNR, *_LPIPS], *rows])
  rows = [
    [
      name,
      _cell([discriminator_loss(w) for w in workdirs], 2),
      *_measured(_results(workdirs)),
    ]
    for name, workdirs in refinements.items()
  ]
  header = ["trial", "discriminator's loss", *_PSNR, *_LPIPS]
  refining = text_table.markdown([header, *rows])
  commit = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
  ).stdout.strip()
  (folder / "learning.md").write_text(
    "# What makes a small autoencoder learn\n\n"
    "Made by `python -m benchmarks.learning`. PSNR in dB and LPIPS of the "
    f"embedded held-out photographs: mean over {seeds} seeds, and range. "
    f"Commit {commit}; {jax.devices()[0].device_kind}; seconds are those of "
    "training alone. The rate falls over the last quarter of the steps.\n\n"
    f"## Phase 1, {steps} steps\n\n{learning}\n\n"
    "What differs from `configs/quickstart.py`:\n\n"
    f"{_differences(TRIALS)}\n\n"
    "![PSNR over seconds of training](learning.png)\n\n"
    f"## Phase 3, from the first trial's weights\n\n{refining}\n\n"
    "The discriminator's loss is the mean over the last quarter: 1 where it "
    "tells nothing apart, 0 where it is never wrong.\n\n"
    f"{_differences(REFINEMENTS)}\n"
  )
  figure = Figure(figsize=(7, 4), layout="constrained")
  axes = figure.subplots()
  for color, name in enumerate(_CURVES):
    for i, workdir in enumerate(trials[name]):
      label = name if i == 0 else None
      axes.plot(*seconds_and_psnr(workdir), color=f"C{color}", label=label)
  axes.axhline(
    floor["floor/psnr"], color="grey", linestyle="--", label="block PCA"
  )
  axes.set(xlabel="seconds of training", ylabel="held-out PSNR at 64 px, dB")
  axes.legend()
  figure.savefig(folder / "learning.png", dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--docs", type=pathlib.Path, default="docs")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=300, help="of phase 1")
  parser.add_argument("--at_once", type=int, default=1, help="runs")
  args = parser.parse_args()
  seeds = range(args.seeds)
  sizes = {"steps": args.steps, "optimizer.decay_steps": args.steps // 4}
  runs = lambda kind, names: {
    name: [args.workdir / kind / name / str(seed) for seed in seeds]
    for name in names
  }
  trials = runs("trials", TRIALS)
  refinements = runs("refinements", REFINEMENTS)
  first = next(iter(trials.values()))
  with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
    jobs = [
      pool.submit(
        train,
        1,
        sizes | TRIALS[name] | {"seed": seed},
        workdirs[seed],
      )
      for seed in seeds
      for name, workdirs in trials.items()
    ]
    for job in jobs:
      job.result()
    jobs = [
      pool.submit(
        train,
        3,
        REFINEMENTS[name] | {"seed": seed, "init_from": first[seed]},
        workdirs[seed],
      )
      for seed in seeds
      for name, workdirs in refinements.items()
    ]
    for job in jobs:
      job.result()
  write(trials, refinements, args.docs)


if __name__ == "__main__":
  main()
