"""The CPU lowerings of nn/convolution.py against lax.conv.

  python -m benchmarks.convolution

Milliseconds, the least of several runs, forward and with both gradients; the
two are timed in one process, so that their ratio holds on any machine.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from dcae_jax.nn import convolution

# (name, input [b, h, w, c], kernel [k, k, c / groups, d])
CASES = (
  ("depthwise 3x3", (16, 8, 8, 1024), (3, 3, 1, 1024)),
  ("depthwise 3x3", (16, 4, 4, 2048), (3, 3, 1, 2048)),
  ("depthwise 3x3", (1, 32, 32, 8192), (3, 3, 1, 8192)),
  ("3x3 on a 2x2 grid", (16, 2, 2, 256), (3, 3, 256, 1024)),
  ("3x3 on a 4x4 grid", (16, 4, 4, 256), (3, 3, 256, 512)),
  ("3x3", (16, 16, 16, 64), (3, 3, 64, 64)),
  ("3x3", (16, 16, 16, 128), (3, 3, 128, 128)),
  ("3x3", (4, 16, 16, 1024), (3, 3, 1024, 256)),
  ("3x3", (16, 16, 16, 512), (3, 3, 512, 512)),
  ("3x3", (1, 64, 64, 512), (3, 3, 512, 512)),
  ("3x3", (1, 64, 64, 512), (3, 3, 512, 1024)),
  ("3x3", (1, 128, 128, 256), (3, 3, 256, 256)),
  ("3x3", (1, 256, 256, 64), (3, 3, 64, 64)),
)


def lax_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (1, 1),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1] // kernel.shape[2],
  )


def milliseconds(f, *arguments, runs: int = 5) -> float:
  f = jax.jit(f)
  jax.block_until_ready(f(*arguments))
  seconds = []
  for _ in range(runs):
    start = time.perf_counter()
    jax.block_until_ready(f(*arguments))
    seconds.append(time.perf_counter() - start)
  return 1e3 * min(seconds)


def with_gradients(f):
  def both(x, kernel):
    y, pull_back = jax.vjp(f, x, kernel)
    return y, pull_back(y)

  return both


def main() -> None:
  rng = np.random.default_rng(0)
  for name, shape, kernel_shape in CASES:
    x, kernel = (
      jnp.asarray(rng.normal(size=s), "float32") for s in (shape, kernel_shape)
    )
    ours = convolution.convolution
    if kernel_shape[2] == 1:
      ours = convolution.depthwise_convolution
    for part, wrap in (
      ("forward", lambda f: f),
      ("with gradients", with_gradients),
    ):
      a = milliseconds(wrap(lax_convolution), x, kernel)
      b = milliseconds(wrap(ours), x, kernel)
      print(
        f"{name:18} {shape!s:19} {part:15} lax.conv {a:9.1f}  here {b:7.1f}"
        f"  ratio {a / b:6.1f}",
        flush=True,
      )


if __name__ == "__main__":
  main()
