"""Residual autoencoding: non-parametric shortcuts around every resampling.

DC-AE (arXiv 2410.10733) section 3.2, figure 4: the learned layers only have to
model the residual of a space-to-channel (or channel-to-space) rearrangement.
Channel orders are those of the released weights: space goes to channels
channel-major, `(c p q)`, averages run over consecutive groups of channels, and
duplication repeats consecutively, before the shuffle.
"""

import functools

import flax.linen as nn
from einops import rearrange, reduce, repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dcae_jax import errors
from dcae_jax.nn import convolution


def space_to_channel(
  x: Float[Array, "b h w c"], factor: int = 2
) -> Float[Array, "b h2 w2 c2"]:
  """Moves `factor x factor` pixels into channels: `[b, h/p, w/p, c*p*p]`."""
  return rearrange(x, "b (h p) (w q) c -> b h w (c p q)", p=factor, q=factor)


def channel_to_space(
  x: Float[Array, "b h w c"], factor: int = 2
) -> Float[Array, "b h2 w2 c2"]:
  """Inverse of `space_to_channel`: `[b, h*p, w*p, c/(p*p)]`."""
  return rearrange(x, "b h w (c p q) -> b (h p) (w q) c", p=factor, q=factor)


def channel_average(
  x: Float[Array, "b h w c"], channels: int
) -> Float[Array, "b h w d"]:
  """Averages consecutive groups of channels, so that `channels` are left.

  Raises UserError unless `channels` divides the channels of `x`.
  """
  if x.shape[-1] % channels:
    raise errors.UserError(
      f"the averaging shortcut cannot go from {x.shape[-1]} to {channels} "
      "channels; choose a number that divides it, or switch the shortcut off"
    )
  return reduce(x, "b h w (c g) -> b h w c", "mean", c=channels)


def channel_duplicate(
  x: Float[Array, "b h w c"], channels: int
) -> Float[Array, "b h w d"]:
  """Repeats each channel consecutively, so that there are `channels`.

  Raises UserError unless that is a multiple of the channels of `x`.
  """
  if channels % x.shape[-1]:
    raise errors.UserError(
      f"the duplicating shortcut cannot go from {x.shape[-1]} to {channels} "
      "channels; choose a multiple of it, or switch the shortcut off"
    )
  return repeat(x, "b h w c -> b h w (c r)", r=channels // x.shape[-1])


def nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
  """Nearest-neighbour interpolation to twice the height and width."""
  return repeat(x, "b h w c -> b (h p) (w q) c", p=2, q=2)


class Downsample(nn.Module):
  """Halves height and width; figure 4, left.

  Attributes:
    channels: of the output.
    kind: "space_to_channel" (convolution to a quarter of the channels, then
      the rearrangement) or "strided" (3x3 convolution of stride 2).
    residual_autoencoding: add the averaging shortcut.
  """

  channels: int
  kind: str = "space_to_channel"
  residual_autoencoding: bool = True
  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    conv = functools.partial(convolution.Conv, dtype=self.dtype, name="conv")
    if self.kind == "space_to_channel":
      y = space_to_channel(conv(self.channels // 4)(x))
    else:
      y = conv(self.channels, stride=2)(x)
    if self.residual_autoencoding:
      y = y + channel_average(space_to_channel(x), self.channels)
    return y


class Upsample(nn.Module):
  """Doubles height and width; figure 4, right.

  Attributes:
    channels: of the output.
    kind: "channel_to_space" (convolution to four times the channels, then the
      rearrangement) or "nearest" (interpolation, then a 3x3 convolution).
    residual_autoencoding: add the duplicating shortcut.
  """

  channels: int
  kind: str = "channel_to_space"
  residual_autoencoding: bool = True
  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    conv = functools.partial(convolution.Conv, dtype=self.dtype, name="conv")
    if self.kind == "channel_to_space":
      y = channel_to_space(conv(4 * self.channels)(x))
    else:
      y = conv(self.channels)(nearest(x))
    if self.residual_autoencoding:
      y = y + channel_to_space(channel_duplicate(x, 4 * self.channels))
    return y
