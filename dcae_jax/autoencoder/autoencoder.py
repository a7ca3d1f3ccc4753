"""`Autoencoder`: load, encode, decode and save, for those who only use one.

  import dcae_jax
  ae = dcae_jax.load("mit-han-lab/dc-ae-f64c128-in-1.0-diffusers")
  z = ae.encode(images)
  y = ae.decode(z)

On one device; training and evaluation over many devices are tasks of their own.
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from dcae_jax import errors
from dcae_jax.autoencoder import (
  arrays,
  families,
  latent_statistics,
  model_card,
  network,
  tiling,
)
from dcae_jax.autoencoder.weights import conversion, released, safetensors_files
from dcae_jax.runs import work_directory
from dcae_jax.training import checkpoint

_LARGEST_BATCH = 16  # images at a time; a larger batch goes in parts


def load(
  path: str | os.PathLike,
  *,
  scaling_factor: float | None = None,
  dtype: DTypeLike = "float32",
  space_to_channel: int = 1,
) -> "Autoencoder":
  """Loads an autoencoder, a DC-AE or an SD-VAE.

  Args:
    path: the work directory of a training run (its averages are loaded), a
      folder of released weights in the diffusers or the original layout, a
      safetensors file, or a hub id, which is downloaded once and cached
      (`HF_HUB_OFFLINE=1` uses the cache alone).
    scaling_factor: needed only for weights without a config.
    dtype: of the computation; parameters stay float32.
    space_to_channel: side of the squares of latent positions that are moved
      into channels: 8 makes an f8c4 an f64c256. Its weights and its scaling
      factor stay what they are.

  Raises:
    UserError: there is nothing of that kind, it is damaged or a pickle, its
      tensors do not fit, or its scaling factor must be given.
  """
  path = os.path.expanduser(os.fspath(path))
  options = {"dtype": dtype, "space_to_channel": space_to_channel}
  network.Options(**options)  # raises before anything is read
  if work_directory.is_run(path):
    return _load_run(path, scaling_factor, options)
  weights = released.find(path)
  scaling_origin = "given"
  if scaling_factor is None:
    scaling_factor = weights.scaling_factor
    scaling_origin = f"of {weights.label}"
  if scaling_factor is None and not weights.name:
    candidates = released.published_factors(weights.architecture)
    if candidates:
      known = ", ".join(f"{name}: {x}" for name, x in candidates.items())
      raise errors.UserError(
        f"{path!r} fits several released models, which differ in their "
        f"scaling factor; give it, scaling_factor=... ({known})"
      )
  variables, counts = conversion.read(weights.entries, weights.files)
  return Autoencoder(
    weights.architecture,
    variables,
    image_channels=weights.image_channels,
    scaling_factor=scaling_factor,
    shift_factor=weights.shift_factor,
    batch_counts=counts,
    provenance=model_card.Provenance(
      weights.label, weights.name, scaling_origin
    ),
    **options,
  )


def _load_run(
  run: str, scaling_factor: float | None, options: dict[str, Any]
) -> "Autoencoder":
  whole = work_directory.read_run_config(run)
  config = whole["model"]
  with work_directory.naming_plugins(run, whole):
    architecture = families.of_model(config["variant"], config["architecture"])
  network_options = options | {
    key: config[key] for key in ("image_channels", "residual_autoencoding")
  }
  abstract = network.abstract_variables(
    families.create(architecture, **network_options), config["image_channels"]
  )
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  placed = jax.tree.map(lambda _: device, abstract)
  step, variables = checkpoint.restore_variables(run, "ema", abstract, placed)
  measured = checkpoint.measured(run, step)
  scaling_origin = "given"
  if scaling_factor is None and measured.get("eval/latent_rms"):
    scaling_factor = 1 / measured["eval/latent_rms"]
    scaling_origin = "1 / RMS of the latents of the run's held-out images"
    if measured["step"] != step:
      scaling_origin += f" at step {measured['step']}"
  metrics = [
    f"{name} {measured[f'eval/{name}']:.4g}"
    for name in ("psnr", "ssim")
    if measured.get("step") == step and f"eval/{name}" in measured
  ]
  origin = f"averaged weights of step {step} of a training run"
  if metrics:
    origin += f" (held-out images: {', '.join(metrics)})"
  return Autoencoder(
    architecture,
    variables,
    scaling_factor=scaling_factor,
    provenance=model_card.Provenance(origin, scaling_factor=scaling_origin),
    **network_options,
  )


class Autoencoder:
  """A deep compression autoencoder, or an SD-VAE, with its weights.

  Images are `[b, h, w, c]`, uint8 or float in [-1, 1], numpy or JAX arrays;
  latents are `[b, h / f, w / f, latent_channels]` and not scaled (of an SD-VAE
  the means). Results are float32 JAX arrays. What computes them is compiled
  once for each size, and for up to five sizes of batches.

  Attributes:
    variant: a key of `dcae_jax.autoencoder.families.variants()`, or "custom".
    architecture: its widths, depths and blocks.
    variables: `{"params": ..., "batch_stats": ...}`, for `model.apply`.
    model: the linen module.
    image_channels: 3, or 1 for grey images.
    shift_factor: what diffusion subtracts from latents before scaling them, 0
      for all but some SD-VAEs: `(z - shift_factor) * scaling_factor`.
  """

  def __init__(
    self,
    architecture: families.Architecture,
    variables: Any,
    *,
    image_channels: int = 3,
    scaling_factor: float | None = None,
    shift_factor: float = 0.0,
    batch_counts: dict[str, int] | None = None,
    provenance: model_card.Provenance | None = None,
    **options: Any,
  ):
    """Wraps variables; `load` makes them from files.

    Args:
      architecture: such as `families.check_variant("f32c32")`.
      variables: see the class, as for `image_channels` and `shift_factor`.
      image_channels: of the images.
      scaling_factor: None if it is not known.
      shift_factor: of the latents.
      batch_counts: what a file says of them, to be saved again.
      provenance: of the weights, for the model card.
      **options: fields of `network.Options`, such as `dtype`.
    """
    self.architecture = architecture
    self.variant = families.name_of(architecture)
    self.variables = variables
    self._scaling_factor = _checked_factor(scaling_factor)
    self.shift_factor = shift_factor
    self.image_channels = image_channels
    self.model = families.create(
      architecture, image_channels=image_channels, **options
    )
    self._batch_counts = batch_counts or {}
    self._provenance = provenance or model_card.Provenance()
    self._encode = jax.jit(functools.partial(self.apply, method="encode"))
    self._decode = jax.jit(functools.partial(self.apply, method="decode"))
    self._has_warned = False

  def __repr__(self) -> str:
    parameters = sum(x.size for x in jax.tree.leaves(self.variables["params"]))
    return (
      f"Autoencoder({self.variant}: {self.spatial_compression}x spatial "
      f"compression, {self.image_channels} image channels, "
      f"{self.latent_channels} latent channels, {parameters:,} parameters)"
    )

  def apply(self, variables: Any, x: jax.Array, *, method: str) -> jax.Array:
    """The network as a function, for your own `jax.jit`.

    `x` are images in [-1, 1] for the method "encode", or latents for "decode";
    nothing is checked or padded.
    """
    is_exact = jnp.dtype(self.model.options.dtype) == jnp.float32
    with jax.default_matmul_precision("highest" if is_exact else None):
      return self.model.apply(variables, x, method=method)  # pyright: ignore[reportReturnType]

  @property
  def scaling_factor(self) -> float | None:
    """Multiplies latents before diffusion, divides them after; may be set.

    None if it is not known. Setting raises UserError unless it is positive.
    """
    return self._scaling_factor

  @scaling_factor.setter
  def scaling_factor(self, value: float | ArrayLike | None) -> None:
    self._scaling_factor = _checked_factor(value)
    self._provenance = self._provenance._replace(scaling_factor="given")

  @property
  def spatial_compression(self) -> int:
    """How many times smaller than an image's the sides of its latents are."""
    return self.model.spatial_compression

  @property
  def latent_channels(self) -> int:
    return self.model.latent_channels

  def encode(
    self,
    images: ArrayLike,
    *,
    pad: str | None = None,
    tile: int | None = None,
    stride: int | None = None,
    channels: int | None = None,
  ) -> jax.Array:
    """Images to latents.

    Floats that are nowhere below 0 are warned of once: they look like images in
    [0, 1].

    Args:
      images: [b, h, w, c].
      pad: how to fill up sides that the compression does not divide, below and
        on the right: "reflect" or "edge". None: such sides are refused.
      tile: side in pixels of square tiles that larger images are encoded in,
        overlapping and blended. Attention is global, so that this changes the
        result; it is for images that do not fit into memory.
      stride: pixels from tile to tile; None: three quarters of a tile.
      channels: leave out all but the first ones (DC-AE 1.5).

    Returns:
      [b, h / f, w / f, channels].

    Raises:
      UserError: images, or options, that do not fit.
    """
    factor = self.spatial_compression
    x = arrays.checked_images(images, self.image_channels)
    if not self._has_warned and arrays.may_be_from_zero(x):
      self._has_warned = True
      warnings.warn(
        f"images have values from {x.min():.4g} to {x.max():.4g}, expected "
        "[-1, 1], where 0 is mid-grey; if they are in [0, 1], pass "
        "images * 2 - 1",
        stacklevel=2,
      )
    x = arrays.padded(x, factor, pad)
    self._check_channels(channels)
    tiles = tiling.Tiles.create(tile, stride, factor)
    z = tiles.apply(
      lambda part: self._in_batches(self._encode, arrays.to_float(part)),
      x,
      source_unit=factor,
      result_unit=1,
    )
    return z if channels is None else z[..., :channels]

  def decode(
    self,
    z: ArrayLike,
    *,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    stride: int | None = None,
    channels: int | None = None,
  ) -> jax.Array:
    """Latents to images.

    Args:
      z: [b, h / f, w / f, latent_channels], not scaled.
      size: height and width of the images before they were padded; what was
        padded is cut off.
      tile: side in pixels of the tiles to decode in, as for `encode`.
      stride: pixels from tile to tile, as for `encode`.
      channels: use the first ones alone (DC-AE 1.5); `z` may have only them.

    Returns:
      [b, h, w, c], not clipped to [-1, 1].

    Raises:
      UserError: latents, or options, that do not fit.
    """
    factor = self.spatial_compression
    self._check_channels(channels)
    z = arrays.checked_latents(z, self.latent_channels, channels)
    if size is not None:
      arrays.check_size(size, z.shape, factor)
    tiles = tiling.Tiles.create(tile, stride, factor)
    y = tiles.apply(
      lambda part: self._in_batches(self._decode, part),
      z,
      source_unit=1,
      result_unit=factor,
    )
    return y if size is None else y[:, : size[0], : size[1]]

  def reconstruct(
    self, images: ArrayLike, *, pad: str | None = None, **options: int | None
  ) -> jax.Array:
    """Encodes and decodes; what was padded is cut off.

    Takes `tile`, `stride` and `channels`, too, as `encode` does.
    """
    z = self.encode(images, pad=pad, **options)
    return self.decode(z, size=np.shape(images)[1:3], **options)

  def check_options(
    self, *, pad: str | None, tile: int | None, stride: int | None
  ) -> None:
    """Raises UserError for what `encode` would refuse with any images."""
    arrays.check_pad(pad)
    tiling.Tiles.create(tile, stride, self.spatial_compression)

  def measure_scaling_factor(
    self,
    source: str | os.PathLike | Iterable[ArrayLike],
    *,
    resolution: int = 256,
    max_images: int = 0,
  ) -> float:
    """Measures the scaling factor and sets it: `scaling_factor` is then this.

    It is 1 / RMS of the latents over images, one batch at a time, from which a
    `shift_factor` is subtracted first. What `save` writes has it, too.

    Args:
      source: a folder of images, whose centre crops are taken; or batches of
        images as `encode` takes them.
      resolution: side of the crops, in pixels.
      max_images: of the folder; 0: all.

    Returns:
      The new `scaling_factor`.

    Raises:
      UserError: no usable image, or latents that are all zero.
    """
    name = "images"
    if isinstance(source, str | os.PathLike):
      name = f"images, centre crops of {resolution} px"
      source = self._crops(os.fspath(source), resolution, max_images)
    statistics = latent_statistics.LatentStatistics(self.latent_channels)
    images = 0
    for batch in source:
      z = np.asarray(self.encode(batch))
      statistics.add(z)
      images += len(z)
    factor = images and latent_statistics.scaling_factor(
      statistics.compute(), self.shift_factor
    )
    if not factor:
      raise errors.UserError(
        "there are no images, or their latents are all zero"
      )
    self.scaling_factor = factor
    self._provenance = self._provenance._replace(
      scaling_factor=f"1 / RMS of the latents of {images} {name}"
    )
    return factor

  def save(self, folder: str | os.PathLike, layout: str = "diffusers") -> None:
    """Writes weights, `config.json` and a model card.

    Args:
      folder: a new or empty one, or one that was saved to before, which is
        replaced in one step: a kill leaves the old or the new one whole.
      layout: "diffusers" (`AutoencoderDC.from_pretrained(folder)`, or
        `AutoencoderKL` for an SD-VAE), or "original", DC-AE's alone.

    Raises:
      UserError: the scaling factor is not known, the architecture has no
        config there, space goes to channels, or the folder holds something
        else, is or is in the work directory of a run, or cannot be written.
    """
    if self.scaling_factor is None:
      raise errors.UserError(
        "the scaling factor is not known; measure it first with "
        "ae.measure_scaling_factor(folder_of_images), or set ae.scaling_factor"
      )
    if not self.model.options.residual_autoencoding:
      raise errors.UserError(
        "a network without residual shortcuts cannot be saved: no other "
        "library has it"
      )
    p = self.model.options.space_to_channel
    if p != 1:
      raise errors.UserError(
        f"space_to_channel={p} is no part of the weights, and other libraries "
        "have no such setting; load and save the autoencoder without it"
      )
    config = families.to_config(
      self.architecture,
      self.image_channels,
      self.scaling_factor,
      self.shift_factor,
    )
    name = self._provenance.released_name or released.name_for(self.variant)
    if layout == "original" and name:  # there, a name is the architecture
      config = {"model_name": name} | config
    entries = conversion.table(self.architecture, self.image_channels, layout)
    safetensors_files.save(
      folder,
      conversion.LAYOUTS[layout],
      conversion.to_tensors(entries, self.variables, self._batch_counts),
      config=config,
      model_card=model_card.text(self, self._provenance, layout),
    )

  def _crops(
    self, folder: str, resolution: int, max_images: int
  ) -> Iterable[np.ndarray]:
    for name, value in (("resolution", resolution), ("max_images", max_images)):
      if not isinstance(value, int) or not 0 <= value < 2**16:
        raise errors.UserError(
          f"{name}={value!r} is not a whole number from 0 to {2**16 - 1}"
        )
    network.check_side(resolution, self.spatial_compression)
    # A third of a second to import, which most who load a model can do without.
    from dcae_jax.data import batches, sources
    from dcae_jax.data import decoding as image_decoding
    from dcae_jax.data import images as images_lib

    image_decoding.check_channels(self.image_channels)
    source = sources.folder(folder)
    decoding = images_lib.Decoding(self.image_channels)
    images_lib.check_not_empty(source, decoding)
    for batch in images_lib.evaluation_batches(
      source,
      decoding,
      resolution,
      batches.Reading(min(8, len(source))),
      max_images=max_images,
      skipped=images_lib.Skipped(),
    ):
      if batch["mask"].any():
        yield batch["images"][batch["mask"]]

  def _in_batches(self, f: Callable, x: np.ndarray) -> jax.Array:
    """A batch is filled up to a power of two: few shapes to compile."""
    results = []
    for start in range(0, len(x), _LARGEST_BATCH):
      part = x[start : start + _LARGEST_BATCH]
      size = 1 << (len(part) - 1).bit_length()
      filled = np.pad(part, [(0, size - len(part))] + [(0, 0)] * 3)
      results.append(f(self.variables, filled)[: len(part)])
    return results[0] if len(results) == 1 else jnp.concatenate(results)

  def _check_channels(self, channels: int | None) -> None:
    if channels is None:
      return
    is_whole = isinstance(channels, int | np.integer)
    if not is_whole or not 1 <= channels <= self.latent_channels:
      raise errors.UserError(
        f"channels={channels!r} is not from 1 to {self.latent_channels}"
      )
    is_ordered = families.of(self.architecture).orders_channels
    p = self.model.options.space_to_channel
    if p != 1 or not is_ordered(self.architecture):
      raise errors.UserError(
        "channels= is for DC-AE 1.5, whose latents are ordered; this "
        f"{self.variant} needs all {self.latent_channels}"
      )


def _checked_factor(value: Any) -> float | None:
  if value is None:
    return None
  if (
    isinstance(value, str | bool | complex)
    or np.ndim(value) > 0
    or not 0 < value < 1e30
  ):
    raise errors.UserError(f"scaling_factor={value!r} is not a positive number")
  return float(value)
