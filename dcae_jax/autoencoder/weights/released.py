"""Released autoencoders: which there are, and which one a file holds.

By its config where there is one, else by the shapes of its tensors. Models that
differ in training alone have the same shapes: their scaling factors are told
apart by name.
"""

import pathlib
from typing import Any, NamedTuple

from dcae_jax import errors
from dcae_jax.autoencoder import families
from dcae_jax.autoencoder.weights import conversion, safetensors_files

# Names of released models: the variant, and the published scaling factor.
RELEASED: dict[str, tuple[str, float | None]] = {
  "dc-ae-f32c32-in-1.0": ("f32c32", 0.3189),
  "dc-ae-f32c32-in-1.0-256px": ("f32c32", None),
  "dc-ae-f32c32-mix-1.0": ("f32c32", 0.4552),
  "dc-ae-f64c128-in-1.0": ("f64c128", 0.2889),
  "dc-ae-f64c128-mix-1.0": ("f64c128", 0.4538),
  "dc-ae-f128c512-in-1.0": ("f128c512", 0.4883),
  "dc-ae-f128c512-mix-1.0": ("f128c512", 0.3620),
  "dc-ae-f32c32-sana-1.0": ("f32c32-sana", 0.41407),
  "dc-ae-f32c32-sana-1.1": ("f32c32-sana", 0.41407),
  "dc-ae-lite-f32c32-sana-1.1": ("f32c32-lite", 0.41407),
  "dc-ae-lite-f32c32": ("f32c32-lite", 0.41407),
  "dc-ae-f32c128-1.5": ("f32c128-1.5", None),
  "dc-ae-1.5-f32c128": ("f32c128-1.5", None),
  "dc-ae-f64c128-1.5": ("f64c128-1.5", 0.5935),
  "dc-ae-1.5-f64c128": ("f64c128-1.5", 0.5935),
  "sd-vae-ft-mse": ("sd-vae-f8c4", 0.18215),
  "sd-vae-ft-ema": ("sd-vae-f8c4", 0.18215),
  "sdxl-vae": ("sd-vae-f8c4", 0.13025),
}
# Keys that a config may have beside a mere name.
_SAY_NOTHING = {"scaling_factor", "in_channels"}


class Released(NamedTuple):
  """An autoencoder in safetensors files, with all its tensors.

  Attributes:
    label: its released name, or the end of its path.
    name: the key of `RELEASED` that a config or a path names, or "".
    architecture: its widths, depths and blocks.
    image_channels: 3, unless a config or the file says otherwise.
    scaling_factor: None if it is not known.
    shift_factor: what is subtracted from latents before they are scaled.
    entries: where each of our arrays is in the files.
    files: of each tensor.
  """

  label: str
  name: str
  architecture: families.Architecture
  image_channels: int
  scaling_factor: float | None
  shift_factor: float
  entries: list[conversion.Entry]
  files: dict[str, pathlib.Path]


def find(source: str) -> Released:
  """Finds a released autoencoder and checks the names and shapes of it all.

  Reads no weights yet. Raises UserError if there is no such thing, it is
  damaged or a pickle, or tensors are missing, unexpected or of another shape.

  Args:
    source: a folder with `config.json` and safetensors files (with an index if
      there are several), a safetensors file, or a hub id, which is downloaded
      and cached by huggingface_hub.
  """
  files, config = safetensors_files.find(source)
  tensors, paths = safetensors_files.headers(files)
  try:
    defaults = families.by_class(config).config_defaults
    is_described = "_class_name" in config or (
      config.keys() & defaults.keys() - _SAY_NOTHING
    )
    if is_described:
      architecture, image_channels = families.from_config(config)
      layout = _layout(architecture, tensors)
      entries = conversion.table(architecture, image_channels, layout)
      # As the class in diffusers takes it.
      config = {"scaling_factor": defaults["scaling_factor"]} | config
  except ValueError as error:
    raise errors.UserError(f"config.json of {source!r}: {error}") from error
  if not is_described:
    architecture, image_channels, layout = _recognise(source, tensors)
    entries = conversion.table(architecture, image_channels, layout)
  older_name = families.of(architecture).older_name
  entries = [conversion.as_stored(x, tensors, older_name) for x in entries]
  conversion.check_tensors(source, entries, tensors)
  # Beside a description, `model_name` names an architecture, not the weights.
  model_name = None if is_described else config.get("model_name")
  name = _released_name(source, model_name, architecture)
  factor, shift = _scaling(source, config)
  if factor is None:
    factor = _published_factor(name, architecture)
  return Released(
    name or pathlib.Path(source).name,
    name,
    architecture,
    image_channels,
    factor,
    shift,
    entries,
    paths,
  )


