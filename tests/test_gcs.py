"""A work directory and images in a bucket, on a local emulator."""

import json
import subprocess
import sys

from conftest import REPOSITORY, config_file


def _python(environment, *arguments):
  found = subprocess.run(
    [sys.executable, *arguments],
    cwd=REPOSITORY,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  assert found.returncode == 0, found.stderr
  return found.stdout


def test_a_run_lives_in_a_bucket(
  emulator, photographs, tiny_config, compilation_cache, tmp_path
):
  environment, root = emulator.environment, emulator.create("dcae-test")
  copy = (
    "import sys, pathlib\n"
    "from etils import epath\n"
    "for path in pathlib.Path(sys.argv[1]).rglob('*.png'):\n"
    "  to = epath.Path(sys.argv[2]) / path.parent.name / path.name\n"
    "  to.write_bytes(path.read_bytes())\n"
  )
  _python(environment, "-c", copy, str(photographs), f"{root}/images")
  changes = {
    "data.source.path": f"{root}/images",
    "evaluation.source.path": f"{root}/images",
  }
  file = config_file(tmp_path / "phase1.py", tiny_config(1, **changes))
  command = ["-m", "dcae_jax.main", f"--config={file}"]
  workdir = f"--workdir={root}/runs/phase1"
  _python(environment, *command, workdir, "--config.steps=2")
  _python(environment, *command, workdir, "--config.steps=4")
  # Another run takes the parameters from there.
  tuned = [f"--workdir={root}/runs/tuned", "--config.steps=1"]
  tuned.append(f"--config.init_from={root}/runs/phase1")
  _python(environment, *command, *tuned)
  show = (
    "import json, sys\n"
    "from etils import epath\n"
    "run = epath.Path(sys.argv[1])\n"
    "print(json.dumps({\n"
    "  'names': sorted(path.name for path in run.iterdir()),\n"
    "  'result': json.loads((run / 'result.json').read_text()),\n"
    "  'metrics': (run / 'metrics.jsonl').read_text(),\n"
    "}))\n"
  )
  found = json.loads(_python(environment, "-c", show, f"{root}/runs/phase1"))
  expected = {"checkpoints", "config.json", "metrics.jsonl", "samples"}
  assert expected <= set(found["names"])
  lines = [json.loads(line) for line in found["metrics"].splitlines()]
  steps = [x["step"] for x in lines if "train/loss/l1" in x]
  assert steps == [1, 2, 3, 4] and found["result"]["step"] == 4
  # It is evaluated into the bucket, and again over what is there.
  command = ["-m", "dcae_jax.main", "--config=configs/f32_evaluate.py"]
  flags = {
    "init_from": f"{root}/runs/phase1",
    "source.path": f"{root}/images",
    "resolutions": "(32,)",
    "metrics": "()",
    "extremes": 1,
    "compilation_cache": compilation_cache,
  }
  flags = [f"--config.{key}={value}" for key, value in flags.items()]
  workdir = f"--workdir={root}/runs/evaluation"
  for samples in (3, 1):
    samples = f"--config.samples={samples}"
    _python(environment, *command, workdir, *flags, samples)
  show = (
    "import json, sys\n"
    "from etils import epath\n"
    "run = epath.Path(sys.argv[1])\n"
    "shown = (run / 'pictures' / '32px').iterdir()\n"
    "print(json.dumps({\n"
    "  'result': json.loads((run / 'result.json').read_text()),\n"
    "  'page': (run / 'report' / 'index.html').read_text(),\n"
    "  'pictures': sorted(path.name for path in shown),\n"
    "}))\n"
  )
  found = json.loads(
    _python(environment, "-c", show, f"{root}/runs/evaluation")
  )
  assert found["result"]["resolutions"]["32"]["images"] == 12
  shown = {name[:7] for name in found["pictures"] if name[0] == "0"}
  assert len(shown) <= 3  # the first, the worst and the best
  assert found["page"].count("<figure") == 3


def test_tfds_datasets_are_checked_in_a_bucket(emulator):
  code = (
    "import json, sys\n"
    "import tensorflow_datasets as tfds\n"
    "from etils import epath\n"
    "from dcae_jax.data import sources\n"
    "root = epath.Path(sys.argv[1])\n"
    "split = {'name': 'train', 'shardLengths': ['7'], 'filepathTemplate':\n"
    "  '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'}\n"
    "info = {'name': 'one', 'version': '1.0.0', 'splits': [split],\n"
    "  'fileFormat': 'array_record'}\n"
    "(root / 'one/1.0.0/dataset_info.json').write_text(json.dumps(info))\n"
    "features = tfds.features.FeaturesDict({'image': tfds.features.Image()})\n"
    "features.save_config(str(root / 'one/1.0.0'))\n"
    "print(len(sources.tfds('one', 'train', str(root))))\n"
    "file = root / 'one/1.0.0/features.json'\n"
    "text = file.read_text().replace('tensorflow_datasets', 'elsewhere')\n"
    "file.write_text(text)\n"
    "try:\n"
    "  sources.tfds('one', 'train', str(root))\n"
    "except ValueError as error:\n"
    "  print(error)\n"
  )
  root = emulator.create("dcae-tfds")
  first, second = _python(emulator.environment, "-c", code, root).splitlines()
  assert first == "7"
  assert "elsewhere.core" in second and "code that data name" in second
