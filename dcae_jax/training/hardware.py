"""Peak rates of devices, for model FLOPs utilisation."""

import time

import jax
import jax.numpy as jnp

# Published dense bfloat16 rates per jax device, in FLOP/s.
_PEAK = {
  "TPU v2": 22.5e12,
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}


def peak_flops() -> float:
  """FLOP/s of all devices: published, else that of a matrix product here.

  The longest known name that starts the device's kind counts.
  """
  device = jax.devices()[0]
  names = [name for name in _PEAK if device.device_kind.startswith(name)]
  if names:
    return _PEAK[max(names, key=len)] * jax.device_count()
  hosts_share = jax.device_count() if device.platform != "cpu" else 1
  return _measured() * hosts_share


def _measured(size: int = 1024) -> float:
  """FLOP/s of a float32 matrix product on the first device."""
  x = jnp.ones((size, size), jnp.float32)
  multiply = jax.jit(lambda x: x @ x)
  multiply(x).block_until_ready()
  seconds = []
  for _ in range(3):
    start = time.perf_counter()
    multiply(x).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)
