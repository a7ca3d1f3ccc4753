"""TensorBoard events in a work directory, local or `gs://`.

An object in a bucket cannot be appended to, so that all of it is uploaded again
with each flush. There, events are in parts: a part that is long enough is left
alone, and the next one begun. TensorBoard reads all of them, one by one.
"""

import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from dcae_jax.runs import storage

_SECONDS_BETWEEN_FLUSHES = 120  # to a bucket
# A part that has as many bytes is left alone. Most pictures have more, and are
# uploaded once. Doubled after so many parts of a process, since TensorBoard
# opens each of them.
_BYTES_OF_A_PART = 2**18
_PARTS_BEFORE_LONGER_ONES = 128


class TensorBoardEvents:
  """Writes events of one process, which are seen beside those of others."""

  @staticmethod
  def check() -> None:
    """Nothing can be missing."""

  def __init__(self, workdir: epath.Path, first_step: int):
    """After a resume, what other files have after `first_step` is hidden."""
    # Not above: it imports torch where that is installed, for a second.
    from tensorboardX import record_writer, summary
    from tensorboardX.proto import event_pb2

    self._event, self._summary = event_pb2.Event, summary
    self._checksum = record_writer.masked_crc32c
    # TensorBoard reads the files in the order of their names.
    self._name = f"events.out.tfevents.{time.time():.3f}.{socket.gethostname()}"
    self._file = self._storage = None
    if "://" in str(workdir):
      self._storage = storage.Storage(str(workdir))
    else:
      self._file = open(workdir / self._name, "ab", buffering=0)  # noqa: SIM115
      self._file.write(self._head())
    self._flushed = time.monotonic()
    self._parts, self._part, self._is_new = 0, bytearray(self._head()), False
    if first_step:
      status = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._add(self._event(step=first_step + 1, session_log=status))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    event = self._event(step=step)
    for name, value in values.items():
      event.summary.MergeFrom(self._summary.scalar(name, value))
    self._add(event)

  def image(self, step: int, name: str, pixels: np.ndarray) -> None:
    found = self._summary.image(name, pixels, dataformats="HWC")
    self._add(self._event(step=step, summary=found))

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
    elif self._is_new:
      self._upload()

  def _add(self, event: Any) -> None:
    record = self._record(event)
    if self._file is not None:
      self._file.write(record)
      return
    self._part += record
    self._is_new = True
    if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
      self._upload()

  def _upload(self) -> None:
    self._storage.write(f"{self._name}.{self._parts:06d}", bytes(self._part))
    self._flushed, self._is_new = time.monotonic(), False
    longer = self._parts // _PARTS_BEFORE_LONGER_ONES
    if len(self._part) >= _BYTES_OF_A_PART << longer:
      self._parts, self._part = self._parts + 1, bytearray(self._head())

  def _head(self) -> bytes:
    """Of each file."""
    return self._record(self._event(file_version="brain.Event:2"))

  def _record(self, event: Any) -> bytes:
    """As files of TFRecord have it: with its length, and checksums of both."""
    event.wall_time = time.time()
    data = event.SerializeToString()
    checksum = lambda x: struct.pack("<I", self._checksum(x))
    length = struct.pack("<Q", len(data))
    return b"".join((length, checksum(length), data, checksum(data)))
