"""An index as a file, and in memory."""

import contextlib

import numpy as np
import pyarrow as pa

from dcae_jax import errors
from dcae_jax.data import index
from dcae_jax.data.sources import containers


def test_a_byte_that_changed_in_a_file_is_noticed():
  """If any value would be another; the footer has no checksum."""
  labels = np.arange(300, dtype=np.int32)
  values = {"key": [f"key{i}" for i in labels], "label": labels}
  table = containers.completed(pa.table(values))
  data, noticed = index.to_parquet(table), 0
  footer = int.from_bytes(data[-8:-4], "little")
  for place in range(4, len(data) - footer - 8, 9):
    damaged = bytearray(data)
    damaged[place] ^= 0x80
    noticed += 1
    with contextlib.suppress(errors.UserError):
      read = index.from_parquet(bytes(damaged), "a.parquet")
      assert read.cast(table.schema).equals(table)
      noticed -= 1
  assert noticed > 200
