"""What computed a result: versions of packages, and the devices."""

import importlib.metadata
import platform

import jax

_PACKAGES = (
  "dcae_jax", "jax", "jaxlib", "flax", "numpy", "pillow", "tensorstore"
)  # fmt: skip


def versions() -> dict[str, str]:
  """What computed a result."""
  versions = {}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "not installed: run from a clone"
  device = jax.devices()[0]
  return versions | {
    "python": platform.python_version(),
    "devices": f"{jax.device_count()} {device.device_kind}",
  }
