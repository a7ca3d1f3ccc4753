import os
import re
import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dcae_jax.runs import host_memory
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


def test_bytes_of_a_device_are_those_of_its_shards():
  mesh = jax.make_mesh((8,), ("rows",))
  split = NamedSharding(mesh, PartitionSpec("rows"))
  whole = NamedSharding(mesh, PartitionSpec())
  arrays = {
    "split": jax.ShapeDtypeStruct((16, 2**40), np.float32, sharding=split),
    "whole": jax.ShapeDtypeStruct((5,), np.uint8, sharding=whole),
  }
  assert hardware.bytes_per_device(arrays) == 2 * 2**40 * 4 + 5


def test_a_cpus_devices_share_the_memory_of_the_host(monkeypatch):
  pages = {"SC_PHYS_PAGES": 1_000_000, "SC_PAGE_SIZE": 4_000}
  monkeypatch.setattr(os, "sysconf", pages.__getitem__)
  monkeypatch.setattr(host_memory, "_LIMITS", ())
  devices, needed = jax.devices(), {"weights": 4 * 10**8, "images": 10**8}
  hardware.check_memory(needed, devices, "take less")
  expected = (
    "too little memory: weights (0.400 GB) and images (0.101 GB) need at least "
    "0.501 GB on each of 8 devices, 4.008 GB in all, and this machine has "
    "4.000 GB; take less"
  )
  with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
    hardware.check_memory(
      needed | {"images": 101 * 10**6}, devices, "take less"
    )


def test_other_devices_have_their_own_memory():
  """One that does not say how much it has gets whatever is asked for."""

  def device(**stats):
    return types.SimpleNamespace(
      process_index=0,
      platform="gpu",
      device_kind="H100",
      memory_stats=lambda: stats,
    )

  def check(size, **stats):
    hardware.check_memory({"a batch": size}, iter([device(**stats)] * 8), "")

  check(2 * 10**9, bytes_limit=2 * 10**9)
  check(10**20)
  with pytest.raises(
    ValueError, match=r"2\.000 GB, and each H100 has 1\.999 G"
  ):
    check(2 * 10**9, bytes_limit=1_999_000_000)
