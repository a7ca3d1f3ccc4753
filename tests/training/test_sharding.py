import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dcae_jax.setup import autoencoder_training
from dcae_jax.training import hardware, sharding


def _losses(config, devices=None):
  """Of six steps on the same images."""
  training = autoencoder_training.build(
    config, devices, predecessor_is_pending=True
  )
  step, state, losses = training.jitted(), training.begin(), []
  for i in range(6):
    rng = np.random.default_rng(i)
    images = rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    placed = sharding.put_images(images, training.mesh)
    state, metrics = step(state, placed, {})
    losses.append(float(metrics["loss/total"]))
  return losses


@pytest.mark.parametrize(
  "mesh, phase, kind",
  [
    ((2, 2, 2), 1, "adamw"),
    ((1, 2, 4), 2, "adamw"),
    ((1, 4, 2), 3, "adamw"),
    ((2, 4, 1), 1, "muon"),
  ],
)
def test_one_device_and_eight_agree(tiny_config, mesh, phase, kind):
  config = tiny_config(phase, **{"optimizer.kind": kind, "mesh.data": 1})
  expected = _losses(config, jax.devices()[:1])
  config.mesh.data, config.mesh.fsdp, config.mesh.spatial = mesh
  found = _losses(config)
  assert len(set(found)) == 6
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
  np.testing.assert_allclose(found[5], expected[5], rtol=1e-4)


def test_fsdp_splits_channels_of_kernels_where_it_divides():
  """Output channels, else input channels."""
  mesh = sharding.create_mesh(2, 4, 1)
  shapes = {
    "a": {"kernel": jax.ShapeDtypeStruct((3, 3, 5, 8), "float32")},
    "b": {"kernel": jax.ShapeDtypeStruct((3, 3, 8, 6), "float32")},
    "c": {"bias": jax.ShapeDtypeStruct((8,), "float32")},
    "d": {"kernel": jax.ShapeDtypeStruct((3, 3, 5, 6), "float32")},
  }
  found = sharding.shardings({"params": shapes, "mu": shapes}, mesh)
  for tree in found.values():
    assert tree["a"]["kernel"].spec == PartitionSpec(None, None, None, "fsdp")
    spec = PartitionSpec(None, None, "fsdp", None)
    assert tree["b"]["kernel"].spec == spec
    for name, leaf in (("c", "bias"), ("d", "kernel")):
      assert tree[name][leaf].is_fully_replicated


def test_an_image_is_split_within_a_process():
  """Whatever the order of devices: on a slice, rows of chips cross hosts."""
  devices = hardware.describe_slice("v5e:4x4")
  devices.sort(key=lambda device: device.id)
  assert devices[0].process_index != devices[3].process_index
  mesh = sharding.create_mesh(4, 1, 4, devices)
  for row in mesh.devices.reshape(4, 4):
    assert len({device.process_index for device in row}) == 1
  sharding.check_images(32, mesh)
  with pytest.raises(ValueError, match="2 ways over 4 processes"):
    sharding.check_images(32, sharding.create_mesh(2, 1, 8, devices))


def test_images_are_split_over_batch_and_rows():
  mesh = sharding.create_mesh(2, 2, 2)
  images = np.arange(4 * 8 * 4 * 3, dtype=np.uint8).reshape(4, 8, 4, 3)
  placed = sharding.put_images(images, mesh)
  shapes = {shard.data.shape for shard in placed.addressable_shards}
  assert shapes == {(1, 4, 4, 3)}
  np.testing.assert_array_equal(placed, images)


@pytest.mark.parametrize(
  "sizes", [(3, 1, 1), (-1, -1, 1), (-1, 3, 1), (0, 1, 8)]
)
def test_meshes_that_do_not_fit_are_refused(sizes):
  with pytest.raises(ValueError, match=r"config\.mesh"):
    sharding.create_mesh(*sizes)


def test_batches_and_rows_that_do_not_divide_are_refused():
  mesh = sharding.create_mesh(2, 1, 4)
  sharding.check_batch(4, 2, 32, mesh)
  with pytest.raises(ValueError, match=r"batch_size=6 is not divisible by 4"):
    sharding.check_batch(6, 2, 32, mesh)
  with pytest.raises(ValueError, match=r"side 30 .*spatial=4"):
    sharding.check_batch(4, 1, 30, mesh)


class _Counter:
  """Batches whose pixels count up; its state is the next one."""

  def __init__(self):
    self.next = 0

  def __next__(self):
    self.next += 1
    return {"images": np.full((8, 2, 2, 1), self.next, np.uint8)}

  def get_state(self):
    return {"next": self.next}

  def set_state(self, state):
    self.next = state["next"]


def test_prefetch_remembers_the_batch_handed_out_not_the_one_read():
  mesh = sharding.create_mesh(8, 1, 1)
  put = lambda batch: sharding.put_images(batch["images"], mesh)
  batches = sharding.Prefetch(_Counter(), put, depth=3)
  values = [int(next(batches)[0, 0, 0, 0]) for _ in range(4)]
  assert values == [1, 2, 3, 4]
  state = batches.get_state()
  assert state == {"next": 4}
  counter = _Counter()
  counter.set_state(state)
  other = sharding.Prefetch(counter, put, depth=2)
  assert int(next(other)[0, 0, 0, 0]) == 5
