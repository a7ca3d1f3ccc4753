"""What `import dcae_jax` gives."""

import ast
import inspect
import pkgutil

import dcae_jax


def test_type_checkers_see_what_the_package_gives():
  """Names come on first use, and those that checkers read stand beside them."""
  seen = {}
  for node in ast.walk(ast.parse(inspect.getsource(dcae_jax))):
    if isinstance(node, ast.ImportFrom) and node.module.startswith("dcae_jax"):
      for alias in node.names:
        found = pkgutil.resolve_name(f"{node.module}.{alias.name}")
        seen[alias.asname or alias.name] = found
  assert {name: getattr(dcae_jax, name) for name in dcae_jax.__all__} == seen
