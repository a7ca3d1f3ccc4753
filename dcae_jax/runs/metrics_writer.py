"""Metrics of a run: metrics.jsonl, PNG samples, and writers beside them.

Only the first process writes. After a resume the lines beyond the restored step
are dropped, so that the file reads as if the run had never stopped.
"""

import contextlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath
from PIL import Image, PngImagePlugin

from dcae_jax import errors
from dcae_jax.runs import (
  json_types,
  regular_files,
  storage,
  tensorboard_events,
  weights_and_biases,
)

_LOG = logging.getLogger(__name__)
_SECONDS_BETWEEN_UPLOADS = 120  # to a bucket, where each is of the whole file
_LINE = {"step": int, "*": json_types.NUMBER}
_SPEED = "train/steps_per_second"
_RATES = (
  _SPEED, "train/images_per_second", "train/model_flops_utilization",
)  # fmt: skip


class Writer(Protocol):
  """One more place for metrics and pictures, a value of `WRITERS`."""

  @staticmethod
  def check() -> None:
    """Raises UserError where what it needs is not there."""

  def __init__(self, workdir: epath.Path, first_step: int): ...

  def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

  def image(self, step: int, name: str, pixels: np.ndarray) -> None: ...

  def close(self) -> None: ...


WRITERS: dict[str, type[Writer]] = {
  "tensorboard": tensorboard_events.TensorBoardEvents,
  "wandb": weights_and_biases.WeightsAndBiases,
}


def check(writers: Sequence[str], enabled: bool) -> None:
  """Raises UserError for unknown writers.

  And if `enabled`, as on the first process, for those that cannot write.
  """
  for name in writers:
    if name not in WRITERS:
      raise errors.UserError(
        f"unknown writer {name!r} in config.writers; known are "
        f"{', '.join(WRITERS)}"
      )
    if enabled:
      WRITERS[name].check()


