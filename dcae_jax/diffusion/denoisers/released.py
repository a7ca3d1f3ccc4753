"""Released weights of denoisers in and out: which one a file holds.

By its config where there is one, else by names and shapes of its tensors. They
do not tell by which convention a network sees time: its name does, or what is
usual for its family.
"""

import dataclasses
import io
import logging
import math
import os
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dcae_jax import errors
from dcae_jax.autoencoder import latent_statistics
from dcae_jax.autoencoder.weights import conversion, safetensors_files
from dcae_jax.autoencoder.weights import released as released_autoencoders
from dcae_jax.diffusion import conditioning as conditioning_lib
from dcae_jax.diffusion import objectives
from dcae_jax.diffusion.denoisers import (
  dit,
  families,
  hub_config,
  pixart,
  tensor_names,
)
from dcae_jax.runs import json_types

_LOG = logging.getLogger(__name__)
Tree = Any

_F32, _F64 = "dc-ae-f32c32-in-1.0", "dc-ae-f64c128-in-1.0"
_F64_15 = "dc-ae-1.5-f64c128"
# Names of released models on DC-AE: family, convention and autoencoder.
RELEASED: dict[str, tuple[str, str, str]] = {
  f"{_F32}-dit-xl-in-512px": ("DiT", "ddpm", _F32),
  f"{_F32}-dit-xl-in-512px-trainbs1024": ("DiT", "ddpm", _F32),
  f"{_F32}-sit-xl-in-512px": ("DiT", "sit", _F32),
  f"{_F32}-uvit-s-in-512px": ("UViT", "uvit", _F32),
  f"{_F32}-uvit-h-in-512px": ("UViT", "uvit", _F32),
  f"{_F32}-uvit-2b-in-512px": ("UViT", "uvit", _F32),
  f"{_F32}-usit-h-in-512px": ("UViT", "sit", _F32),
  f"{_F32}-usit-2b-in-512px": ("UViT", "sit", _F32),
  f"{_F64}-uvit-h-in-512px": ("UViT", "uvit", _F64),
  f"{_F64}-uvit-h-in-512px-train2000k": ("UViT", "uvit", _F64),
  f"{_F64}-uvit-2b-in-512px": ("UViT", "uvit", _F64),
  f"{_F64}-uvit-2b-in-512px-train2000k": ("UViT", "uvit", _F64),
  f"{_F64_15}-usit-2b-in-512px": ("UViT", "sit", _F64_15),
  f"{_F64_15}-usit-3b-in-512px": ("UViT", "sit", _F64_15),
}
# Of the released models of captions, by the channels of their latents.
_AUTOENCODERS = {
  ("PixArt", 4): "sd-vae-ft-ema",
  ("SANA", 32): "dc-ae-f32c32-sana-1.0",
}
_OBJECTIVES = {
  kind.__name__: kind
  for kind in (objectives.NoisePrediction, objectives.FlowMatching)
}
# What the authors' files on DC-AE put before the names of either network.
_PREFIX, _AUTOENCODER_PREFIX = "diffusion_model.", "autoencoder."
_PREFIXED = ("DiT", "UViT")
# In files of training: it weighs the loss, and gives nothing to a prediction.
_OF_TRAINING = ("logvar_linear.weight", "logvar_linear.bias")
# A tensor that one kind of file alone has; the first one that is there counts.
_MARKS = {
  "decoder_pred.weight": ("UViT", "original"),
  "final_layer.adaLN_modulation.1.weight": ("DiT", "original"),
  "attention_y_norm.weight": ("SANA", "original"),
  "t_block.1.weight": ("PixArt", "original"),
  "caption_norm.weight": ("SANA", "diffusers"),
  "adaln_single.linear.weight": ("PixArt", "diffusers"),
}
_CAPTION_TOKENS = {"PixArt": 120, "SANA": 300}
_SANA_LATENT_SIZE = 32
_NULL_FILE = "null_caption.npy"
# Our own description, in a key that diffusers leaves alone.
_DESCRIPTION = "_dcae_jax"


