"""The host's memory: how much there is, and glibc's allocator of it.

XLA's CPU back end allocates what a program needs for each call. By default
glibc gives blocks that large back to the system, which hands them out again as
pages of zeros, one fault each: a quarter of a training step of a small model.
"""

import ctypes
import os
import pathlib
import sys

# Names and numbers of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST_KEPT = 2**30  # bytes; what is larger costs far more than its pages
_LARGEST_OF_OLD_GLIBC = 2**25  # before 2.35 it refuses more

_LIMITS = (  # of a container: cgroups of version 2, and of version 1
  "/sys/fs/cgroup/memory.max",
  "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def total() -> int:
  """Bytes that there are for processes: the machine's, or a lower limit."""
  sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
  for file in map(pathlib.Path, _LIMITS):
    text = file.read_text().strip() if file.exists() else "max"
    sizes += [int(text)] if text.isdigit() else []
  return min(sizes)


def keep_freed() -> None:
  """Keeps freed memory, in blocks of up to a gibibyte, for the next call.

  Call it before jax starts its threads: one arena serves all of them, as those
  of threads hold small blocks only.
  """
  libc = ctypes.CDLL(None) if sys.platform == "linux" else None
  if hasattr(libc, "mallopt"):
    libc.mallopt(_ARENA_MAX, 1)
    if not libc.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT):
      libc.mallopt(_MMAP_THRESHOLD, _LARGEST_OF_OLD_GLIBC)
    libc.mallopt(_TRIM_THRESHOLD, _LARGEST_KEPT)
