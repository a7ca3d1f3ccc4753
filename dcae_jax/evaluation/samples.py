"""The work of an evaluation of samples: draw, decode, describe, write.

Samples come in parts, batches of one guidance scale. A part depends on its
number and the batch size alone, so that any process may draw it, on any number
of devices.
"""

import collections
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dcae_jax import errors
from dcae_jax.autoencoder import autoencoder, quantisation
from dcae_jax.diffusion import conditioning
from dcae_jax.evaluation import metrics as metrics_table
from dcae_jax.evaluation import set_measures
from dcae_jax.latents import decode
from dcae_jax.runs import metrics_writer, progress_lines
from dcae_jax.training import sharding

IMAGES = ("png", "npz", "geneval", "")
_PARTS, _PICTURE = 0, 1  # what the seed is for
_IN_FLIGHT = 2  # parts on the devices


class Part(NamedTuple):
  """A batch of samples of a scale, of which the first `rows` are wanted."""

  scale: float
  number: int
  first: int  # sample
  rows: int

  @property
  def last(self) -> int:
    """The sample after it."""
    return self.first + self.rows

  def file(self, workdir: epath.Path, folder: str) -> epath.Path:
    """`images/...` or `parts/...`; the latter is there once it is written."""
    name = f"{self.number:06d}_{self.rows}.npz"
    return workdir / folder / scale_name(self.scale) / name


def scale_name(scale: float) -> str:
  return f"guidance_{scale:g}"


def parts(scale: float, samples: int, batch_size: int) -> list[Part]:
  """All of a scale."""
  return [
    Part(scale, number, first, min(batch_size, samples - first))
    for number, first in enumerate(range(0, samples, batch_size))
  ]


def missing(
  wanted: list[Part], workdir: epath.Path, images: str, order: "Order"
) -> list[Part]:
  """The parts that lack their record or an image."""
  names = {}
  for folder in {part.file(workdir, "images").parent for part in wanted}:
    if images == "geneval":
      files = folder.glob("*/samples/*.png") if folder.exists() else []
      names[folder] = {f"{x.parent.parent.name}/{x.name}" for x in files}
    else:
      files = [x.name for x in folder.iterdir()] if folder.exists() else []
      names[folder] = {*files, *(name.partition("_")[0] for name in files)}

  def is_whole(part):
    file, samples = part.file(workdir, "images"), range(part.first, part.last)
    needed = {
      "": [],
      "npz": [file.name],
      "png": [_png_name(sample) for sample in samples],
      "geneval": ["/".join(_geneval_place(x, order)) for x in samples],
    }[images]
    record = part.file(workdir, "parts")
    return record.exists() and names[file.parent].issuperset(needed)

  return [part for part in wanted if not is_whole(part)]


def _png_name(sample: int) -> str:
  """The start of the name; its condition follows."""
  return f"{sample:07d}"


def _geneval_place(sample: int, order: "Order") -> tuple[str, str]:
  """The folder of a sample's prompt, and the name of its file."""
  repetition, prompt = divmod(sample, len(order.choices))
  return f"{prompt:05d}", f"{repetition:05d}.png"


class Decoder(NamedTuple):
  """What makes images of latents, and the description of the latents."""

  autoencoder: autoencoder.Autoencoder
  description: dict[str, Any]


class Order(NamedTuple):
  """Which samples are drawn: what is chosen for each part.

  `metadata` has an object for each of the choices, where their file has.
  """

  kind: conditioning.Conditioning
  choices: np.ndarray
  metadata: Sequence[dict[str, Any]]
  at_random: bool  # with replacement, instead of in turn
  batch_size: int
  seed: int  # of noise and conditions

  def part(self, number: int) -> np.ndarray:
    """What is chosen for a part."""
    seed = self.seed if self.at_random else None
    return conditioning.drawn(self.choices, number, self.batch_size, seed)


