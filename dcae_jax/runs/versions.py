"""What computed a result: versions of packages, and the devices."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable, Mapping

import jax

_PACKAGES = (
  "dcae_jax", "jax", "jaxlib", "flax", "numpy", "pillow", "tensorstore"
)  # fmt: skip


def versions() -> dict[str, str]:
  """What computed a result."""
  found = {}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = _clone()
  return found | {
    "python": platform.python_version(),
    "devices": f"{jax.device_count()} {_hardware()}",
  }


def in_words(computed: Iterable[Mapping[str, str]]) -> str:
  """What computed several results, each named once."""
  named = (
    f"dcae_jax {x['dcae_jax']}, jax {x['jax']}, {x['devices']}"
    for x in computed
  )
  return "; ".join(dict.fromkeys(named))


def _clone() -> str:
  """The commit of a clone that runs as it is; "+": with other changes."""
  command = ["git", "describe", "--always", "--dirty=+"]
  folder = pathlib.Path(__file__).parent
  try:
    output = subprocess.check_output(
      command, cwd=folder, stderr=subprocess.DEVNULL, text=True
    )
  except (OSError, subprocess.CalledProcessError):
    return "not installed"
  return f"a clone at {output.strip()}"


def _hardware() -> str:
  """The first device in words; of a CPU, its name and cores."""
  device, file = jax.devices()[0], pathlib.Path("/proc/cpuinfo")
  if device.platform != "cpu":
    return device.device_kind
  lines = file.read_text().splitlines() if file.exists() else ()
  names = [x.partition(":")[2] for x in lines if x.startswith("model name")]
  name = names[0].strip() if names else platform.machine()
  return f"{name} ({os.cpu_count()} cores)"
