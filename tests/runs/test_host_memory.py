import os
import platform
import subprocess
import sys

import pytest

from dcae_jax.runs import host_memory

_PROGRAM = """
import resource
import jax
import jax.numpy as jnp
from dcae_jax.runs import host_memory

if {keep}:
  host_memory.keep_freed()
f = jax.jit(lambda x: jnp.sum(jnp.sort(x) + 1))  # sorts a copy
x = jnp.arange(4 << 20, dtype=jnp.float32)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):  # until the heap has grown to what calls need
  f(x).block_until_ready()
before = faults()
for _ in range(5):
  f(x).block_until_ready()
print(faults() - before)
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="of glibc's allocator"
)
def test_a_program_finds_its_memory_again():
  def faults(keep):
    done = subprocess.run(
      [sys.executable, "-c", _PROGRAM.format(keep=keep)],
      check=True,
      env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
      stdout=subprocess.PIPE,
      text=True,
    )
    return int(done.stdout)

  assert faults(keep=True) < faults(keep=False) / 2


def test_the_memory_of_a_container_is_its_limit(monkeypatch, tmp_path):
  monkeypatch.setattr(host_memory, "_LIMITS", ())
  machine = host_memory.total()
  assert machine > 2**27
  for limit, total in (("max", machine), ("4096", 4096), (f"{2**63}", machine)):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    files = (str(tmp_path / "absent"), str(tmp_path / "memory.max"))
    monkeypatch.setattr(host_memory, "_LIMITS", files)
    assert host_memory.total() == total
