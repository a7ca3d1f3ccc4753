"""How fast small autoencoders learn: optimizers, schedules, initial values.

  python -m benchmarks.learning --workdir=runs/learning

Trains phase 1 of configs/quickstart.py once for each row of `TRIALS` and each
seed, one after the other, and writes docs/learning.md (held-out PSNR at the
end: mean and range over seeds, beside block PCA) and docs/learning.png (PSNR
over seconds of training). Runs that are finished are not run again, and one
that was stopped goes on. It needs requirements-quickstart.txt.
"""

import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys

from matplotlib.figure import Figure

from dcae_jax.training import metrics_writer

# Name to what differs from phase 1 of the quickstart.
TRIALS = {
  "quickstart": {},
  "AdamW 2e-3": {"optimizer.kind": "adamw", "optimizer.learning_rate": 2e-3},
  "AdamW 2e-3, constant, blocks from 1": {
    "optimizer.kind": "adamw",
    "optimizer.learning_rate": 2e-3,
    "optimizer.schedule": "constant",
    "initial_branch_scale": 1.0,
  },
  "blocks from 1": {"initial_branch_scale": 1.0},
  "constant rate": {"optimizer.schedule": "constant"},
}
_CURVES = ("quickstart", "AdamW 2e-3")
_SIDES = {"64 px": "eval/psnr", "128 px": "eval/128px/psnr"}


def train(name: str, seed: int, steps: int, workdir: pathlib.Path) -> None:
  """Runs a trial, or what is left of it."""
  changes = TRIALS[name] | {"seed": seed, "steps": steps}
  command = [sys.executable, "-m", "dcae_jax.main"]
  command += ["--config=configs/studies/learning.py", f"--workdir={workdir}"]
  command += [f"--config.{key}={value}" for key, value in changes.items()]
  if not (workdir / "result.json").exists():
    subprocess.run(command, check=True)


def seconds_and_psnr(workdir: pathlib.Path) -> tuple[list[float], list[float]]:
  """Of each evaluation: seconds of training before it, and its PSNR."""
  seconds, before, found = 0.0, 0, []
  for line in metrics_writer.read_lines(workdir / "metrics.jsonl"):
    if "train/steps_per_second" in line:
      steps, before = line["step"] - before, line["step"]
      seconds += steps / line["train/steps_per_second"]
    if "eval/psnr" in line:
      found.append((seconds, line["eval/psnr"]))
  return tuple(zip(*found, strict=True))


def write(runs: dict[str, list[pathlib.Path]], steps: int) -> None:
  """The table and the plot."""
  rows = []
  for name, workdirs in runs.items():
    results = [json.loads((w / "result.json").read_text()) for w in workdirs]
    minutes = [seconds_and_psnr(w)[0][-1] / 60 for w in workdirs]
    cells = [name, f"{statistics.mean(minutes):.1f}"]
    for key in _SIDES.values():
      found = [result[key] for result in results]
      mean = statistics.mean(found)
      cells.append(f"{mean:.2f} ({min(found):.2f} to {max(found):.2f})")
    rows.append(cells)
  floor = [results[0][key.replace("eval", "floor")] for key in _SIDES.values()]
  rows.append(["floor: block PCA", "", *(f"{psnr:.2f}" for psnr in floor)])
  header = ["trial", "minutes", *_SIDES]
  table = "\n".join(
    f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]
  )
  commit = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
  ).stdout.strip()
  trials = "\n".join(
    f"- {name}: {json.dumps(changes) if changes else 'as it is'}"
    for name, changes in TRIALS.items()
  )
  pathlib.Path("docs/learning.md").write_text(
    "# What makes a small autoencoder learn\n\n"
    "Made by `python -m benchmarks.learning`: phase 1 of "
    f"`configs/quickstart.py`, {steps} steps, "
    f"{len(next(iter(runs.values())))} seeds; PSNR in dB of the embedded "
    "held-out photographs, mean (least to most).\n\n"
    f"{table}\n\nCommit {commit}, {platform.machine()}, CPU. What differs from "
    f"the quickstart:\n\n{trials}\n\n"
    "![PSNR over seconds of training](learning.png)\n"
  )
  figure = Figure(figsize=(7, 4), layout="constrained")
  axes = figure.subplots()
  for color, name in enumerate(_CURVES):
    for i, workdir in enumerate(runs[name]):
      label = name if i == 0 else None
      axes.plot(*seconds_and_psnr(workdir), color=f"C{color}", label=label)
  axes.axhline(floor[0], color="grey", linestyle="--", label="block PCA")
  axes.set(xlabel="seconds of training", ylabel="held-out PSNR at 64 px, dB")
  axes.legend()
  figure.savefig("docs/learning.png", dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=400)
  args = parser.parse_args()
  runs = {
    name: [args.workdir / str(i) / str(s) for s in range(args.seeds)]
    for i, name in enumerate(TRIALS)
  }
  for seed in range(args.seeds):
    for name, workdirs in runs.items():
      train(name, seed, args.steps, workdirs[seed])
  write(runs, args.steps)


if __name__ == "__main__":
  main()
