"""From config to an export of latents: source, store, encoder."""

import functools
import os
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.autoencoder import autoencoder, network
from dcae_jax.autoencoder.weights import conversion
from dcae_jax.data import aspect_ratios, decoding, images, sources
from dcae_jax.latents import aspect_ratios as latents_of_shapes
from dcae_jax.latents import encode, layout, rows, store
from dcae_jax.latents import export as latent_export
from dcae_jax.nn import precision
from dcae_jax.runs import places, versions
from dcae_jax.setup import image_sources, keys, models


def check(config: ConfigDict) -> None:
  """Raises UserError for a config that cannot be run."""
  keys.check(config)
  if not config.init_from:
    raise errors.UserError(
      "config.init_from is empty; name a run, a folder or file of released "
      "weights, or a hub id"
    )
  if config.dtype not in layout.DTYPES:
    raise errors.UserError(
      f"config.dtype={config.dtype!r} is not among {', '.join(layout.DTYPES)}"
    )
  if config.shard_rows % layout.CHUNK_ROWS:
    raise errors.UserError(
      f"config.shard_rows={config.shard_rows} is not a multiple of "
      f"{layout.CHUNK_ROWS}"
    )
  precision.check_dtype(config.compute_dtype)
  images.Cropping(config.crop, config.resolution)
  if config.crops_per_image > 1 and config.crop == "dm_crop":
    raise errors.UserError(
      f"config.crops_per_image={config.crops_per_image} of config.crop=dm_crop "
      "would all be the same; use random_crop or random_resized_crop"
    )
  if _is_import(config) and (config.flip or config.crops_per_image > 1):
    raise errors.UserError(
      "config.flip and config.crops_per_image need images, and the source is "
      "of latents, kind 'npy'"
    )
  if config.max_aspect_ratio > 1 and (
    _is_import(config) or config.class_per_image
  ):
    raise errors.UserError(
      f"config.max_aspect_ratio={config.max_aspect_ratio} needs images of "
      "classes of their own, not a source of kind 'npy' or config."
      "class_per_image; set it to 1"
    )
  _shapes(config)
  decoding.check_channels(models.identity_of(config.init_from).image_channels)
  latent_shape(config)


def latent_shape(config: ConfigDict) -> tuple[int, int, int]:
  """[h, w, c] of the latents; UserError if the resolution does not fit."""
  variant, _ = models.variant_of(config.init_from)
  compression = variant.spatial_compression * config.space_to_channel
  network.check_side(config.resolution, compression, key="config.resolution")
  side = config.resolution // compression
  return side, side, variant.latent_channels * config.space_to_channel**2


def _shapes(config: ConfigDict) -> list[aspect_ratios.Shape]:
  """Heights and widths of the images; UserError if there are none."""
  if config.max_aspect_ratio == 1:
    return [(config.resolution, config.resolution)]
  with errors.renamed("config.data.", "config."):
    variant, _ = models.variant_of(config.init_from)
    compression = variant.spatial_compression * config.space_to_channel
    return aspect_ratios.shapes(
      config.resolution, compression, config.max_aspect_ratio
    )


class Part(NamedTuple):
  """The images of one shape.

  Attributes:
    name: of its store among those of other shapes; "": there are no others.
    source: of these images alone.
    size: height and width, in pixels.
  """

  name: str
  source: sources.Source
  size: tuple[int, int]


def parts(config: ConfigDict, workdir: epath.Path) -> list[Part]:
  """What is exported, by shape; UserError if sizes of images are not known."""
  source, known = open_source(config, workdir), _shapes(config)
  if len(known) == 1:
    return [Part("", source, known[0])]
  if config.max_images:
    total = sources.limited(source, config.max_images)
    source = sources.Subset(source, range(total))
  with errors.renamed("config.data.", "config."):
    dealt = aspect_ratios.dealt(
      [(source, 1.0)], known, least=config.least_images, shorter_side=0
    )
  return [
    Part(f"{height}x{width}", of_shape, (height, width))
    for (height, width), ((of_shape, _),) in dealt
  ]


def _is_import(config: ConfigDict) -> bool:
  return config.source.kind == "npy"


def open_source(
  config: ConfigDict, workdir: epath.Path | None = None
) -> sources.Source:
  """The images, or latents, that are exported."""
  if _is_import(config):
    source = sources.latent_files(
      config.source.path,
      config.source.captions,
      image_sources.indexed_in(workdir),
    )
    source = image_sources.part_of(source, config.source)
  else:
    source = image_sources.single_source(
      config.source, workdir, config.min_size
    )
  if config.class_per_image:
    total = sources.limited(source, config.max_images)
    source = sources.ClassPerImage(source, total)
  return source


