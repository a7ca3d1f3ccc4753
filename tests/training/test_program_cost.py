import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dcae_jax.training import program_cost, sharding


def _cost(function, *arguments):
  text = jax.jit(function).lower(*arguments).compile().as_text()
  return program_cost.cost(text)


@pytest.fixture(scope="module")
def split():
  """Eight devices, and an array of 8 x 64 that is split over them."""
  mesh = sharding.create_mesh(8, 1, 1)
  placed = NamedSharding(mesh, PartitionSpec("data"))
  return mesh, jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=placed)


def test_a_collective_in_a_loop_counts_as_often_as_it_runs(split):
  _, x = split

  def loop(x):
    def body(total, _):
      whole = jnp.sum(jnp.sin(x + total[:1, :1]), axis=0, keepdims=True)
      return total + jnp.broadcast_to(whole, x.shape), None

    return jax.lax.scan(body, x, None, length=7)[0]

  found = _cost(loop, x).collectives
  assert list(found) == ["all-reduce"]
  number, size = found["all-reduce"]
  # 64 sums in each of the seven, and maybe the one element that all need.
  assert number in (7, 14) and 7 * 256 <= size <= 7 * (256 + 8)


def test_kinds_and_bytes_of_collectives(split):
  mesh, x = split
  whole = sharding.replicated(mesh)
  gather = lambda x: jax.lax.with_sharding_constraint(x, whole) * 2
  assert _cost(gather, x).collectives == {"all-gather": (1, 8 * 64 * 4.0)}
  permute = lambda x: jnp.roll(x, 1, axis=0)
  found = _cost(permute, x).collectives
  assert found["collective-permute"] == (1, 64 * 4.0)
  assert _cost(lambda x: x * 2, x).collectives == {}


def test_memory_is_that_of_arguments_results_and_temporaries():
  """Those arguments that are donated count once."""
  side = 512
  x = jax.ShapeDtypeStruct((side, side), jnp.float32)
  function = lambda x, y: jnp.sin(x @ y) @ (y @ x)
  program = jax.jit(function, donate_argnums=0).lower(x, x).compile()
  arrays = program_cost.memory(program) / (4 * side**2)
  assert 4 <= arrays < 5


def test_bytes_are_those_of_operands_and_results():
  x = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
  moved = _cost(lambda x: jnp.sin(x) + 1, x).bytes_accessed
  assert moved == 2 * 1024 * 256 * 4


def test_a_loop_over_slices_moves_what_it_slices():
  """Not the whole array in each of its runs, and each slice once."""
  steps, shape = 50, (64, 64)
  x = jax.ShapeDtypeStruct((steps, *shape), jnp.float32)

  def loop(x):
    carry = jnp.zeros(shape)
    return jax.lax.scan(lambda c, a: (jnp.sin(c) + a, None), carry, x)[0]

  moved = _cost(loop, x).bytes_accessed
  slice_bytes = np.prod(shape) * 4
  assert steps * 3 * slice_bytes <= moved <= steps * 6 * slice_bytes


def test_the_text_of_a_tpu_program_is_read():
  """Memory space 1 is on the chip: what lives there is not in main memory."""
  text = """HloModule jit_step

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(1)} add(%i, %one)
  %sum = f32[4,8]{1,0:T(8,128)S(1)} all-reduce(%x), channel_id=1, to_apply=%add
  %y = f32[4,8]{1,0:T(8,128)} copy(%sum)
  ROOT %t = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%next, %y)
}

%condition (p.1: (s32[], f32[4,8])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %bound = s32[]{:T(128)} constant(10)
  ROOT %less = pred[]{:T(512)S(1)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %s = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%zero, %a)
  %w = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%s), condition=%condition, body=%body
  %out = f32[4,8]{1,0:T(8,128)} get-tuple-element(%w), index=1
  %start = (f32[4,8]{1,0:T(8,128)S(1)}, f32[4,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%out)
  ROOT %done = f32[4,8]{1,0:T(8,128)S(1)} copy-done(%start)
}
"""  # noqa: E501
  found = program_cost.cost(text)
  assert found.collectives == {"all-reduce": (10, 10 * 128.0)}
  # Ten times: the counter (twice) and the array are read, and once written; the
  # counter is compared (twice). Then one copy to the chip.
  assert found.bytes_accessed == 10 * (2 * 4 + 2 * 128) + 10 * 2 * 4 + 128