class Released(NamedTuple):
  """A denoiser in safetensors files, with all its tensors.

  Attributes:
    label: its released name, or the end of its path.
    name: the key of `RELEASED` that its config or path names, or "".
    variant: its architecture.
    latent_size: side of the latents that it was trained with.
    latent_channels: of the latents.
    patch_size: side of the squares of latent positions that make a token.
    learn_sigma: it predicts the variance too.
    conditioning: what it is told besides the time.
    objective: what it learned, as its authors trained.
    autoencoder: the released name of that of its latents, or "".
    scaling_factor: of the latents; None if it is not known.
    normalisation: `shift` and `scale` of each channel of the latents; None: by
      the scaling factor.
    layout: of its files.
    entries: where each of our parameters is in the files.
    files: of each tensor.
    null_caption: the file beside them that holds it, if one does.
    has_null: the files have the null condition.
  """

  label: str
  name: str
  variant: families.Variant
  latent_size: int
  latent_channels: int
  patch_size: int
  learn_sigma: bool
  conditioning: conditioning_lib.Conditioning
  objective: objectives.Objective
  autoencoder: str
  scaling_factor: float | None
  normalisation: dict[str, Any] | None
  layout: str
  entries: list[conversion.Entry]
  files: dict[str, pathlib.Path]
  null_caption: pathlib.Path | None

  @property
  def has_null(self) -> bool:
    in_files = {entry.path for entry in self.entries}
    return (
      not self.conditioning.is_text
      or self.null_caption is not None
      or f"params/{tensor_names.NULL_CAPTION}" in in_files
    )


class _File(NamedTuple):
  """Shapes of a denoiser's tensors, and how to read one, by their names."""

  source: str
  tensors: dict[str, tuple[int, ...]]
  prefix: str
  paths: dict[str, pathlib.Path]

  def read(self, name: str) -> np.ndarray:
    name = f"{self.prefix}{name}"
    return safetensors_files.read(self.paths[name], name)


def find(source: str) -> Released:
  """Finds a released denoiser and checks the names and shapes of it all.

  Reads no weights yet. Raises UserError if there is no such thing, it is
  damaged or a pickle, it is not recognised, or tensors are missing, unexpected
  or of another shape.

  Args:
    source: a folder with safetensors files, or that of a pipeline, a
      safetensors file, or a hub id of one of the former, which is downloaded
      and cached by huggingface_hub.
  """
  files, config = safetensors_files.find(source, ("transformer",))
  file = _opened(source, *safetensors_files.headers(files))
  family, layout = _recognise(file)
  beside = files[0].parent / _NULL_FILE
  has_null = layout == "diffusers" and beside.is_file()
  null_shape = _load_null(beside).shape if has_null else None
  try:
    if _DESCRIPTION in config:
      numbers, kind = _described(config[_DESCRIPTION])
    elif config.get("_class_name") in hub_config.CLASSES:
      numbers, width = hub_config.from_config(config)
      tokens = null_shape[0] if null_shape else _CAPTION_TOKENS[family]
      kind = conditioning_lib.Captions(tokens, width)
    else:
      numbers, kind = _measured(file, family, layout)
    if numbers.variant.family != family:
      raise errors.UserError(f"it describes a {numbers.variant.family}")
    model = _create(numbers, kind)
  except errors.UserError as error:
    raise errors.UserError(
      f"{source!r} holds a {family}, but: {error}"
    ) from error
  if null_shape and null_shape != _null_shape(model):
    raise errors.UserError(
      f"{beside} has the shape {list(null_shape)}, not "
      f"{list(_null_shape(model))}"
    )
  entries = tensor_names.table(family, model, layout)
  _check(file, model, entries)
  name = _released_name(source, config, family)
  description = config.get(_DESCRIPTION, {})
  json_types.check(
    f"{_DESCRIPTION} in config.json of {source}",
    description,
    {"normalisation?": latent_statistics.NORMALISATION_TYPES},
    "save the model again",
  )
  convention = RELEASED[name][1] if name else _usual_convention(model)
  autoencoder = description.get("autoencoder") or (
    RELEASED[name][2]
    if name
    else _AUTOENCODERS.get((family, model.latent_channels), "")
  )
  _, published = released_autoencoders.RELEASED.get(autoencoder, ("", None))
  return Released(
    name or pathlib.Path(source).name,
    name,
    *numbers,
    kind,
    _learned(description) or _objective(convention, numbers.learn_sigma),
    autoencoder,
    description.get("scaling_factor") or published,
    description.get("normalisation"),
    layout,
    [
      entry._replace(names=tuple(f"{file.prefix}{n}" for n in entry.names))
      for entry in entries
    ],
    file.paths,
    beside if has_null else None,
  )


def create(found: Released, **options: Any) -> families.Module:
  """Its module; options are those of `families.create`, such as `dtype`."""
  return _create(found, found.conditioning, **options)


