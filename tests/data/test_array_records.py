"""Record files: what is written is what their own library reads, and we."""

import random

import pytest
from array_record.python import array_record_module

from dcae_jax.data import array_records


@pytest.mark.parametrize("seed", range(4))
def test_records_are_ranges_of_their_file(seed, tmp_path):
  rng = random.Random(seed)
  # Around the blocks of 64 KiB, whose headers stand in the midst of records.
  sizes = [rng.choice((0, 1, 300, 65_200 + i, 2**17)) for i in range(300)]
  records = [rng.randbytes(size) for size in sizes]
  path = str(tmp_path / "records")
  offsets = array_records.write(path, iter(records))
  data = (tmp_path / "records").read_bytes()
  for record, offset in zip(records, offsets, strict=True):
    part = data[offset : array_records.stop(offset, len(record))]
    assert array_records.without_headers(part, offset) == record
  reader = array_record_module.ArrayRecordReader(path)
  assert reader.read_all() == records


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path):
  with pytest.raises(OSError, match="No such file"):
    array_records.write(str(tmp_path / "nowhere/x"), [b"record"])
