"""A directory or bucket prefix that is filled by any number of starts.

`progress/identity.json` says what is made there until `manifest.json` is, which
is written last.
"""

from typing import Any

from dcae_jax import errors
from dcae_jax.runs import differences, lease, storage

MANIFEST, IDENTITY = "manifest.json", "progress/identity.json"
PROBE = "progress.probe_"


class ResumableStore:
  """What is the same for all kinds of them.

  Attributes:
    storage: the objects.
    progress: prefixes of what is only there until the end.
  """

  progress: tuple[str, ...] = (PROBE, "progress/shards/", IDENTITY)

  def __init__(
    self,
    path: str,
    *,
    what: str,
    description: dict[str, Any],
    retries: int = storage.RETRIES,
  ):
    """Opens nothing yet.

    Args:
      path: local or `gs://`.
      what: it holds, for messages.
      description: what manifests and identities begin with.
      retries: of a request to a bucket.
    """
    self.storage = storage.Storage(path, retries=retries)
    self.description, self._what = description, what

  def check_writable(self, process_index: int = 0) -> None:
    """Finds out whether this process may write here.

    Raises:
      OSError: no such bucket, no permission, no answer.
      UserError: the place holds something else.
    """
    if self._described() is None:
      keys = self.storage.list_keys()
      own = (*self.progress, lease.DIRECTORY)
      foreign = [key for key in keys if not key.startswith(own)]
      if foreign:
        raise errors.UserError(
          f"{self.storage.path} holds {min(foreign)} of something else; choose "
          "another config.output"
        )
    self.storage.check_writable(f"{PROBE}{process_index}")

  def _described(self) -> dict[str, Any] | None:
    manifest = self.manifest()
    if manifest is not None:
      return manifest
    return self.storage.read_json(IDENTITY)

  def check_identity(self, identity: dict[str, Any], begun: bool) -> None:
    """Raises UserError if the place holds what other work has made.

    Args:
      identity: what must be the same; None: the work computes it.
      begun: this work must be there. If False, other work that has no finished
        shard does not count.
    """
    before = self._described()
    if before is None and begun:
      raise errors.UserError(
        f"{self.storage.path} is not the same place for all processes; use a "
        "bucket, or a directory that all of them share, as config.output"
      )
    if before is None or not (
      begun or "count" in before or self.storage.list_keys("progress/shards/")
    ):
      return
    identity = self.description | identity
    if "count" in before:  # a manifest, which has what the work computed
      identity = {k: v for k, v in identity.items() if v is not None}
    compared = differences.flat(identity)
    flat = differences.flat(before).items()
    differences.check_same(
      {key: value for key, value in flat if key in compared},
      compared,
      f"{self.storage.path} holds {self._what}",
      "choose another config.output, or the same settings to go on with it",
    )

  def write_identity(self, identity: dict[str, Any]) -> None:
    """Called by one process, after `check_identity` and before all else."""
    before, identity = self._described(), self.description | identity
    if before is None or ("count" not in before and before != identity):
      self.clear()
      self.remove_progress()
      self.storage.write_sealed_json(IDENTITY, identity)

  def clear(self) -> None:
    """Removes what other work has begun, besides its progress."""

  def manifest(self) -> dict[str, Any] | None:
    """None before the store is finished."""
    return self.storage.read_json(MANIFEST)

  def remove_progress(self) -> None:
    """Once more, where the last process was killed before it could."""
    for prefix in self.progress:
      self.storage.delete(prefix)
    if not self.storage.list_keys("progress/"):
      self.storage.delete("progress/")  # a local folder, if it is empty