class Drawing:
  """The programs that draw, decode and describe, over a process's devices."""

  def __init__(
    self,
    samplers: dict[float, Callable[..., jax.Array]],
    told: Callable[[np.ndarray], tuple[conditioning.Condition, Any]],
    variables: Any,
    decoder: Decoder,
    metrics: set_measures.Metrics,
    parameters: Mapping[str, Any],
    order: Order,
  ):
    """Compiles nothing yet.

    Args:
      samplers: by guidance scale, `(variables, key, condition, null) ->
        latents`.
      told: of what is chosen, the condition and its null; None: the usual one.
      variables: of the denoiser, on all devices.
      decoder: its variables go to all devices.
      metrics: all outputs of networks that any of them needs are written, also
        for metrics that are asked for later.
      parameters: of the networks, by their keys.
      order: of the samples.
    """
    mesh = sharding.local_mesh()
    whole, self._by_row = sharding.replicated(mesh), sharding.by_rows(mesh)
    ae, description = decoder
    ae.variables = jax.device_put(jax.device_get(ae.variables), whole)
    self._variables, self._decoder = variables, ae.variables
    self._told = told
    self._parameters = jax.device_put(dict(parameters), whole)
    self.order = order
    self._samplers = {
      scale: jax.jit(sampler, out_shardings=self._by_row)
      for scale, sampler in samplers.items()
    }

    def show(variables, parameters, z):
      latents = decode.normalisation(description).undo(z)
      pixels = quantisation.quantise(
        ae.apply(variables, latents, method="decode")
      )
      described = set_measures.describe(metrics, parameters, pixels)
      return {
        "images": pixels.astype(jnp.uint8),
        "latent_rms": jnp.sqrt(jnp.mean(jnp.square(z), axis=(1, 2, 3))),
      } | {
        _array_name(network, output): x
        for network, outputs in described.items()
        for output, x in outputs.items()
      }

    self._show = jax.jit(show, out_shardings=self._by_row)

  def part(self, part: Part) -> dict[str, Any]:
    """Its arrays [batch_size, ...], still being computed."""
    choices = self.order.part(part.number)
    return self._draw(part.scale, (_PARTS, part.number), choices)

  def images(self, scale: float, choices: np.ndarray) -> np.ndarray:
    """Uint8 [n, h, w, c] of some choices; the same noise at each scale."""
    size, drawn = self.order.batch_size, []
    total = len(choices)
    for first in range(0, total, size):
      # The last batch is filled up with its own rows.
      places = np.resize(np.arange(first, min(first + size, total)), size)
      shown = self._draw(scale, (_PICTURE, first), choices[places])
      drawn.append(shown["images"])
    return np.concatenate(jax.device_get(drawn))[:total]

  def _draw(
    self, scale: float, purpose: tuple[int, int], choices: np.ndarray
  ) -> dict[str, Any]:
    key = jax.random.key(self.order.seed)
    for number in purpose:
      key = jax.random.fold_in(key, number)
    told = jax.device_put(self._told(choices), self._by_row)
    z = self._samplers[scale](self._variables, key, *told)
    return self._show(self._decoder, self._parameters, z)


def fill(
  drawing: Drawing,
  missing: list[Part],
  workdir: epath.Path,
  images: str,
  stopped: Callable[[], bool],
) -> None:
  """Draws and writes parts: images, a kind of `IMAGES`, and then the record.

  Raises:
    FloatingPointError: latents are not finite.
  """
  total = sum(part.rows for part in missing)
  with (
    progress_lines.Progress(total) as progress,
    futures.ThreadPoolExecutor(os.cpu_count()) as pool,
  ):
    for part, arrays in _fetched(drawing, missing, stopped):
      if not np.isfinite(arrays["latent_rms"]).all():
        raise FloatingPointError(
          f"samples at guidance {part.scale:g} are not finite (part "
          f"{part.number}): the scale is too large, the model has diverged, or "
          "dopri5 needs more config.sampler.steps"
        )
      _write(part, arrays, drawing.order, workdir, images, pool)
      progress.add(part.rows)
  if missing:
    progress.finish()


