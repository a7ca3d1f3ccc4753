import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcae_jax.nn import convolution


def _arrays(*shapes):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=shape), "float32") for shape in shapes]


def _reference(x, kernel, stride=1, groups=1):
  padding = kernel.shape[0] // 2
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


def _check_equal(f, reference, x, kernel):
  y, pull_back = jax.vjp(f, x, kernel)
  expected, pull_back_reference = jax.vjp(reference, x, kernel)
  scale = float(jnp.abs(expected).max())
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * scale)
  (g,) = _arrays(y.shape)
  for a, b in zip(pull_back(g), pull_back_reference(g), strict=True):
    scale = float(jnp.abs(b).max())
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("shape", [(2, 1, 1, 8), (2, 4, 6, 8), (1, 9, 7, 8)])
def test_depthwise_convolution_equals_lax_conv(shape, size):
  x, kernel = _arrays(shape, (size, size, 1, 8))
  _check_equal(
    convolution.depthwise_convolution,
    lambda x, kernel: _reference(x, kernel, groups=8),
    x,
    kernel,
  )


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("shape", [(2, 1, 2, 6), (3, 8, 8, 6), (1, 12, 9, 6)])
def test_convolution_equals_lax_conv(shape, size):
  x, kernel = _arrays(shape, (size, size, 6, 10))
  _check_equal(convolution.convolution, _reference, x, kernel)


@pytest.mark.parametrize(
  ("shape", "channels"),
  [
    ((1, 24, 24, 128), 128),
    ((2, 21, 18, 128), 160),  # incomplete tiles, batch
    ((3, 9, 14, 200), 128),
    ((1, 23, 31, 128), 136),
    ((16, 4, 17, 64), 32),  # a tile high
    ((2, 12, 14, 24), 24),
    ((1, 16, 24, 16), 40),
  ],
)
def test_winograd_equals_lax_conv(shape, channels):
  x, kernel = _arrays(shape, (3, 3, shape[-1], channels))
  assert "stablehlo.convolution" not in _program(
    convolution.convolution, "cpu", x, kernel
  )
  _check_equal(convolution.convolution, _reference, x, kernel)
  y = convolution.convolution(x, kernel)
  expected = _reference(x, kernel)
  error = jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)
  assert float(error) < 3e-6


def test_winograd_has_second_derivatives():
  x, kernel = _arrays((1, 24, 24, 128), (3, 3, 128, 128))

  def penalty(f, kernel):
    gradient = jax.grad(lambda x: jnp.mean(f(x, kernel) ** 2))(x)
    return jnp.mean(gradient**2)

  actual, expected = (
    jax.grad(functools.partial(penalty, f))(kernel)
    for f in (convolution.convolution, _reference)
  )
  scale = float(jnp.abs(expected).max())
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("spec", [P("data"), P("data", "spatial")])
def test_sharded_winograd_equals_lax_conv(spec):
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "spatial"))
  x, kernel = _arrays((4, 24, 28, 128), (3, 3, 128, 128))
  sharded = jax.device_put(x, NamedSharding(mesh, spec))
  _check_equal(jax.jit(convolution.convolution), _reference, sharded, kernel)


def test_other_computations_do_not_use_winograd():
  x, kernel = _arrays((1, 24, 24, 128), (3, 3, 128, 128))
  for dtype in ("bfloat16", "float16"):
    program = _program(
      convolution.convolution, "cpu", x.astype(dtype), kernel.astype(dtype)
    )
    assert "stablehlo.convolution" in program


@pytest.mark.parametrize(("stride", "groups"), [(2, 1), (1, 2), (2, 3)])
def test_strided_and_grouped_convolution_equals_lax_conv(stride, groups):
  x, kernel = _arrays((2, 8, 6, 6), (3, 3, 6 // groups, 12))
  _check_equal(
    lambda x, k: convolution.convolution(x, k, stride, groups),
    lambda x, k: _reference(x, k, stride, groups),
    x,
    kernel,
  )


def _program(f, platform, *arguments):
  gradient = jax.grad(lambda *a: jnp.sum(f(*a) ** 2), argnums=(0, 1))
  traced = jax.jit(gradient).trace(*arguments)
  return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
  ("f", "kernel_shape"),
  [
    (convolution.depthwise_convolution, (3, 3, 1, 8)),
    (convolution.convolution, (3, 3, 8, 16)),
    (convolution.convolution, (1, 1, 8, 16)),
    (convolution.convolution, (3, 3, 128, 128)),
  ],
)
def test_only_the_cpu_program_differs_from_lax_conv(f, kernel_shape):
  side, channels = (24, 128) if kernel_shape[2] == 128 else (2, 8)
  x, kernel = _arrays((2, side, side, channels), kernel_shape)
  cpu = _program(f, "cpu", x, kernel)
  assert "stablehlo.convolution" not in cpu
  groups = 8 if kernel_shape[2] == 1 else 1
  reference = lambda x, kernel: _reference(x, kernel, groups=groups)
  for platform in ("tpu", "cuda"):
    count = _program(f, platform, x, kernel).count("stablehlo.convolution")
    expected = _program(reference, platform, x, kernel)
    assert count == expected.count("stablehlo.convolution") > 0


@pytest.mark.parametrize(
  "module",
  [
    convolution.Conv(4, dtype="bfloat16"),
    convolution.Conv(4, groups=4, dtype="bfloat16"),
  ],
)
def test_bias_gradients_sum_in_float32_under_bfloat16(module):
  x = jnp.zeros((8, 128, 128, 4), jnp.bfloat16)
  variables = module.init(jax.random.key(0), x)
  total = lambda v: jnp.sum(module.apply(v, x).astype("float32"))
  gradient = jax.jit(jax.grad(total))(variables)["params"]["bias"]
  np.testing.assert_array_equal(gradient, np.full(4, 8.0 * 128 * 128))


def test_large_grids_use_lax_conv_on_cpu_too():
  x, kernel = _arrays((1, 16, 16, 4), (3, 3, 4, 4))
  program = _program(convolution.convolution, "cpu", x, kernel)
  assert "stablehlo.convolution" in program


@pytest.mark.parametrize("stride", [1, 2])
def test_padding_can_differ_before_and_behind(stride):
  x, kernel = _arrays((2, 6, 8, 8), (3, 3, 8, 8))
  f = functools.partial(convolution.convolution, stride=stride, padding=(0, 1))
  behind = ((0, 0), (0, 1), (0, 1), (0, 0))
  reference = lambda x, kernel: jax.lax.conv_general_dilated(
    jnp.pad(x, behind),
    kernel,
    (stride, stride),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  _check_equal(f, reference, x, kernel)
