"""What a new kind of something takes: one file, and one line in its table.

A source and a phase are here. Denoisers and conditions are in
`diffusion/test_extension.py`, families of autoencoders in
`autoencoder/test_families.py`, metrics in `evaluation/`.
"""

import hashlib
import io
import json

import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from dcae_jax.autoencoder import phases
from dcae_jax.data import sources
from dcae_jax.setup import image_sources
from dcae_jax.tasks import train_autoencoder


class Colours:
  """Squares of one colour each; `path` is their names."""

  def __init__(self, path: str):
    self._names = path.split(",")
    self.classes = ["colours"]

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> sources.Record:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48), self._names[index]).save(buffer, "PNG")
    return sources.Record(self._names[index], buffer.getvalue(), 0)

  def name(self, index: int) -> str:
    return self._names[index]

  key = name

  def fingerprint(self) -> str:
    return hashlib.sha256(repr(self._names).encode()).hexdigest()


def test_a_source_and_a_phase_are_a_line_each(
  tiny_config, tmp_path, monkeypatch
):
  """Only the biases of the decoder learn, from squares of a colour."""
  monkeypatch.setitem(sources.KINDS, "colours", Colours)
  phase = phases.Phase(from_scratch=True)
  monkeypatch.setitem(phases.PHASES, "bias_tuning", phase)
  config = tiny_config(
    phase="bias_tuning", trainable=("decoder/*/bias",), steps=1,
  )  # fmt: skip
  for c in (config.data.source, config.evaluation.source):
    c.kind, c.path = "colours", "red,green,blue,white"
  assert train_autoencoder.run(config, epath.Path(tmp_path))
  result = json.loads((tmp_path / "result.json").read_text())
  assert 0 < result["parameters_trained"] < result["parameters"] / 10
  assert result["images_skipped"] == 0


def test_a_source_that_needs_an_unknown_key_is_refused(monkeypatch):
  monkeypatch.setitem(sources.KINDS, "cloud", lambda bucket: None)
  with pytest.raises(ValueError, match=r"'cloud' needs bucket, .*: kind, path"):
    image_sources.whole(ConfigDict({"kind": "cloud", "path": ""}))
