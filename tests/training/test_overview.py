import jax
import numpy as np

from dcae_jax.training import overview, sharding


def test_each_parameter_has_a_row_with_its_sharding_and_whether_it_learns():
  shape = lambda *sides: jax.ShapeDtypeStruct(sides, np.float32)
  parameters = {"a": {"kernel": shape(3, 8), "bias": shape(8)}}
  mask = {"a": {"kernel": True, "bias": False}}
  mesh = sharding.create_mesh(1, 8, 1)
  lines = overview.table(
    parameters, mask, sharding.shardings(parameters, mesh)
  ).splitlines()
  rows = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in lines
    if line.startswith("| a")
  ]
  assert rows == [
    ["a/bias", "(8,)", "8", "(None,)", "False"],
    ["a/kernel", "(3, 8)", "24", "(None, 'fsdp')", "True"],
  ]
