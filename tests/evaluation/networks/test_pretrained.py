import hashlib
import pathlib

import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants

from dcae_jax.autoencoder.weights import safetensors_files
from dcae_jax.evaluation.networks import pretrained

SHAPES = {"a.weight": (2, 3), "a.bias": (2,)}
ARRAYS = {
  "a.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
  "a.bias": np.array([1, 2]),
}


def _load(path, published="0" * 64, **options):
  return pretrained.load(
    path,
    SHAPES,
    published,
    "the network",
    "run: something",
    ignored=r"extra\..*",
    **options,
  )


@pytest.fixture
def files(tmp_path):
  """A function that writes arrays to both kinds of files."""

  def write(arrays):
    paths = [tmp_path / "weights.npz", tmp_path / "weights.safetensors"]
    np.savez(paths[0], **arrays)
    safetensors.numpy.save_file(arrays, paths[1])
    return paths

  return write


def test_converted_files_are_taken_and_told_from_the_published(files):
  for path in files(ARRAYS | {"extra.weight": np.zeros(3)}):
    found = _load(path)
    assert found.file == str(path) and not found.is_published
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(found.parameters) == list(SHAPES)
    for name, array in found.parameters.items():
      assert array.dtype == np.float32
      np.testing.assert_array_equal(array, ARRAYS[name])
    assert _load(path, published=found.sha256).is_published


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"a.weight": np.zeros((3, 2))}, "mis-shaped: a.weight$"),
    ({"b.weight": np.zeros(1)}, "mis-shaped: b.weight$"),
    ({"a.bias": np.array([True, False])}, "mis-shaped: a.bias$"),
    ({f"b.{i}": np.zeros(1) for i in range(10)}, r"b.7 and 2 more$"),
  ],
)
def test_other_names_shapes_and_kinds_are_refused(changes, named, files):
  for path in files(ARRAYS | changes):
    with pytest.raises(ValueError, match=f"does not hold the network.*{named}"):
      _load(path)


def test_missing_tensors_are_named(files):
  for path in files({"a.bias": ARRAYS["a.bias"]}):
    with pytest.raises(ValueError, match=r"missing.*: a\.weight$"):
      _load(path)


def test_damaged_and_missing_files_are_refused(files, tmp_path):
  for path in files(ARRAYS):
    data = path.read_bytes()
    for end in (0, 1, 9, 100, len(data) - 1):
      path.write_bytes(data[:end])
      with pytest.raises(ValueError, match=f"{path} is not a readable"):
        _load(path)
    with pytest.raises(ValueError, match="there is no file"):
      _load(path.with_stem("other"))
  with pytest.raises(ValueError, match="cannot read"):
    _load(tmp_path)


def test_a_file_with_another_hash_is_refused_before_it_is_read(tmp_path):
  path = tmp_path / "weights.pth"
  path.write_bytes(b"anything")
  found = hashlib.sha256(b"anything").hexdigest()
  with pytest.raises(ValueError, match=f"{found}.*{'0' * 64}; run: something"):
    _load(path)


