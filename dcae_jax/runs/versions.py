"""What computed a result: versions of packages, and the devices."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable, Mapping

import jax

import dcae_jax

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow", "tensorstore")


def versions() -> dict[str, str]:
  """What computed a result."""
  found = {"dcae_jax": _clone() or dcae_jax.__version__}
  found |= {name: importlib.metadata.version(name) for name in _PACKAGES}
  return found | {
    "python": platform.python_version(),
    "devices": f"{jax.device_count()} {_hardware()}",
  }


def in_words(computed: Iterable[Mapping[str, str]]) -> str:
  """What computed several results, each named once."""
  named = (
    f"dcae_jax {x['dcae_jax'].removeprefix('a clone ')}, jax {x['jax']}, "
    f"{x['devices']}"
    for x in computed
  )
  return "; ".join(dict.fromkeys(named))


def _clone() -> str:
  """The commit of a clone, installed or not; "+": with other changes."""
  folder = pathlib.Path(__file__).parents[2]
  if not (folder / ".git").exists():  # of others, which a package may be in
    return ""
  command = ["git", "describe", "--always", "--dirty=+"]
  try:
    output = subprocess.check_output(
      command, cwd=folder, stderr=subprocess.DEVNULL, text=True
    )
  except (OSError, subprocess.CalledProcessError):
    return ""
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