def read(found: Released) -> Tree:
  """The variables, `{"params": ...}` in float32, on one device.

  A model of captions without a null caption, as diffusers has them, gets zeros
  for it, with a warning: its unconditional prediction is that of an empty
  caption, as its text encoder sees it. Raises UserError for values that are not
  finite.
  """
  tree, _ = conversion.read(found.entries, found.files)
  params = tree["params"]
  kind = found.conditioning
  if kind.is_text and tensor_names.NULL_CAPTION not in params:
    if not found.has_null:
      _LOG.warning(
        "%s has no null caption: it is zero until one is set", found.label
      )
      null = np.zeros((kind.caption_tokens, kind.caption_width), np.float32)
    else:
      null = _load_null(found.null_caption)
    params[tensor_names.NULL_CAPTION] = jnp.asarray(null)
  return {"params": params}


def save(
  folder: str | os.PathLike,
  variables: Tree,
  model: families.Module,
  layout: str,
  *,
  name: str = "",
  objective: objectives.Objective | None = None,
  autoencoder: str = "",
  scaling_factor: float | None = None,
  normalisation: dict[str, Any] | None = None,
) -> None:
  """Writes weights, `config.json` and a model card.

  The original layout has everything. The class in diffusers has no null
  caption: it is kept in a file beside the weights, which `find` reads and
  diffusers does not look for.

  Args:
    folder: a new or empty one, or one that was saved to before.
    variables: `{"params": ...}`.
    model: their module.
    layout: "original", or "diffusers", PixArt's and SANA's alone.
    name: a key of `RELEASED`, which the authors' code knows it by, or "".
    objective: what it learned; None: what is usual for its family.
    autoencoder: the released name of that of its latents, if it has one.
    scaling_factor: of the latents, if it is known.
    normalisation: as in `Released`.

  Raises:
    UserError: the family has no such layout, latents are not square, or not
      normalised by a factor as diffusers takes them to be, or what
      `safetensors_files.save` refuses.
  """
  family = families.family_of(model)
  entries = tensor_names.table(family, model, layout)
  if normalisation and layout == "diffusers":
    raise errors.UserError(
      "diffusers multiplies latents by a factor, and this model learned from "
      "latents that are normalised by channels; save it with layout='original'"
    )
  height, width = model.latent_size
  if height != width:
    raise errors.UserError(
      f"latents of {height} x {width} are not square, and other libraries have "
      "only models of square ones"
    )
  tensors = conversion.to_tensors(entries, variables, {})
  config: dict[str, Any] = {}
  arrays = {}
  if layout == "diffusers":
    config = hub_config.to_config(family, model)
    null = variables["params"][tensor_names.NULL_CAPTION]
    arrays = {_NULL_FILE: np.asarray(null, np.float32)}
  else:
    positions = _positions(family, model)
    if positions is not None:
      tensors[tensor_names.POSITIONS] = positions[None]
    prefix = _PREFIX if family in _PREFIXED else ""
    tensors = {f"{prefix}{key}": x for key, x in tensors.items()}
    config = {"model_name": name} if name else {}
  fields = {
    name: getattr(model, name) for name in families.fields_of(type(model))
  }
  config[_DESCRIPTION] = {
    "family": family,
    "fields": fields,
    "latent_size": height,
    "latent_channels": model.latent_channels,
    "patch_size": model.patch_size,
    "learn_sigma": getattr(model, "learn_sigma", False),
    "conditioning": dataclasses.asdict(model.conditioning),
    "objective": objective
    and {"kind": type(objective).__name__, **dataclasses.asdict(objective)},
    "autoencoder": autoencoder,
    "scaling_factor": scaling_factor,
  }
  if normalisation:
    config[_DESCRIPTION]["normalisation"] = normalisation
  safetensors_files.save(
    folder,
    conversion.LAYOUTS[layout],
    tensors,
    config=config,
    model_card=_model_card(family, layout, config),
    arrays=arrays,
  )


def _opened(
  source: str,
  shapes: dict[str, tuple[int, ...]],
  paths: dict[str, pathlib.Path],
) -> _File:
  """Without the autoencoder that may be in the same file."""
  prefix = _PREFIX if any(n.startswith(_PREFIX) for n in shapes) else ""
  tensors = {
    name.removeprefix(prefix): shape
    for name, shape in shapes.items()
    if not name.startswith(_AUTOENCODER_PREFIX)
  }
  return _File(source, tensors, prefix, paths)


def _recognise(file: _File) -> tuple[str, str]:
  """Family and layout."""
  for mark, kind in _MARKS.items():
    if mark in file.tensors:
      return kind
  raise errors.UserError(
    f"{file.source!r} is not recognised as one of "
    f"{', '.join(families.DENOISERS)}: it has none of {', '.join(_MARKS)}"
  )