@pytest.fixture
def pickled(tmp_path, monkeypatch):
  """Loads what stands for a published pickle, and notes when it is read."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  path, read = tmp_path / "weights.ckpt", []
  path.write_bytes(b"a pickle")
  digest = hashlib.sha256(b"a pickle").hexdigest()

  def load():
    found = _load(path, digest, read=lambda file: read.append(file) or ARRAYS)
    assert (found.file, found.sha256) == (str(path), digest)
    assert found.is_published
    for name, array in found.parameters.items():
      np.testing.assert_array_equal(array, ARRAYS[name])
    return len(read)

  return load


def _cached(tmp_path):
  (file,) = (tmp_path / "cache/dcae_jax/weights").iterdir()
  return file


def test_a_pickle_is_read_once_and_its_arrays_from_the_cache(pickled, tmp_path):
  assert [pickled(), pickled()] == [1, 1]
  file = _cached(tmp_path)
  source, own, _ = file.name.split(".")
  assert source == hashlib.sha256(b"a pickle").hexdigest()
  assert own == hashlib.sha256(file.read_bytes()).hexdigest()
  stored = safetensors.numpy.load_file(file)
  assert {k: x.dtype for k, x in stored.items()} == {
    k: x.dtype for k, x in ARRAYS.items()
  }


@pytest.mark.parametrize("damage", [b"", b"anything"])
def test_a_damaged_file_in_the_cache_is_made_again(damage, pickled, tmp_path):
  pickled()
  file = _cached(tmp_path)
  whole = file.read_bytes()
  for data in (damage, whole[:-1] + bytes([whole[-1] ^ 1])):
    file.write_bytes(data)
    before = pickled()
    assert _cached(tmp_path).read_bytes() == whole
    assert pickled() == before
  assert before == 3


def test_a_cache_that_cannot_be_written_is_no_error(pickled, tmp_path):
  (tmp_path / "cache").write_text("no directory")
  assert [pickled(), pickled()] == [1, 2]


def test_hub_ids_are_a_repository_or_a_file_in_it(tmp_path, monkeypatch):
  """In the cache of the hub's client, without a network."""
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  repository = tmp_path / "models--owner--name"
  snapshot = repository / "snapshots" / ("0" * 40)
  snapshot.mkdir(parents=True)
  (repository / "refs").mkdir()
  (repository / "refs/main").write_text("0" * 40)
  safetensors.numpy.save_file(ARRAYS, snapshot / "model.safetensors")
  for path in ("owner/name", "owner/name/model.safetensors"):
    found = safetensors_files.find_file(path)
    assert found.samefile(snapshot / "model.safetensors")
    np.testing.assert_array_equal(
      _load(found).parameters["a.bias"], ARRAYS["a.bias"]
    )
  with pytest.raises(ValueError, match=r"owner/other.*hub did not give it"):
    safetensors_files.find_file("owner/other/a.npz")
  # No repositories, but files that are missing here.
  for path in ("name.npz", "folder/name.npz", "/a/b/c.npz", "../a/b.ckpt"):
    assert safetensors_files.find_file(path) == pathlib.Path(path)


def test_folding_is_normalising_after_the_convolution():
  rng = np.random.default_rng(0)
  tensors = {
    name: rng.uniform(0.5, 1.5, shape).astype(np.float32)
    for name, shape in {
      "conv.weight": (5, 3, 1, 2),
      **pretrained.batch_norm_shapes("norm", 5),
    }.items()
  }
  patch = rng.normal(size=(1, 2, 3))  # one position's inputs, HWI
  convolved = np.einsum("hwi,oihw->o", patch, tensors["conv.weight"])
  expected = (convolved - tensors["norm.running_mean"]) / np.sqrt(
    tensors["norm.running_var"] + 0.1
  ) * tensors["norm.weight"] + tensors["norm.bias"]
  kernel, bias = pretrained.fold_batch_norm(tensors, "conv", "norm", 0.1)
  assert kernel.dtype == bias.dtype == np.float32
  found = np.einsum("hwi,hwio->o", patch, kernel) + bias
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_cache_is_where_the_environment_says(monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
  assert pretrained.cache_directory() == pathlib.Path("/somewhere/dcae_jax")
  for unset in (
    lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""),
    lambda: monkeypatch.delenv("XDG_CACHE_HOME"),
  ):
    unset()
    expected = pathlib.Path.home() / ".cache/dcae_jax"
    assert pretrained.cache_directory() == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300, -1.0])
def test_values_that_cannot_be_are_refused(value, tmp_path):
  name = "bn.running_var"
  with pytest.raises(ValueError, match=rf"{name} in .*not finite, or negative"):
    pretrained.checked(
      {name: np.array([1.0, value])}, {name: (2,)}, tmp_path, "a network"
    )
