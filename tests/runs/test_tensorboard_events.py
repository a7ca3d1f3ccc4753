import io
import struct

import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2

from dcae_jax.runs import tensorboard_events


def _events(data):
  """As TensorBoard reads a file."""
  found = []
  while data:
    (length,) = struct.unpack("<Q", data[:8])
    end = 12 + length
    for part, at in ((data[:8], 8), (data[12:end], end)):
      (checksum,) = struct.unpack("<I", data[at : at + 4])
      assert record_writer.masked_crc32c(part) == checksum
    found.append(event_pb2.Event.FromString(data[12:end]))
    data = data[end + 4 :]
  assert found[0].file_version == "brain.Event:2"
  return found[1:]


def _values(events):
  return [
    (event.step, value.tag, pytest.approx(value.simple_value))
    for event in events
    for value in event.summary.value
  ]


@pytest.fixture
def bucket(gs, emulator, monkeypatch):
  """A function: the contents of the files of events, in TensorBoard's order.

  Each event is followed by a flush.
  """
  monkeypatch.setattr(tensorboard_events, "_SECONDS_BETWEEN_FLUSHES", -1)
  return lambda: [
    emulator.read("dcae-gs", name)
    for name in emulator.names("dcae-gs")
    if "tfevents" in name
  ]


def _writer(gs):
  return tensorboard_events.TensorBoardEvents(epath.Path(f"{gs}/run"), 0)


def _picture(seed):
  pixels = np.random.default_rng(seed).integers(0, 256, (400, 300, 3))
  return pixels.astype(np.uint8)


def test_events_in_a_bucket_are_those_of_a_directory(gs, bucket, tmp_path):
  """Pictures, too, of which each ends a part."""
  local = tensorboard_events.TensorBoardEvents(epath.Path(tmp_path), 0)
  for writer in (local, _writer(gs)):
    for step in range(1, 7):
      writer.scalars(step, {"train/loss/l1": step / 8, "train/loss": 0.5})
      if step % 3 == 0:
        writer.image(step, "samples", _picture(step))
    writer.close()
  (file,) = tmp_path.iterdir()
  expected, parts = _events(file.read_bytes()), [_events(x) for x in bucket()]
  found = [event for part in parts for event in part]
  assert len(parts) == 2 and _values(found) == _values(expected)
  assert _values(found)[:2] == [(1, "train/loss/l1", 0.125),
                                (1, "train/loss", 0.5)]  # fmt: skip
  for number, events in ((3, parts[0]), (6, parts[1])):
    (value,) = events[-1].summary.value
    pixels = Image.open(io.BytesIO(value.image.encoded_image_string))
    assert value.tag == "samples"
    np.testing.assert_array_equal(np.asarray(pixels), _picture(number))


def test_pictures_are_uploaded_to_a_bucket_once(gs, bucket, emulator):
  """With flushes between them, of which each uploads some events again."""
  writer, pictures = _writer(gs), 5
  for step in range(40 * pictures):
    writer.scalars(step, {"train/loss/l1": 0.5})
    if step % 40 == 0:
      writer.image(step, "samples", _picture(step))
  writer.close()
  written = sum(map(len, bucket()))
  assert written > pictures * _picture(0).nbytes
  # With one file it was 100 times as much as is written.
  assert written <= sum(emulator.sizes) < 1.3 * written


def test_a_long_run_has_few_files(gs, bucket, monkeypatch):
  monkeypatch.setattr(tensorboard_events, "_BYTES_OF_A_PART", 100)
  monkeypatch.setattr(tensorboard_events, "_PARTS_BEFORE_LONGER_ONES", 4)
  writer = _writer(gs)
  for step in range(400):
    writer.scalars(step, {"train/loss/l1": 0.5})
  writer.close()
  parts = [_events(data) for data in bucket()]
  assert [event.step for part in parts for event in part] == list(range(400))
  # Of 100, 200, ... bytes, four of each; an event has about 60.
  assert 20 < len(parts) < 4 * np.log2(400 * 60 / 100)


def test_a_killed_run_has_what_was_flushed(gs, bucket):
  """Later ones hide what it wrote after the step that they begin with."""
  _writer(gs).scalars(1, {"train/loss/l1": 0.5})
  writer = tensorboard_events.TensorBoardEvents(epath.Path(f"{gs}/run"), 7)
  writer.scalars(8, {"train/loss/l1": 0.5})
  writer.close()
  before, after = map(_events, bucket())
  assert [event.step for event in before] == [1]
  assert [event.step for event in after] == [8, 8]
  start = event_pb2.SessionLog.START
  assert after[0].session_log.status == start
