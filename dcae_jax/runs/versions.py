"""What computed a result: versions of packages, and the devices."""

import importlib.metadata
import platform

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
      found[name] = "not installed: run from a clone"
  device = jax.devices()[0]
  return found | {
    "python": platform.python_version(),
    "devices": f"{jax.device_count()} {device.device_kind}",
  }
