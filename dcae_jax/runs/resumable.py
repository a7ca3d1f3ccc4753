"""Work in pieces that processes share, each of which is done exactly once.

A piece is done when its last object is written: a process that is killed at any
moment leaves finished pieces and others, never half of one, and whoever starts
again does what is missing. What the pieces are, where they are written and what
makes it the same work is up to the caller.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax

from dcae_jax.runs import processes

_LOG = logging.getLogger(__name__)
Piece = TypeVar("Piece")


class Work:
  """One process's part of the work."""

  def __init__(self, name: str, stopped: Callable[[], bool]):
    """Its name is the same in all processes.

    Once it has `stopped`, as after SIGTERM, this process finishes the pieces
    that it has begun, and begins no others.
    """
    self._name, self.stopped = name, stopped

  def begin(
    self, check: Callable[[bool], None], write: Callable[[], None]
  ) -> None:
    """All processes begin the same work in the same place, or none does.

    `check` raises UserError where the place holds other work; it is told
    whether this work must have begun there. Once all have checked, `write`
    begins the work, on the first process.
    """
    check(False)
    self.wait("checked")
    if jax.process_index() == 0:
      write()
    self.wait("begun")
    check(True)

  def share(self, missing: Sequence[Piece]) -> Sequence[Piece]:
    """This process's part of the missing pieces."""
    self.wait("plan")  # nobody writes before all have looked
    return missing[jax.process_index() :: jax.process_count()]

  def all_done(self, stage: str) -> bool:
    """Waits for all processes to do their part; False where this one stops."""
    if self.stopped():
      _LOG.info("stopped; run again to go on")
      if jax.process_count() > 1:
        processes.leave(0)
      return False
    self.wait(stage)
    return True

  def wait(self, stage: str) -> None:
    """Until every process is here; OSError if one of them has ended."""
    processes.wait_for_all(f"{self._name}_{stage}")