def _scaling(source: str, config: dict[str, Any]) -> tuple[float | None, float]:
  """The scaling factor, if a config has one, and the shift before it."""

  def number(key: str, least: float, what: str) -> float | None:
    value = config.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and least < value < 1e30):
      raise errors.UserError(
        f"config.json of {source!r}: {key}={value!r} is not a {what}"
      )
    return value

  factor = number("scaling_factor", 0, "positive number")
  return factor, float(number("shift_factor", -1e30, "number") or 0)


def _recognise(
  source: str, tensors: dict[str, tuple[int, ...]]
) -> tuple[families.Architecture, int, str]:
  """The variant, image channels and layout that share most with a file."""

  def shared(candidate) -> float:
    expected = conversion.tensor_shapes(conversion.table(*candidate)).items()
    return len(expected & tensors.items()) / len(expected | tensors.items())

  # Names are compared first: shapes take longer to find out.
  candidates = [
    (architecture, _image_channels(architecture, layout, tensors), layout)
    for architecture in families.variants().values()
    for layout in families.of(architecture).layouts
    if 2 * _known(architecture, layout, tensors) > len(_modules(tensors))
  ]
  best = max(candidates, key=shared, default=None)
  if best is None or shared(best) < 0.5:
    names = ", ".join(families.FAMILIES)
    known = ", ".join(families.variants())
    raise errors.UserError(
      f"{source!r} is not recognised as one of {names}: put its config.json "
      f"beside the safetensors file (known without one: {known})"
    )
  return best


def _layout(
  architecture: families.Architecture, tensors: dict[str, tuple[int, ...]]
) -> str:
  """The layout with the most names of a file."""
  layouts = families.of(architecture).layouts
  return max(layouts, key=lambda x: _known(architecture, x, tensors))


def _known(
  architecture: families.Architecture,
  layout: str,
  tensors: dict[str, tuple[int, ...]],
) -> int:
  """How many of a file's modules an architecture has in a layout."""
  modules = families.of(architecture).modules(architecture)
  known = {name for module in modules for name in module.names(layout)}
  return len(_modules(tensors) & known)


def _modules(tensors: dict[str, tuple[int, ...]]) -> set[str]:
  return {name.rpartition(".")[0] for name in tensors}


def _image_channels(
  architecture: families.Architecture,
  layout: str,
  tensors: dict[str, tuple[int, ...]],
) -> int:
  """The inputs of the first convolution; 3 if the file has none."""
  for module in families.of(architecture).modules(architecture):
    if module.ours.startswith("encoder/project_in"):
      shape = tensors.get(f"{getattr(module, layout)}.weight", ())
      if len(shape) == 4:
        return shape[1]
  return 3


def _released_name(
  source: str, model_name: Any, architecture: families.Architecture
) -> str:
  """What a config says, the end of a path or hub id, or a cache's folder."""
  known = families.name_of(architecture)
  *folders, before_last, last = ("", "", *pathlib.Path(source).parts)
  cached = [part for part in folders if part.startswith("models--")]
  for part in (model_name, last, before_last, *cached):
    if isinstance(part, str):
      name = part.split("--")[-1].removesuffix(".safetensors")
      name = name.removesuffix("-diffusers")
      if name in RELEASED and RELEASED[name][0] == known:
        return name
  return ""


def published_factors(architecture: families.Architecture) -> dict[str, float]:
  """Of all released models of a variant, by their names."""
  known = families.name_of(architecture)
  return {
    name: factor
    for name, (variant_name, factor) in RELEASED.items()
    if factor is not None and variant_name == known
  }


def name_for(variant: str) -> str:
  """A released model of that variant, or ""; the original code needs one."""
  return next((n for n, (known, _) in RELEASED.items() if known == variant), "")


def _published_factor(
  name: str, architecture: families.Architecture
) -> float | None:
  """None if the published ones differ, or there is none."""
  if name:
    return RELEASED[name][1]
  factors = set(published_factors(architecture).values())
  return factors.pop() if len(factors) == 1 else None