def _described(
  d: Any,
) -> tuple[hub_config.Numbers, conditioning_lib.Conditioning]:
  try:
    denoiser = families.DENOISERS[d["family"]]
    denoiser.check(**d["fields"])
    numbers = hub_config.Numbers(
      families.Variant(d["family"], d["fields"]),
      *(d[key] for key in hub_config.Numbers._fields[1:]),
    )
    return numbers, denoiser.conditioning(**d["conditioning"])
  except (KeyError, TypeError) as error:
    raise errors.UserError(
      f"{_DESCRIPTION} in its config.json is damaged ({error!r}); remove it, "
      "or save the model again"
    ) from error


def _measured(
  file: _File, family: str, layout: str
) -> tuple[hub_config.Numbers, conditioning_lib.Conditioning]:
  """The numbers that shapes tell."""
  names = tensor_names.NAMES[family][layout]

  def shape(layer: str, axes: int) -> tuple[int, ...]:
    name = f"{names[layer]}.weight"
    found = file.tensors.get(name, ())
    if len(found) != axes:
      raise errors.UserError(f"{name} is missing, or has not {axes} axes")
    return found

  def has(layer: str) -> bool:
    return f"{names.get(layer, '').format(0)}.weight" in file.tensors

  hidden, channels, patch_size, _ = shape("project_in", 4)
  in_first_half = family == "UViT"
  block = names[f"{'in_' * in_first_half}block_{{}}/attention/project"]
  depth = 0
  while f"{block.format(depth)}.weight" in file.tensors:
    depth += 1
  sizes = families.DENOISERS[family].sizes.values()
  heads = {size["hidden"]: size["heads"] for size in sizes}
  if hidden not in heads:
    raise errors.UserError(
      f"nothing tells how many heads have {hidden} channels together; put its "
      "config.json beside it (known without one: "
      f"{', '.join(map(str, heads))} channels)"
    )
  fields = {
    "depth": 2 * depth if in_first_half else depth,
    "hidden": hidden,
    "heads": heads[hidden],
  }
  side, scale = _grid(file, family)
  if family == "PixArt":
    fields["size_conditions"] = has("resolution_embedding/linear1")
    fields["interpolation_scale"] = scale
  elif family == "SANA":
    fields["qk_norm"] = has("block_{}/attention/q_norm")
    fields["guidance_embedding"] = has("guidance_embedding/linear1")
    fields["interpolation_scale"] = scale
    side = side or _SANA_LATENT_SIZE // patch_size
  if side is None:
    raise errors.UserError(
      "nothing tells the size of its latents; put its config.json beside it"
    )
  project_out = "project_out" if family == "UViT" else "project_out/linear"
  out, _ = shape(project_out, 2)
  numbers = hub_config.Numbers(
    families.Variant(family, fields),
    side * patch_size,
    channels,
    patch_size,
    out == 2 * channels * patch_size**2,
  )
  if not families.DENOISERS[family].conditioning.is_text:
    classes, _ = shape("label_embedding", 2)
    return numbers, conditioning_lib.ClassLabels(classes - 1)
  _, width = shape("caption_projection/linear1", 2)
  null = file.tensors.get(names.get(tensor_names.NULL_CAPTION, ""))
  tokens = null[0] if null else _CAPTION_TOKENS[family]
  return numbers, conditioning_lib.Captions(tokens, width)


def _grid(file: _File, family: str) -> tuple[int | None, float | None]:
  """Tokens on a side, and how dense positions are; None if not in the file."""
  shape = file.tensors.get(tensor_names.POSITIONS, ())
  if len(shape) != 3:
    return None, None
  tokens = shape[1] - (2 if family == "UViT" else 0)
  side = math.isqrt(max(tokens, 0))
  if side < 1 or side**2 != tokens:
    raise errors.UserError(
      f"{tensor_names.POSITIONS} is of {tokens} tokens, which are no square"
    )
  if family not in ("PixArt", "SANA") or side == 1:
    return side, 1.0
  # The first feature of the second column is the sine of its place.
  sine = file.read(tensor_names.POSITIONS)[0, 1, 0]
  place = math.asin(min(max(float(sine), 0.0), 1.0))
  return side, round(1 / place, 2) if place else 1.0


def _create(numbers: Any, kind: Any, **options: Any) -> families.Module:
  return families.create(
    numbers.variant,
    conditioning=kind,
    latent_size=numbers.latent_size,
    latent_channels=numbers.latent_channels,
    patch_size=numbers.patch_size,
    learn_sigma=numbers.learn_sigma,
    **options,
  )


