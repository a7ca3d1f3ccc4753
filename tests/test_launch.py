import os
import shlex
import subprocess

import pytest
from conftest import REPOSITORY

LAUNCH = REPOSITORY / "launch"
RUN = (
  "run", "pod", "--", "--config=configs/f64_phase1.py",
  "--workdir=gs://bucket/run", "--config.trainable=('a b',)",
)  # fmt: skip


def _run(script, *arguments, **environment):
  return subprocess.run(
    ["bash", str(LAUNCH / script), *arguments],
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def _commands(output: str) -> list[list[str]]:
  return [
    shlex.split(line[2:])
    for line in output.splitlines()
    if line.startswith("+ ")
  ]


def test_scripts_are_short_and_shellcheck_finds_nothing():
  scripts = sorted(LAUNCH.glob("*.sh"))
  found = subprocess.run(
    ["shellcheck", "-x", *map(str, scripts)],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=False,
  )
  assert found.returncode == 0, found.stdout
  for path in (*scripts, LAUNCH / "Dockerfile"):
    assert len(path.read_text().splitlines()) <= 60, path


def test_a_dry_run_prints_the_life_of_a_slice():
  found = _run("tpu_vm.sh", "--dry-run", *RUN, ZONE="zone", PROJECT="mine")
  assert found.returncode == 0, found.stderr
  commands = _commands(found.stdout)
  named = [" ".join(c[:5]) for c in commands if c[0] == "gcloud"]
  assert named == [
    "gcloud compute tpus queued-resources create",
    "gcloud compute tpus tpu-vm scp",
    "gcloud compute tpus tpu-vm ssh",
    "gcloud compute tpus tpu-vm ssh",
    "gcloud storage ls gs://bucket/run/result.json",
    "gcloud compute tpus queued-resources delete",
  ]
  for command in commands:
    if command[:3] == ["gcloud", "compute", "tpus"]:
      assert {"--zone=zone", "--project=mine"} <= set(command)
  assert "--spot" in commands[0]
  train = next(x for x in commands[4] if x.startswith("--command="))
  assert shlex.split(train)[-3:] == [*RUN[3:]]


def test_spot_can_be_left_out():
  found = _run("tpu_vm.sh", "--dry-run", *RUN, SPOT="")
  assert found.returncode == 0 and "--spot" not in found.stdout


@pytest.mark.parametrize(
  "script, arguments",
  [
    ("tpu_vm.sh", ()),
    ("tpu_vm.sh", ("dance", "pod")),
    ("tpu_vm.sh", ("run",)),
    ("tpu_vm.sh", ("run", "pod", "--", "--workdir=/local")),
    ("slurm.sh", ()),
    ("slurm.sh", ("--config=configs/f64_phase1.py",)),
  ],
)
def test_what_is_missing_is_said_before_anything_runs(script, arguments):
  found = _run(script, *arguments)
  assert found.returncode == 2 and found.stderr
  assert not _commands(found.stdout)


# A cloud that takes the first slice away while it trains.
_GCLOUD = """#!/usr/bin/env bash
echo "$@" >> "$LOG"
case "$*" in
  *describe*) cat "$LOG.state" 2>/dev/null ;;
  *"queued-resources create"*) echo ACTIVE > "$LOG.state" ;;
  *"queued-resources delete"*) rm "$LOG.state" ;;
  *dcae_jax.main*)
    if [ -e "$LOG.preempted" ]; then touch "$LOG.done"; exit 0; fi
    touch "$LOG.preempted"; echo "$AFTER" > "$LOG.state"; exit "$STATUS" ;;
  *"storage ls"*) [ -e "$LOG.done" ] ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
  """A function: runs the script on it; also what the cloud was told."""
  for name, text in (("gcloud", _GCLOUD), ("sleep", "#!/bin/sh\n")):
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  log = tmp_path / "log"

  def run(**environment):
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    found = _run("tpu_vm.sh", *RUN, PATH=path, LOG=str(log), **environment)
    kinds = ("create", "delete", "scp", "dcae_jax.main")
    told = [
      kind
      for line in log.read_text().splitlines()
      for kind in kinds
      if f"{kind} " in f"{line} " and "pip install" not in line
    ]
    return found, told

  return run


@pytest.mark.parametrize("status", ["1", "0"])
def test_after_a_preemption_a_new_slice_goes_on(cloud, status):
  """Whether the connection broke, or SIGTERM let the run leave with 0."""
  found, told = cloud(AFTER="SUSPENDED", STATUS=status)
  assert found.returncode == 0, found.stderr
  once = ["create", "scp", "dcae_jax.main", "delete"]
  assert told == once * 2


def test_an_error_of_the_run_keeps_the_slice_and_does_not_repeat(cloud):
  found, told = cloud(AFTER="ACTIVE", STATUS="2")
  assert found.returncode == 1 and "pod is kept" in found.stderr
  assert told == ["create", "scp", "dcae_jax.main"]


def test_slurm_starts_a_process_for_each_gpu_and_queues_itself_again(tmp_path):
  arguments = ("--config=configs/f64_phase1.py", f"--workdir={tmp_path}")
  found = _run("slurm.sh", "--dry-run", *arguments, VENV=str(tmp_path / "v"))
  assert found.returncode == 0, found.stderr
  commands = _commands(found.stdout)
  srun = next(c for c in commands if c[0] == "srun")
  assert srun[-2:] == list(arguments) and "dcae_jax.main" in srun
  assert commands[-1][:2] == ["scontrol", "requeue"]
  text = (LAUNCH / "slurm.sh").read_text()
  assert "--ntasks-per-node=8" in text and "--gpus-per-node=8" in text


def test_the_image_holds_what_the_command_needs():
  text = (LAUNCH / "Dockerfile").read_text()
  for name in ("configs", "dcae_jax", "requirements-${ACCELERATOR}.txt"):
    assert f"COPY {name}" in text
  for accelerator in ("cuda12", "tpu"):
    assert (REPOSITORY / f"requirements-{accelerator}.txt").exists()
  assert 'ENTRYPOINT ["python", "-m", "dcae_jax.main"]' in text
