"""What a user names is opened if it is a regular file, and only then."""

import os

import pytest
from etils import epath

from dcae_jax.autoencoder.weights import safetensors_files, torch_files
from dcae_jax.evaluation import fid, prompts
from dcae_jax.evaluation.networks import pretrained
from dcae_jax.evaluation.report import evaluation_report
from dcae_jax.latents import decode
from dcae_jax.runs import (
  metrics_writer,
  regular_files,
  storage,
  work_directory,
)

READERS = {
  "config.json": [
    lambda file: work_directory.is_run(str(file.parent)),
    lambda file: work_directory.read_run_config(str(file.parent)),
  ],
  "metrics.jsonl": [lambda file: metrics_writer.read_lines(epath.Path(file))],
  "0.png": [lambda file: metrics_writer.read_png(epath.Path(file))],
  "latents.json": [lambda file: decode.read_description(str(file.parent))],
  "result.json": [
    lambda file: evaluation_report.read([epath.Path(file.parent)])
  ],
  "manifest.json": [
    lambda file: storage.Storage(str(file.parent)).read(file.name),
    lambda file: storage.Storage(str(file.parent)).read_all([file.name]),
  ],
  "array/zarr.json": [
    lambda file: storage.Storage(str(file.parent.parent)).open_array("array")
  ],
  "model.safetensors": [
    lambda file: safetensors_files.headers(
      safetensors_files.find(str(file))[0]
    ),
    lambda file: safetensors_files.headers(
      safetensors_files.find(str(file.parent))[0]
    ),
  ],
  "model.safetensors.index.json": [
    lambda file: safetensors_files.find(str(file.parent))
  ],
  "weights.pt": [torch_files.read, pretrained.sha256],
  "statistics.npz": [lambda file: fid.load_statistics(file, 2048)],
  "prompts.txt": [prompts.read],
}


def _place(file, kind):
  if kind == "pipe":
    os.mkfifo(file)
  else:
    file.symlink_to("/dev/null")


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
  ("name", "read"), [(name, read) for name in READERS for read in READERS[name]]
)
def test_pipes_and_devices_are_refused(name, read, kind, tmp_path):
  (tmp_path / name).parent.mkdir(exist_ok=True)
  _place(tmp_path / name, kind)
  with pytest.raises(ValueError, match="no regular file"):
    read(tmp_path / name)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_config_beside_weights_is_a_regular_file(kind, tmp_path):
  (tmp_path / "model.safetensors").write_bytes(b"")
  _place(tmp_path / "config.json", kind)
  with pytest.raises(ValueError, match="no regular file"):
    safetensors_files.find(str(tmp_path))


def test_files_links_and_what_is_missing_go_on(tmp_path):
  (tmp_path / "file").write_text("text")
  (tmp_path / "link").symlink_to("file")
  (tmp_path / "dangling").symlink_to("nothing")
  others = (tmp_path, tmp_path / "missing", "gs://bucket/file")
  for path in (*tmp_path.iterdir(), *others):
    assert regular_files.checked(path) is path
