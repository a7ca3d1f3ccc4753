"""One mesh, one table of rules: where each array lives.

Axes: `data` splits batches, `fsdp` splits batches and parameters, `spatial`
splits image rows so that large images fit; XLA exchanges the halos. Everything
is `jax.jit` over global arrays.
"""

import collections
import fnmatch
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dcae_jax import errors
from dcae_jax.training import freezing

Tree = Any

# Path pattern, then the dimensions that `fsdp` may split: the first of them
# that it divides.
RULES = (
  ("*/kernel", (-1, -2)),  # output channels, else input channels
  ("*/embedding", (-1,)),  # channels of a table of tokens
  ("*", ()),  # norms, biases, counters: whole on every device
)
IMAGES = PartitionSpec(("data", "fsdp"), "spatial")


def create_mesh(
  data: int, fsdp: int, spatial: int, devices: list[jax.Device] | None = None
) -> Mesh:
  """A mesh over all devices; one axis may be -1, the rest of the devices.

  The devices of a process are neighbours in it, on the last axes first, so that
  `spatial` splits an image over one process's devices where they are enough.
  Raises UserError unless the sizes multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  devices = sorted(devices, key=lambda device: device.process_index)
  sizes = [data, fsdp, spatial]
  text = f"data={data}, fsdp={fsdp}, spatial={spatial}"
  known = int(np.prod([size for size in sizes if size != -1]))
  if sizes.count(-1) > 1 or known < 1 or any(size < -1 for size in sizes):
    raise errors.UserError(
      f"config.mesh has {text}; sizes are positive, and one may be -1"
    )
  if -1 in sizes:
    sizes[sizes.index(-1)] = len(devices) // known
  if int(np.prod(sizes)) != len(devices):
    raise errors.UserError(
      f"config.mesh with {text} does not fit {len(devices)} devices; choose "
      "sizes whose product is that number, one of them -1"
    )
  return Mesh(np.array(devices).reshape(sizes), ("data", "fsdp", "spatial"))


def local_mesh() -> Mesh:
  """Over this process's devices, for work that each process does alone."""
  return create_mesh(-1, 1, 1, jax.local_devices())


def check_batch(
  batch_size: int, grad_accum_steps: int, resolution: int, mesh: Mesh
) -> None:
  """Raises UserError unless the batch divides over the mesh."""
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % (ways * grad_accum_steps):
    times = f" times config.accumulation={grad_accum_steps}"
    raise errors.UserError(
      f"config.batch_size={batch_size} is not divisible by "
      f"{ways * grad_accum_steps}: {ways} ways of data parallelism (mesh axes "
      f"data x fsdp){times if grad_accum_steps > 1 else ''}; use a multiple"
    )
  check_images(resolution, mesh)


def check_images(resolution: int, mesh: Mesh) -> None:
  """Raises UserError unless processes hold whole images, parts whole rows."""
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  processes = len({device.process_index for device in mesh.devices.flat})
  if ways % processes:
    raise errors.UserError(
      f"config.mesh splits batches {ways} ways over {processes} processes; use "
      "a smaller spatial axis, so that each process reads whole images"
    )
  if resolution % mesh.shape["spatial"]:
    raise errors.UserError(
      f"image side {resolution} is not divisible by config.mesh.spatial="
      f"{mesh.shape['spatial']}; use a smaller spatial axis"
    )


def shardings(tree: Tree, mesh: Mesh) -> Tree:
  """The `NamedSharding` of each leaf of a tree of arrays or shapes."""

  def of_leaf(keys, leaf):
    path = freezing.path_of(keys)
    axes = next(axes for rule, axes in RULES if fnmatch.fnmatch(path, rule))
    spec = [None] * len(leaf.shape)
    for axis in axes:
      if leaf.shape[axis] % mesh.shape["fsdp"] == 0:
        spec[axis] = "fsdp"
        break
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map_with_path(of_leaf, tree)


def placed(tree: Tree, shardings: Tree) -> Tree:
  """Shapes of arrays, and where they live."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def gather(shardings: Tree, mesh: Mesh) -> Callable[[Tree], Tree]:
  """A function that makes arrays with these shardings whole on each device.

  Gradients through it are split again. Without it XLA would be free to split
  activations over channels, as `fsdp` splits the parameters, and move those.
  """
  if mesh.shape["fsdp"] == 1:
    return lambda tree: tree

  @jax.custom_vjp
  def whole(tree):
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))

  whole.defvjp(
    lambda tree: (whole(tree), None),
    lambda _, cotangent: (
      jax.lax.with_sharding_constraint(cotangent, shardings),
    ),
  )
  return whole


def on_whole_arrays(mesh: Mesh) -> Callable[[Callable], Callable]:
  """Of a function of trees: the same, computed by each device on all of them.

  For what must not be split, such as chains of small matrix products, of which
  XLA would exchange each result (a constraint on their operands stops it not).
  """
  if mesh.shape["fsdp"] == 1:  # they are whole
    return lambda function: function
  whole = PartitionSpec()
  return lambda function: jax.shard_map(
    function, mesh=mesh, in_specs=whole, out_specs=whole
  )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
  """The first axis is split over the devices."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def put_rows(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """As `put_images`, for arrays of which only the first axis is split."""
  return {
    name: jax.make_array_from_process_local_data(by_rows(mesh), values)
    for name, values in batch.items()
  }


def put_images(images: np.ndarray, mesh: Mesh) -> jax.Array:
  """This process's share of a batch to its devices, as one global array."""
  sharding = NamedSharding(mesh, IMAGES)
  return jax.make_array_from_process_local_data(sharding, images)


@runtime_checkable
class Batches(Protocol):
  """A checkpointable iterator over host batches."""

  def __next__(self) -> dict[str, np.ndarray]: ...

  def get_state(self) -> dict[str, Any]: ...

  def set_state(self, state: dict[str, Any]) -> None: ...


class Prefetch:
  """Batches on the devices, `depth` of them ahead of the step.

  Its state is that of the last batch handed out, not of the last one read.
  """

  def __init__(self, batches: Batches, put: Callable[..., Any], depth: int):
    """Reads nothing yet; `put` brings a batch of the host to the devices."""
    self._batches, self._put, self._depth = batches, put, depth
    self._queue = collections.deque()
    self._state = batches.get_state()

  def __iter__(self) -> Iterator[Any]:
    return self

  def __next__(self) -> Any:
    while len(self._queue) <= self._depth:
      batch = next(self._batches)
      self._queue.append((self._put(batch), self._batches.get_state()))
    batch, self._state = self._queue.popleft()
    return batch

  def get_state(self) -> dict[str, Any]:
    return self._state
