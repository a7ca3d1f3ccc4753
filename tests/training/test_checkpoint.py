"""Checkpoints that are damaged, on a state of a few small arrays."""

import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from dcae_jax.training import checkpoint, digests, state

_FLIPS = 40
# tensorstore answers to an event loop that orbax has left after an error.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


def _state(step):
  rng = np.random.default_rng(step)
  params = {
    "kernel": jnp.float32(rng.normal(size=(64, 64))),
    "bias": jnp.ones(2),
  }
  return state.TrainState(
    step=jnp.int32(step),
    params=params,
    batch_stats={},
    ema={"params": jax.tree.map(lambda x: x / 2, params), "batch_stats": {}},
    optimizer=[params],
  )


_ABSTRACT = jax.eval_shape(lambda: _state(0))
_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
_SHARDINGS = jax.tree.map(lambda _: _DEVICE, _ABSTRACT)


@pytest.fixture
def run(tmp_path):
  """With checkpoints of the steps 1 and 2, of which 2 was evaluated."""
  checkpoints = checkpoint.Checkpoints(epath.Path(tmp_path), keep=3)
  for step in (1, 2):
    checkpoints.save(step, _state(step), {"next_batch": step}, {"step": 0})
  checkpoints.add_evaluation(2, {"step": 2, "eval/latent_rms": 0.5})
  checkpoints.close()
  return tmp_path


def _restore(run):
  checkpoints = checkpoint.Checkpoints(epath.Path(run), keep=3)
  try:
    return checkpoints.restore(_ABSTRACT, _SHARDINGS)
  finally:
    checkpoints.close()


def _load(run):
  """The averages of the last whole checkpoint, with its step."""
  abstract, placed = _ABSTRACT.ema, _SHARDINGS.ema
  return checkpoint.restore_variables(str(run), "ema", abstract, placed)


def _is_state_of(step, found):
  expected = jax.tree.leaves(_state(step))
  return all(map(np.array_equal, expected, jax.tree.leaves(found)))


def _files(run):
  folder = run / "checkpoints" / "2"
  return sorted(
    x for x in folder.rglob("*") if x.is_file() and x.stat().st_size
  )


def test_a_flipped_bit_is_noticed_or_changes_nothing(run, caplog):
  rng = np.random.default_rng(0)
  items = ("ema", "digests")
  files = [x for x in _files(run) if x.relative_to(run).parts[2] in items]
  noticed = 0
  for flip in range(_FLIPS):
    file = files[flip % len(files)]
    if flip % 2:  # where most of the bytes are, which have no checksum
      file = max(files, key=lambda x: x.stat().st_size)
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
    file.write_bytes(damaged)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      step, variables = _load(run)
    expected = _state(step).ema
    assert jax.tree.all(jax.tree.map(np.array_equal, expected, variables))
    if step == 1:
      noticed += 1
      assert "checkpoints/2 is damaged" in caplog.text
      assert "going back to step 1" in caplog.text
      assert "bound method" not in caplog.text
    file.write_bytes(whole)
  assert noticed > _FLIPS / 8  # orbax keeps much that nothing is read from


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(run):
  arrays = max(_files(run), key=lambda x: x.stat().st_size)
  data = bytearray(arrays.read_bytes())
  for i in range(len(data)):
    data[i] ^= 1
  arrays.write_bytes(data)
  for _ in range(2):  # once it is put aside, it is no longer in the way
    step, found, position = _restore(run)
    assert step == 1 and position == {"next_batch": 1}
    assert _is_state_of(1, found)
  names = os.listdir(run / "checkpoints")
  assert sorted(names) == ["1", "damaged_2"]


