import jax
import pytest

from dcae_jax.training import hardware


def test_the_longest_known_name_counts():
  lite = hardware.chip("TPU v5 lite")
  assert lite.flops == 197e12 and lite.memory == 16 * 2**30
  assert hardware.chip("TPU v5").flops == 459e12
  assert hardware.chip("NVIDIA H100 80GB HBM3").flops == 989e12
  assert hardware.chip("cpu") is None


@pytest.mark.parametrize(
  "topology, kind, chips, hosts",
  [
    ("v5e:4x4", "TPU v5 lite", 16, 4),
    ("v5e:1x1", "TPU v5 lite", 1, 1),
    ("v4:2x2x4", "TPU v4", 16, 4),
    ("v5p:2x2x1", "TPU v5", 4, 1),
    ("v6e:2x4", "TPU v6 lite", 8, 2),
  ],
)
def test_slices_are_described(topology, kind, chips, hosts):
  devices = hardware.describe_slice(topology)
  assert len(devices) == chips and devices[0].device_kind == kind
  assert len({device.process_index for device in devices}) == hosts
  assert hardware.chip(kind) is not None
  assert jax.default_backend() == "cpu"  # nothing else is changed


@pytest.mark.parametrize(
  "topology, message",
  [
    ("v5e", "unknown topology"),
    ("v5e:4", "unknown topology"),
    ("v5e:4x4x4", "unknown topology"),
    ("v5e:4xx4", "unknown topology"),
    ("v4:4x4", "unknown topology"),
    ("tpu:4x4", "unknown topology"),
    ("v5e:32x32", "has 1,024 chips; a slice of v5e has up to 256"),
    ("v5e:0x4", "0 chips"),
    ("v5e:3x5", "libtpu does not know"),
  ],
)
def test_topologies_that_cannot_be_are_refused(topology, message):
  with pytest.raises(ValueError, match=message):
    hardware.describe_slice(topology)