def output(config: ConfigDict, workdir: epath.Path, name: str) -> str:
  """Where a store goes; UserError if that is where the run is."""
  path = config.output or os.fspath(workdir / name)
  place, run = (
    x if "://" in x else os.path.realpath(os.path.expanduser(x))
    for x in (path, os.fspath(workdir))
  )
  if place.rstrip("/") == run.rstrip("/"):
    raise errors.UserError(
      f"config.output={path} is --workdir; use a place of its own"
    )
  return path


def open_store(
  config: ConfigDict, workdir: epath.Path, part: Part
) -> store.LatentStore:
  """The store that the latents go to, after a test that it can be written."""
  path = output(config, workdir, "latents")
  latents_of_shapes.check_place(path, not part.name, config.retries)
  if part.name:
    path = f"{path.rstrip('/')}/{part.name}"
  place = store.LatentStore(path, retries=config.retries)
  place.check_writable(jax.process_index())
  return place


def load_autoencoder(config: ConfigDict) -> autoencoder.Autoencoder:
  """The encoder's, with the scaling factor of the config if it has one."""
  return autoencoder.load(
    config.init_from,
    scaling_factor=config.scaling_factor or None,
    dtype=config.compute_dtype,
    space_to_channel=config.space_to_channel,
  )


def create(
  config: ConfigDict,
  place: store.LatentStore,
  part: Part,
  ae: autoencoder.Autoencoder,
) -> latent_export.Export:
  """The export of the images of a shape into a store."""
  source, size = part.source, part.size
  if part.name and ae.scaling_factor is None:
    raise errors.UserError(
      "config.max_aspect_ratio needs one scaling factor for the latents of all "
      "shapes, and the autoencoder has none; give config.scaling_factor, as an "
      "export of squares finds it"
    )
  shape = (*(x // ae.spatial_compression for x in size), ae.latent_channels)
  views = layout.VIEWS[: 1 + config.flip]
  dtype = layout.DTYPES[config.dtype]
  if _is_import(config):
    if ae.scaling_factor is None:
      raise errors.UserError(
        "the factor that the latents were multiplied by is not known; give "
        "config.scaling_factor"
      )
    source_rows = rows.LatentFiles(
      source,
      shape,
      scaling_factor=ae.scaling_factor,
      shift_factor=ae.shift_factor,
      has_captions=config.source.captions,
    )
    encoder = lambda group_size: encode.converted(views[0], dtype)
  else:
    least = config.shard_rows or layout.CHUNK_ROWS
    encode.check_memory(
      ae, views, dtype, size,
      min(config.batch_size_per_device, least),
    )  # fmt: skip
    source_rows = rows.Crops(
      source,
      images.Decoding(
        ae.image_channels, config.min_size, config.max_megapixels
      ),
      images.Cropping(config.crop, size, config.min_area),
      per_image=config.crops_per_image,
      seed=config.seed,
      has_captions=config.source.captions,
    )
    encoder = functools.partial(encode.compiled, ae, views, dtype, size)
  return latent_export.Export(
    place,
    source_rows,
    sources.limited(source, config.max_images),
    shape,
    config.dtype,
    views,
    encoder,
    group_size=config.batch_size_per_device,
    shard_rows=config.shard_rows,
    threads=config.threads,
  )


def identity(
  config: ConfigDict,
  export: latent_export.Export,
  ae: autoencoder.Autoencoder,
) -> dict[str, Any]:
  """What must be the same to go on with a store; None: not known before."""
  source = export.rows.source
  return {
    "autoencoder": {
      "variant": ae.variant,
      "image_channels": ae.image_channels,
      "spatial_compression": ae.spatial_compression,
      "latent_channels": ae.latent_channels,
      "space_to_channel": config.space_to_channel,
      "compute_dtype": config.compute_dtype,
      "encoder_sha256": conversion.fingerprint(
        encode.encoder_variables(ae.variables)
      ),
    },
    "scaling_factor": ae.scaling_factor,
    "shift_factor": ae.shift_factor,
    "resolution": config.resolution,
    "crop": export.rows.description,
    "views": list(export.views),
    "dtype": config.dtype,
    "shard_rows": config.shard_rows or None,
    "source": {
      "kind": config.source.kind,
      "images": export.images,
      "fingerprint": source.fingerprint(),
    },
  }


def description(
  config: ConfigDict, export: latent_export.Export, ae: autoencoder.Autoencoder
) -> dict[str, Any]:
  """What the manifest says that is known before the export."""
  described = identity(config, export, ae)
  described["autoencoder"] |= {
    "init_from": places.absolute_if_there(config.init_from),
    "weights_sha256": conversion.fingerprint(ae.variables),
  }
  return described | {"versions": versions.versions()}
