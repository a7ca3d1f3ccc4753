import jax
import jax.numpy as jnp

from dcae_jax.training import freezing


def test_combine_inverts_partition_and_masked_leaves_do_not_exist():
  tree = {"a": {"b": jnp.ones(2), "c": jnp.zeros(3)}, "d": jnp.ones(4)}
  mask = {"a": {"b": True, "c": False}, "d": True}
  trainable, frozen = freezing.partition(tree, mask)
  assert freezing.count(trainable) == 6 and freezing.count(frozen) == 3
  assert freezing.parameter_paths(frozen) == ["a/c"]
  combined = freezing.combine(trainable, frozen)
  assert jax.tree.structure(combined) == jax.tree.structure(tree)
  assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, combined, tree)))
