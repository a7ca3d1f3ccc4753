import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from benchmarks import metric_networks
from dcae_jax.evaluation.networks import inception, pretrained


@pytest.fixture(scope="module")
def random_file(tmp_path_factory):
  folder = tmp_path_factory.mktemp("weights")
  return metric_networks.random_file("inception", folder)


@pytest.fixture(scope="module")
def parameters(random_file):
  return inception.load(random_file).parameters


@pytest.mark.parametrize("case", range(len(metric_networks.STORED_SHAPES)))
def test_features_and_logits_are_those_of_pytorch_fid(case, parameters):
  """Stored by `python -m benchmarks.metric_networks --store`."""
  images = metric_networks.random_images(metric_networks.STORED_SHAPES[case])
  found = jax.jit(inception.features)(parameters, images)
  with np.load(metric_networks.stored("inception")) as stored:
    for i, array in enumerate(found):
      assert array.dtype == np.float32
      assert metric_networks.error(array, stored[f"{case}/{i}"]) < 1e-5


def _interpolated(rows, side):
  """One axis, in float64: positions are the centres of the pixels."""
  size = rows.shape[0]
  centres = (np.arange(side) + 0.5) * size / side - 0.5
  columns = rows.reshape(size, -1).T
  resized = [np.interp(centres, np.arange(size), c) for c in columns]
  return np.stack(resized, axis=1).reshape(side, *rows.shape[1:])


@pytest.mark.parametrize("size", [(1, 2), (64, 300), (299, 597), (1024, 31)])
def test_resizing_interpolates_between_two_pixels_of_an_axis(size):
  images = np.random.default_rng(0).uniform(0, 255, (1, *size, 2))
  found = inception._resize(jnp.asarray(images, "float32"))[0]
  rows = _interpolated(images[0], inception.SIDE)
  expected = _interpolated(rows.swapaxes(0, 1), inception.SIDE).swapaxes(0, 1)
  # The positions are float32, as in the reference.
  np.testing.assert_allclose(found, expected, atol=0.05)


def test_images_of_the_networks_size_are_not_resized():
  images = jnp.asarray(metric_networks.random_images((1, 299, 299, 3)))
  np.testing.assert_array_equal(inception._resize(images), images)


def test_converted_files_give_the_same_parameters(
  random_file, parameters, tmp_path
):
  with np.load(random_file) as archive:
    tensors = dict(archive)
  name = "Mixed_5b.branch1x1.bn.num_batches_tracked"
  tensors |= {name: np.array(3), "AuxLogits.fc.bias": np.zeros(1000)}
  path = tmp_path / "weights.safetensors"
  safetensors.numpy.save_file(tensors, path)
  found = inception.load(str(path))
  assert not found.is_published and found.file == str(path)
  assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
  assert found.parameters.keys() == parameters.keys()
  for name, array in found.parameters.items():
    np.testing.assert_array_equal(array, parameters[name])


def test_other_files_are_refused(tmp_path):
  path = tmp_path / inception.FILE
  path.write_bytes(b"<html>")
  digest = hashlib.sha256(b"<html>").hexdigest()
  message = f"{digest}.*{inception.SHA256}.*curl -L"
  with pytest.raises(ValueError, match=message):
    inception.load(str(path))
  path = tmp_path / "other.npz"
  np.savez(path, **{"fc.weight": np.zeros((1000, 2048), np.float32)})
  with pytest.raises(ValueError, match=r"Conv2d_1a_3x3\.bn\.bias.* more"):
    inception.load(str(path))
  with pytest.raises(ValueError, match="no file"):
    inception.load(str(tmp_path / "missing.pth"))


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  with pytest.raises(pretrained.AbsentWeightsError) as info:
    inception.load()
  cached = tmp_path / "dcae_jax" / inception.FILE
  command = f"curl -L --create-dirs -o {cached} {inception.URL}"
  assert str(info.value).endswith(command)
  cached.parent.mkdir()
  cached.write_bytes(b"")
  with pytest.raises(ValueError, match=r"sha256.*curl -L"):
    inception.load()
