"""Convolutions as the paper's networks use them, with fast CPU lowerings.

XLA's CPU back end is 10 to 60 times too slow for depthwise convolutions and
for 3x3 kernels on tiny grids; on large grids it runs near the peak of the
machine, so that only fewer multiplications are faster. There
`jax.lax.platform_dependent` picks another lowering: shifted sums (depthwise),
one matrix product (1x1), patches and one matrix product (grids up to 8x8),
Winograd's algorithm (3x3, float32, but for few channels). Parameters, and the
programs for TPU and GPU, are those of `jax.lax.conv_general_dilated`.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dcae_jax.nn import cpu_convolution

_LARGEST_PATCH_GRID = 64  # positions; beyond, lax.conv is faster on a CPU too
# With fewer, lax.conv was measured as fast, or faster. The size of the batch
# has no say, so that latents do not depend on the number of devices.
_FEWEST_WINOGRAD_CHANNELS = 16
_FEWEST_WINOGRAD_PRODUCTS = 24 * 24  # of input and output channels


def _lax_conv(
  x: Array,
  kernel: Array,
  stride: int,
  groups: int,
  padding: tuple[int, int] | None = None,
) -> Array:
  side = kernel.shape[0] // 2  # symmetric, also where the stride is 2
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride, stride),
    padding=[padding or (side, side)] * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


def _vjp(f: Callable) -> Callable:
  return lambda x, kernel, g: jax.vjp(f, x, kernel)[1](g)


def _by_platform(
  cpu: Callable, default: Callable, cpu_vjp: Callable | None = None
) -> Callable:
  """`cpu` on CPUs, `default` elsewhere, in values and in gradients.

  The choice is made apart for the two directions: only the inputs are kept
  between them, so that no platform keeps what another one's gradient needs.
  """

  @jax.custom_vjp
  def convolve(x, kernel):
    return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)

  def forward(x, kernel):
    return convolve(x, kernel), (x, kernel)

  def backward(residuals, g):
    return jax.lax.platform_dependent(
      *residuals, g, cpu=cpu_vjp or _vjp(cpu), default=_vjp(default)
    )

  convolve.defvjp(forward, backward)
  return convolve


_depthwise = _by_platform(
  cpu_convolution.shifted_sum,
  lambda x, kernel: _lax_conv(x, kernel, 1, x.shape[-1]),
  cpu_convolution.shifted_sum_vjp,
)
_as_winograd = _by_platform(
  cpu_convolution.winograd,
  lambda x, kernel: _lax_conv(x, kernel, 1, 1),
  cpu_convolution.winograd_vjp,
)
_as_product = _by_platform(
  cpu_convolution.patch_product, lambda x, kernel: _lax_conv(x, kernel, 1, 1)
)


def depthwise_convolution(
  x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"]
) -> Float[Array, "b h w c"]:
  """Convolves each channel alone; zero padding keeps the size; `k` is odd."""
  return _depthwise(x, kernel)


def _suits_winograd(x: Array, kernel: Array) -> bool:
  return (
    kernel.shape[:2] == (3, 3)
    and x.dtype == kernel.dtype == jnp.float32
    and min(kernel.shape[2:]) >= _FEWEST_WINOGRAD_CHANNELS
    and math.prod(kernel.shape[2:]) >= _FEWEST_WINOGRAD_PRODUCTS
  )


def convolution(
  x: Float[Array, "b h w c"],
  kernel: Float[Array, "k k d e"],
  stride: int = 1,
  groups: int = 1,
  padding: tuple[int, int] | None = None,
) -> Float[Array, "b h2 w2 e"]:
  """Convolves with zero padding; `d = c / groups`.

  `padding` is before and behind both axes; None: `k // 2` on each side.
  """
  size = kernel.shape[0]
  keeps_size = stride == 1 and padding is None
  if keeps_size and 1 < groups == x.shape[-1] == kernel.shape[-1]:
    return _depthwise(x, kernel)
  dense = keeps_size and groups == 1
  if dense and (size == 1 or math.prod(x.shape[1:3]) <= _LARGEST_PATCH_GRID):
    return _as_product(x, kernel)
  if dense and _suits_winograd(x, kernel):
    return _as_winograd(x, kernel)
  return _lax_conv(x, kernel, stride, groups, padding)


# Uniform in +-1/sqrt(fan in), for kernels and biases: what the convolutions of
# the authors' framework start from.
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int) -> Callable:
  """An initializer; `kernel_init` is that of the kernel beside the bias."""
  bound = 1 / math.sqrt(fan_in)
  return functools.partial(jax.random.uniform, minval=-bound, maxval=bound)


class Conv(nn.Module):
  """Convolution with zero padding.

  Attributes:
    channels: of the output.
    size: of the kernel, odd.
    stride: 1 or 2.
    groups: of channels that do not mix; as many as channels: depthwise.
    padding: zeros before and behind both axes; None: `size // 2` on each side.
    use_bias: add a bias.
    dtype: of the computation; parameters are float32.
  """

  channels: int
  size: int = 3
  stride: int = 1
  groups: int = 1
  padding: tuple[int, int] | None = None
  use_bias: bool = True
  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    shape = (self.size, self.size, x.shape[-1] // self.groups, self.channels)
    kernel = self.param("kernel", kernel_init, shape, jnp.float32)
    y = convolution(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      self.stride,
      self.groups,
      self.padding,
    )
    if self.use_bias:
      init = bias_init(math.prod(shape[:3]))
      bias = self.param("bias", init, (self.channels,), jnp.float32)
      # In float32: its gradient sums over all positions of the batch.
      y = (y.astype(jnp.float32) + bias[None, None, None]).astype(y.dtype)
    return y