def _fetched(
  drawing: Drawing, missing: list[Part], stopped: Callable[[], bool]
) -> Iterator[tuple[Part, dict[str, np.ndarray]]]:
  """Parts with the arrays of their rows; the devices have the next one."""
  waiting, in_flight = collections.deque(missing), collections.deque()
  while waiting or in_flight:
    if stopped():
      waiting.clear()
    if waiting:
      part = waiting.popleft()
      in_flight.append((part, drawing.part(part)))
    if in_flight and (not waiting or len(in_flight) >= _IN_FLIGHT):
      part, arrays = in_flight.popleft()
      arrays = jax.device_get(arrays)
      order = drawing.order
      arrays |= {order.kind.name: order.part(part.number)}
      yield part, {name: x[: part.rows] for name, x in arrays.items()}


def _write(
  part: Part,
  arrays: dict[str, np.ndarray],
  order: Order,
  workdir: epath.Path,
  images: str,
  pool: futures.Executor,
) -> None:
  kind = order.kind
  pixels, condition = arrays.pop("images"), arrays[kind.name]
  record, file = (part.file(workdir, folder) for folder in ("parts", "images"))
  for parent in (record.parent, file.parent):
    if parent.exists():  # maybe with fewer samples, of an earlier start
      for shorter in parent.glob(f"{part.number:06d}_*.npz"):
        shorter.unlink()
  if images == "npz":
    _write_npz(file, {"arr_0": pixels, "arr_1": condition})
  files, samples = [], range(part.first, part.last)
  if images == "png":
    file.parent.mkdir(parents=True, exist_ok=True)
    files = [
      file.parent / f"{_png_name(sample)}_{name}.png"
      for sample, name in zip(samples, kind.file_names(condition), strict=True)
    ]
  if images == "geneval":
    for sample in samples:
      folder, name = _geneval_place(sample, order)
      folder = file.parent / folder
      (folder / "samples").mkdir(parents=True, exist_ok=True)
      metadata = order.metadata[sample % len(order.choices)]
      (folder / "metadata.jsonl").write_text(json.dumps(metadata))
      files.append(folder / "samples" / name)
  if files:
    scale = {"guidance": f"{part.scale:g}"}
    texts = [scale | of_row for of_row in kind.texts(condition)]
    list(pool.map(metrics_writer.write_png, files, pixels, texts))
  _write_npz(record, arrays)


def check_not_fewer(
  workdir: epath.Path, scale: float, samples: int, batch_size: int
) -> None:
  """Raises UserError if there are more samples of a scale than are wanted."""
  folder = workdir / "parts" / scale_name(scale)
  for file in folder.glob("*_*.npz") if folder.exists() else ():
    number, rows = map(int, file.stem.split("_"))
    if number * batch_size + rows > samples:
      raise errors.UserError(
        f"--workdir={workdir} holds more than config.samples={samples} samples "
        f"at guidance {scale:g}; choose another directory, or as many"
      )


def _write_npz(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  metrics_writer.write_whole(path, buffer.getvalue())


def _array_name(network: str, output: str) -> str:
  """In a record; outputs of the Inception keep their names."""
  inception = metrics_table.INCEPTION.key
  return output if network == inception else f"{network}_{output}"


class Record(NamedTuple):
  """What is written of a part beside its images."""

  latent_rms: np.ndarray  # of each sample
  described: dict[str, dict[str, np.ndarray]]  # by networks


def read_records(
  workdir: epath.Path, wanted: list[Part], metrics: set_measures.Metrics
) -> Iterator[Record]:
  """What metrics need of what `fill` wrote; UserError if it is damaged."""
  outputs = {
    network.key: {name: _array_name(network.key, name) for name in names}
    for network, names in set_measures.outputs(metrics).items()
  }
  for part in wanted:
    file = part.file(workdir, "parts")
    try:
      with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
        described = jax.tree.map(lambda name: arrays[name], outputs)
        record = Record(arrays["latent_rms"], described)
    except Exception as error:  # whatever a damaged file makes of numpy
      raise errors.UserError(
        f"{file} is damaged ({error}); remove it and run again: these samples "
        "are drawn anew"
      ) from error
    yield record
