"""Metrics of a run: metrics.jsonl, TensorBoard events, PNG samples.

Only the first process writes. After a resume the lines beyond the restored step
are dropped, so that the file reads as if the run had never stopped.
"""

import io
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorboardX
from etils import epath
from PIL import Image, PngImagePlugin

from dcae_jax.runs import regular_files

_SPEED = "train/steps_per_second"
_RATES = (
  _SPEED, "train/images_per_second", "train/model_flops_utilization",
)  # fmt: skip


class MetricsWriter:
  """Writes below one work directory, local or `gs://`."""

  def __init__(self, workdir: epath.Path, first_step: int, enabled: bool):
    """Goes on with the directory's files, or starts them.

    Lines after the restored `first_step` are dropped. Unless `enabled`, as on
    all processes but the first, nothing is written.
    """
    self._enabled = enabled
    if not enabled:
      return
    self._path = workdir / "metrics.jsonl"
    self._samples = workdir / "samples"
    self._samples.mkdir(parents=True, exist_ok=True)
    self._lines = []
    if first_step:  # else step 0 is evaluated again, too
      lines = read_lines(self._path)
      self._lines = [line for line in lines if line["step"] <= first_step]
    text = "".join(json.dumps(line) + "\n" for line in self._lines)
    write_whole(self._path, text)
    self._is_local = "://" not in str(workdir)
    self._board = tensorboardX.SummaryWriter(
      str(workdir), purge_step=first_step + 1 if first_step else None
    )

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Adds one line; remote files are written whole, since they only are so."""
    if not self._enabled:
      return
    line = {"step": step, **{k: float(v) for k, v in values.items()}}
    if self._is_local:
      with self._path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    else:
      self._lines.append(line)
      self._path.write_text("".join(json.dumps(x) + "\n" for x in self._lines))
    for name, value in values.items():
      self._board.add_scalar(name, float(value), step)

  def image(self, step: int, name: str, pixels: np.ndarray) -> None:
    """Saves uint8 [h, w, c] as `samples/<name>_<step>.png` and an event."""
    if not self._enabled:
      return
    write_png(self._samples / f"{name}_{step:08d}.png", pixels)
    self._board.add_image(name, pixels, step, dataformats="HWC")

  def close(self) -> None:
    if self._enabled:
      self._board.close()


def read_lines(path: epath.Path) -> list[dict[str, float]]:
  """The complete lines of a metrics.jsonl; none if there is no file."""
  if not path.exists():
    return []
  lines = []
  data = regular_files.checked(path).read_bytes()
  for text in data.decode(errors="replace").splitlines():
    try:
      line = json.loads(text)
    except json.JSONDecodeError:  # cut off by a kill
      continue
    if isinstance(line, dict) and "step" in line:
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
  path.parent.mkdir(parents=True, exist_ok=True)
  if "://" in str(path):  # objects appear whole
    path.write_bytes(data)
    return
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  temporary.write_bytes(data)
  os.replace(temporary, path)


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
  path.write_bytes(buffer.getvalue())