def _positions(family: str, model: families.Module) -> np.ndarray | None:
  """The fixed positions that the original layout keeps, [n, d]."""
  p = model.patch_size
  base = model.latent_size[0] // p, model.latent_size[1] // p
  if family == "DiT":
    return dit.positions(*base, model.hidden)
  scale = getattr(model, "interpolation_scale", None)
  if scale is None:
    return None
  return pixart.positions(base, base, model.hidden, scale)


def _check(
  file: _File, model: families.Module, entries: list[conversion.Entry]
) -> None:
  """Raises UserError for tensors, or fixed positions, that are not its own."""
  tensors = dict(file.tensors)
  for name in _OF_TRAINING:
    if tensors.pop(name, None):
      _LOG.info("%s of %s is left out", name, file.source)
  positions = _positions(families.family_of(model), model)
  if positions is not None and tensors.pop(tensor_names.POSITIONS, None):
    found = file.read(tensor_names.POSITIONS).astype(np.float32)
    if found.shape != (1, *positions.shape) or not np.allclose(
      found[0], positions, rtol=0, atol=0.01
    ):
      raise errors.UserError(
        f"{tensor_names.POSITIONS} of {file.source!r} are not the sines and "
        "cosines of its grid: it is damaged, or another model"
      )
  conversion.check_tensors(file.source, entries, tensors)


def _released_name(source: str, config: dict[str, Any], family: str) -> str:
  """What a config says, or a part of the path or hub id."""
  parts = reversed(pathlib.Path(source).parts)
  for part in (config.get("model_name"), *parts):
    if isinstance(part, str):
      name = part.split("--")[-1].removesuffix(".safetensors")
      if name in RELEASED and RELEASED[name][0] == family:
        return name
  return ""


def _objective(convention: str, learn_sigma: bool) -> objectives.Objective:
  """A process and a prediction that a convention stands for."""
  return {
    "ddpm": objectives.NoisePrediction(learned_variance=learn_sigma),
    "uvit": dataclasses.replace(objectives.scaled_linear(), first_time=1),
    "sit": objectives.FlowMatching(convention="sit"),
    "flow": objectives.FlowMatching((0.0, 1.0), 3.0),
  }[convention]


def _learned(description: dict[str, Any]) -> objectives.Objective | None:
  """What our own description says was learned."""
  fields = dict(description.get("objective") or {})
  kind = _OBJECTIVES.get(fields.pop("kind", ""))
  if kind is None:
    return None
  tuples = {k: tuple(x) for k, x in fields.items() if isinstance(x, list)}
  try:
    return kind(**fields | tuples)
  except TypeError as error:
    raise errors.UserError(
      f"{_DESCRIPTION} in its config.json is damaged ({error}); remove it, or "
      "save the model again"
    ) from error


def _usual_convention(model: families.Module) -> str:
  family = families.family_of(model)
  if family == "DiT" and not model.learn_sigma:
    return "sit"
  return {"UViT": "uvit", "SANA": "flow"}.get(family, "ddpm")


def _null_shape(model: families.Module) -> tuple[int, int]:
  kind = model.conditioning
  return kind.caption_tokens, kind.caption_width


def _load_null(file: pathlib.Path) -> np.ndarray:
  try:
    null = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
  except (ValueError, OSError, EOFError) as error:
    raise errors.UserError(f"{file} is damaged ({error})") from error
  if null.ndim != 2 or null.dtype.kind != "f" or not np.isfinite(null).all():
    raise errors.UserError(
      f"{file} is no null caption: not finite numbers [tokens, channels]"
    )
  return null.astype(np.float32)


def _model_card(family: str, layout: str, config: dict[str, Any]) -> str:
  library = "dcae_jax"
  load_it = 'import dcae_jax\n\nden = dcae_jax.load_denoiser("FOLDER")'
  if layout == "diffusers":
    library, name = "diffusers", config["_class_name"]
    load_it = (
      f"from diffusers import {name}\n\n"
      f'transformer = {name}.from_pretrained("FOLDER")'
    )
  d = config[_DESCRIPTION]
  latents = d["autoencoder"] or "an autoencoder without a released name"
  if "normalisation" in d:
    latents += (
      ", each channel less its `shift`, times its `scale` "
      f"(`{_DESCRIPTION}` in `config.json`)"
    )
  return (
    f"---\nlibrary_name: {library}\ntags:\n- diffusion\n---\n\n# {family}\n\n"
    f"Removes noise from latents of {d['latent_channels']} channels, of "
    f"{latents}. Written by dcae_jax, layout `{layout}`.\n\n"
    f"```python\n{load_it}\n```\n"
  )
