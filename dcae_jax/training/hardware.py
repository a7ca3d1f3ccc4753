"""Chips: their published rates, descriptions of TPU slices to compile for, and
whether what is asked for fits those that are here.

Rates are dense bfloat16 matrix products, memory and interconnect in one
direction, from the vendors' data sheets; a figure here counts one jax device.
"""

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from dcae_jax import errors
from dcae_jax.runs import host_memory

_GIB = 2**30


class Chip(NamedTuple):
  """Published figures of one jax device.

  FLOP/s in bfloat16; bytes of memory; bytes/s of its bandwidth, and of the
  interconnect with other chips.
  """

  flops: float
  memory: float
  bandwidth: float
  interconnect: float


# By the start of `device_kind`; the longest one that fits counts. On v2 and v3
# each of a chip's two cores is a jax device.
CHIPS = {
  "TPU v2": Chip(22.5e12, 8 * _GIB, 350e9, 31e9),
  "TPU v3": Chip(61.5e12, 16 * _GIB, 450e9, 41e9),
  "TPU v4": Chip(275e12, 32 * _GIB, 1228e9, 300e9),
  "TPU v5 lite": Chip(197e12, 16 * _GIB, 819e9, 200e9),
  "TPU v5": Chip(459e12, 95 * _GIB, 2765e9, 600e9),
  "TPU v6 lite": Chip(918e12, 32 * _GIB, 1640e9, 448e9),
  "NVIDIA A100": Chip(312e12, 80e9, 2039e9, 300e9),
  "NVIDIA H100": Chip(989e12, 80e9, 3350e9, 450e9),
  "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9),
}


class _Generation(NamedTuple):
  """TPUs of which slices can be described: sides, chips at most, settings."""

  dimensions: int
  chips: int
  configuration: str


_GENERATIONS = {  # "megacore": both cores of a chip are one jax device
  "v4": _Generation(3, 4096, "megacore"),
  "v5e": _Generation(2, 256, "default"),
  "v5p": _Generation(3, 8960, "megacore"),
  "v6e": _Generation(2, 256, "default"),
}


def chip(device_kind: str) -> Chip | None:
  """The published figures of a kind of device, or None."""
  names = [name for name in CHIPS if device_kind.startswith(name)]
  return CHIPS[max(names, key=len)] if names else None


def usable_memory(chip: Chip | None) -> float:
  """Bytes that a program can have; 0 where nothing is known.

  XLA:TPU keeps a quarter of a GiB: it offers 15.75 of v5e's 16.
  """
  return chip.memory - _GIB / 4 if chip is not None else 0.0


def bytes_per_device(arrays: Any) -> int:
  """Of a tree of arrays, or of their shapes, with their shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(arrays)
  )


def check_memory(
  needed: Mapping[str, int], devices: Iterable[jax.Device], advice: str
) -> None:
  """Raises UserError if the devices of this process surely lack memory.

  Args:
    needed: bytes on each device, a lower bound, by what they are for.
    devices: that hold it; those of a CPU share the memory of the host.
    advice: what makes it fit.
  """
  local = [x for x in devices if x.process_index == jax.process_index()]
  total, here, copies = sum(needed.values()), f"each {local[0].device_kind}", 1
  available = (local[0].memory_stats() or {}).get("bytes_limit", math.inf)
  if local[0].platform == "cpu":
    here, copies, available = "this machine", len(local), host_memory.total()
  if total * copies <= available:
    return
  parts = " and ".join(f"{x} ({_gb(size)})" for x, size in needed.items())
  of_all = f" on each of {copies} devices, {_gb(total * copies)} in all"
  raise errors.UserError(
    f"too little memory: {parts} need at least {_gb(total)}"
    f"{of_all if copies > 1 else ''}, and {here} has {_gb(available)}; {advice}"
  )


def _gb(size: float) -> str:
  return f"{size / 1e9:,.{0 if size >= 1e11 else 3}f} GB"


def describe_slice(topology: str) -> list[jax.Device]:
  """The chips of a TPU slice that need not be there, to compile programs for.

  A topology is "v5e:4x4" or "v5p:2x2x4". Raises UserError for an unknown one,
  or if libtpu, the compiler, is not installed.
  """
  generation, _, sides = topology.partition(":")
  lengths = [int(side) for side in sides.split("x") if side.isdigit()]
  if (
    generation not in _GENERATIONS
    or "x".join(map(str, lengths)) != sides
    or len(lengths) != _GENERATIONS[generation].dimensions
  ):
    raise errors.UserError(
      f"unknown topology {topology!r}; write v5e:4x4 or v6e:4x4 (two sides), "
      "v4:2x2x4 or v5p:2x2x4 (three), or nothing for the devices that are here"
    )
  most = _GENERATIONS[generation].chips
  if not 1 <= math.prod(lengths) <= most:
    raise errors.UserError(
      f"topology {topology!r} has {math.prod(lengths):,} chips; a slice of "
      f"{generation} has up to {most:,}"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise errors.UserError(
      "compiling for a TPU needs libtpu, also where there is no TPU: pip "
      'install "jax[tpu]"'
    )
  # Of another process that compiles, or of a TPU that is here.
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  bounds = {}
  if math.prod(lengths) < 4:
    bounds["chips_per_host_bounds"] = tuple(lengths + [1] * (3 - len(lengths)))
  try:
    described = topologies.get_topology_desc(
      topology_name=topology,
      platform="tpu",
      chip_config_name=_GENERATIONS[generation].configuration,
      **bounds,
    )
  except jax.errors.JaxRuntimeError as error:
    raise errors.UserError(
      f"libtpu does not know the topology {topology!r}: {error}"
    ) from error
  return list(described.devices)
