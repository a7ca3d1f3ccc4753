"""An object of a bucket as a file that is read from here and there."""

import errno
import io
import os

from dcae_jax.runs import storage


class RemoteFile(io.RawIOBase):
  """Reads at least `ahead` bytes at once, and keeps the last of these blocks.

  What is read in order is asked for once. Raises OSError for what storage
  refuses.
  """

  def __init__(self, place: storage.Storage, key: str, size: int, ahead: int):
    super().__init__()
    self._place, self._key, self._size = place, key, size
    self._ahead, self._position = ahead, 0
    self._start, self._block = 0, b""

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._position

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    origins = {os.SEEK_CUR: self._position, os.SEEK_END: self._size}
    self._position = origins.get(whence, 0) + offset
    return self._position

  def readinto(self, buffer) -> int:
    start = min(self._position, self._size)
    stop = min(start + len(buffer), self._size)
    if start < self._start or stop > self._start + len(self._block):
      end = min(max(stop, start + self._ahead), self._size)
      data = self._place.read_range(self._key, start, end)
      if data is None:
        name = f"{self._place.path}/{self._key}"
        raise FileNotFoundError(errno.ENOENT, "there is no such object", name)
      self._start, self._block = start, data
    part = self._block[start - self._start : stop - self._start]
    buffer[: len(part)] = part
    self._position = start + len(part)
    return len(part)