class MetricsWriter:
  """Writes below one work directory, local or `gs://`.

  A run does without other writers that fail, and says so.
  """

  def __init__(
    self,
    workdir: epath.Path,
    first_step: int,
    evaluates_first: bool,
    enabled: bool,
    writers: Sequence[str] = (),
  ):
    """Goes on with the directory's files, or starts them.

    Lines after the restored `first_step` are dropped, and its evaluation, if it
    is made again. Unless `enabled`, as on all processes but the first, nothing
    is written. `writers` are names of `WRITERS`.
    """
    self._enabled = enabled
    if not enabled:
      return
    self._path = workdir / "metrics.jsonl"
    self._samples = workdir / "samples"
    self._samples.mkdir(parents=True, exist_ok=True)
    self._lines = []
    for line in read_lines(self._path):
      is_last = line["step"] == first_step
      if is_last and evaluates_first and is_evaluation(line):
        continue
      if first_step and line["step"] <= first_step:
        self._lines.append(line)
    text = "".join(json.dumps(line) + "\n" for line in self._lines)
    if text:
      write_whole(self._path, text)
    else:
      self._path.unlink(missing_ok=True)
    self._is_local = "://" not in str(workdir)
    self._uploaded = time.monotonic(), len(self._lines)
    self._writers: dict[str, Writer] = {}
    for name in writers:
      with self._attempt(name):
        self._writers[name] = WRITERS[name](workdir, first_step)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Adds one line; to a bucket they are uploaded together, see `flush`."""
    if not self._enabled:
      return
    values = {k: float(v) for k, v in values.items()}
    line = {"step": step, **values}
    if self._is_local:
      with self._path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    else:
      self._lines.append(line)
      if time.monotonic() - self._uploaded[0] > _SECONDS_BETWEEN_UPLOADS:
        self.flush()
    self._each(lambda writer: writer.scalars(step, values))

  def image(self, step: int, name: str, pixels: np.ndarray) -> None:
    """Saves uint8 [h, w, c] as `samples/<name>_<step>.png`."""
    if not self._enabled:
      return
    write_png(self._samples / f"{name}_{step:08d}.png", pixels)
    self._each(lambda writer: writer.image(step, name, pixels))

  def flush(self) -> None:
    """What was added is in `metrics.jsonl` from here on."""
    if self._enabled and not self._is_local:
      if len(self._lines) > self._uploaded[1]:
        text = "".join(json.dumps(x) + "\n" for x in self._lines)
        write_whole(self._path, text)
      self._uploaded = time.monotonic(), len(self._lines)

  def close(self) -> None:
    if self._enabled:
      self._each(lambda writer: writer.close())
      self.flush()

  def _each(self, call: Callable[[Writer], None]) -> None:
    for name, writer in list(self._writers.items()):
      with self._attempt(name):
        call(writer)

  @contextlib.contextmanager
  def _attempt(self, name: str) -> Iterator[None]:
    try:
      yield
    except errors.UserError:
      raise
    except Exception as error:  # clients have their own kinds
      self._writers.pop(name, None)
      _LOG.warning("%s writes no more: %s", name, errors.first_line(error))


def is_evaluation(line: Mapping[str, float]) -> bool:
  """Whether a line of a metrics.jsonl is of an evaluation."""
  return any(key.startswith("eval/") for key in line)


def read_lines(path: epath.Path) -> list[dict[str, float]]:
  """The complete lines of a metrics.jsonl; none if there is no file.

  Raises UserError for lines that are no metrics of a step.
  """
  if not path.exists():
    return []
  lines = []
  data = regular_files.checked(path).read_bytes()
  texts = data.decode(errors="replace").splitlines()
  for number, text in enumerate(texts, 1):
    try:
      line = json.loads(text)
    except (ValueError, RecursionError):  # cut off by a kill
      continue
    json_types.check(f"line {number} of {path}", line, _LINE, "remove it")
    lines.append(line)
  return lines


def last_values(path: epath.Path, step: int | None = None) -> dict[str, float]:
  """The last value of each metric of a metrics.jsonl, maybe of one step."""
  values = {}
  for line in read_lines(path):
    if step in (None, line["step"]):
      values |= line
  return values


def seconds_of_training(lines: Iterable[Mapping[str, float]]) -> list[float]:
  """What the steps of each line took, without evaluations and checkpoints.

  0 for a line without a speed. Steps whose own line was lost, because a run was
  stopped after them, count as the steps after them.
  """
  found, before = [], 0
  for line in lines:
    found.append(0.0)
    if _SPEED in line:
      found[-1] = (line["step"] - before) / line[_SPEED]
      before = line["step"]
  return found


def final_values(path: epath.Path) -> dict[str, float]:
  """The last value of each metric, with the speeds of the whole training.

  `train/seconds` are those of all steps, also before restarts; the rates are
  means over these seconds: steps per second are all steps over all seconds.
  """
  lines, values = read_lines(path), last_values(path)
  seconds = seconds_of_training(lines)
  for key in _RATES:
    of_lines = [
      (s, line[key])
      for s, line in zip(seconds, lines, strict=True)
      if key in line
    ]
    if of_lines:
      total = sum(s for s, _ in of_lines)
      values[key] = sum(s * rate for s, rate in of_lines) / total
  if any(seconds):
    values["train/seconds"] = sum(seconds)
  return values


def write_whole(path: epath.Path, text: str | bytes) -> None:
  """Writes a small file so that it is never seen, or left, half-written.

  Text in UTF-8; what file names may hold and text may not becomes escapes.
  """
  is_text = isinstance(text, str)
  data = text.encode("utf-8", "backslashreplace") if is_text else text
  if "://" in str(path):  # objects appear whole
    storage.Storage(str(path.parent)).write(path.name, data)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temporary.write_bytes(data)
    os.replace(temporary, path)
  except OSError:  # on a full disk a part of it would stay, at each try
    temporary.unlink(missing_ok=True)
    raise


def write_json(path: epath.Path, value: Any) -> None:
  """Writes it indented, for people; whole or not at all."""
  write_whole(path, json.dumps(value, indent=2))


def read_png(path: epath.Path) -> np.ndarray:
  """Inverse of `write_png`."""
  with Image.open(
    io.BytesIO(regular_files.checked(path).read_bytes())
  ) as image:
    pixels = np.asarray(image)
  return pixels if pixels.ndim == 3 else pixels[..., None]


def write_png(
  path: epath.Path, pixels: np.ndarray, texts: Mapping[str, str] | None = None
) -> None:
  """Writes uint8 [h, w, 1 or 3] to a local or `gs://` path.

  Texts, by their keywords, are kept in the file.
  """
  if pixels.shape[-1] == 1:
    pixels = pixels[..., 0]
  kept = PngImagePlugin.PngInfo()
  for keyword, text in (texts or {}).items():
    kept.add_itxt(keyword, text)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=kept)
  write_whole(path, buffer.getvalue())