@pytest.mark.parametrize("item", ["data", "measured"])
def test_a_changed_position_is_damage(run, item):
  """It is valid JSON, of another number."""
  file = run / "checkpoints" / "2" / item / "metadata"
  text = file.read_text()
  assert "2" in text or "0" in text
  file.write_text(text.replace("2", "3").replace("0", "1"))
  step = _restore(run)[0]
  assert step == (1 if item == "data" else 2)  # an evaluation came after it
  if item == "measured":
    (run / "checkpoints" / "2" / "evaluation.json").unlink()
    with pytest.raises(ValueError, match=r"evaluation in .*2 is damaged"):
      checkpoint.measured(str(run), 2)


def test_a_damaged_evaluation_is_refused(run):
  assert checkpoint.measured(str(run), 2)["eval/latent_rms"] == 0.5
  file = run / "checkpoints" / "2" / "evaluation.json"
  file.write_text(file.read_text().replace("0.5", "0.7"))
  with pytest.raises(ValueError, match=r"evaluation in .*2 is damaged"):
    checkpoint.measured(str(run), 2)


def test_stray_directories_do_not_block(run):
  (run / "checkpoints" / "700").mkdir()
  (run / "checkpoints" / "notes").mkdir()
  (run / "checkpoints" / "800").write_text("no directory")
  assert _load(run)[0] == 2
  step, found, _ = _restore(run)
  assert step == 2 and _is_state_of(2, found)


def test_without_a_whole_checkpoint_there_is_an_error_that_names_all(run):
  for step in (1, 2):
    (run / "checkpoints" / str(step) / "ema" / "manifest.ocdbt").unlink()
  message = "/2 is damaged .*; .*/1 is damaged .*no whole checkpoint"
  with pytest.raises(ValueError, match=message):
    _load(run)
  with pytest.raises(ValueError, match=message):
    _restore(run)


def test_storage_that_refuses_is_no_damage(run, monkeypatch):
  def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", refuse)
  with pytest.raises(ValueError, match=r"reading .*/2 failed: .*Permission"):
    _restore(run)
  assert (run / "checkpoints" / "2").exists()


def test_what_is_not_finite_is_not_saved(run):
  checkpoints = checkpoint.Checkpoints(epath.Path(run), keep=1)
  bad = _state(3)
  bad.ema["params"]["bias"] = jnp.float32([1, np.nan])
  with pytest.raises(FloatingPointError, match="after step 3"):
    checkpoints.save(3, bad, {"next_batch": 3}, {"step": 0})
  checkpoints.close()
  assert _load(run)[0] == 2


def test_values_that_are_not_finite_are_damage(run, monkeypatch):
  """As a checkpoint without digests, made before, may have them."""
  monkeypatch.setattr(checkpoint.digests, "not_finite", lambda _: 0)
  checkpoints = checkpoint.Checkpoints(epath.Path(run), keep=3)
  bad = _state(3)
  bad.ema["params"]["bias"] = jnp.float32([1, np.nan])
  checkpoints.save(3, bad, {"next_batch": 3}, {"step": 0})
  checkpoints.close()
  monkeypatch.undo()
  assert _load(run)[0] == 2


def test_a_digest_is_the_same_however_an_array_is_sharded():
  x = np.random.default_rng(0).normal(size=(3, 8, 16)).astype(np.float32)
  mesh = jax.make_mesh((2, 4), ("a", "b"))
  (expected,) = digests.digests([jnp.asarray(x)]).values()
  for spec in ((), (None, "a", "b"), (None, None, ("a", "b")), (None, "b")):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    assert digests.digests([jax.device_put(x, sharding)]) == {"0": expected}
  for dtype in (jnp.bfloat16, jnp.uint8, jnp.int32):
    digests.digests([jnp.ones((), dtype), jnp.ones((0, 3), dtype)])


def test_any_flipped_bit_changes_a_digest():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(5, 7)).astype(np.float32)
  before = digests.digests([jnp.asarray(x)])
  for element in range(x.size):
    for bit in range(32):
      flipped = x.copy()
      flipped.view(np.uint32).reshape(-1)[element] ^= np.uint32(1 << bit)
      assert digests.digests([jnp.asarray(flipped)]) != before
