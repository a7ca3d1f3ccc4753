"""Latents of a store back to images, by the autoencoder that made them.

A diffusion model's work directory keeps what is needed for that in
`latents.json`, so that samples are decoded without the store.
"""

import os
from typing import Any

import jax
import numpy as np
from etils import epath

from dcae_jax import errors
from dcae_jax.autoencoder import (
  autoencoder,
  latent_statistics,
  quantisation,
)
from dcae_jax.autoencoder.weights import conversion
from dcae_jax.latents import aspect_ratios, encode, layout
from dcae_jax.runs import (
  differences,
  json_types,
  metrics_writer,
  places,
  regular_files,
  resumable_store,
)

_FILE = "latents.json"
# With other values of these, latents have another meaning,
_MEANING = ("encoder", "scaling_factor", "shift_factor", "shape", "classes")
# or batches have other rows.
_SAME = (*_MEANING, "count", "views", "rows_of_shards", "crop", "source")
_TYPES = {
  **{key: layout.TYPES[key] for key in _MEANING if key in layout.TYPES},
  "autoencoder": layout.TYPES["autoencoder?"], "encoder": str, "count": int,
  "views": [str], "rows_of_shards": [int], "crop": dict, "source": dict,
  "text_encoder?": dict,
  "normalisation?": latent_statistics.NORMALISATION_TYPES,
}  # fmt: skip
# What must be the same where there is one, and what it is.
_OPTIONAL = {
  "text_encoder": "another text encoder",
  "normalisation": "another normalisation",
}


def load_autoencoder(
  manifest: dict[str, Any], path: str, advice: str, dtype: str = "float32"
) -> autoencoder.Autoencoder:
  """The autoencoder that made a store's latents.

  Args:
    manifest: of the store.
    path: of the weights; "": as the manifest says.
    advice: what to do if they are not there, for messages.
    dtype: of the computation.

  Raises:
    UserError: it cannot be loaded, or has another encoder.
  """
  made_with = manifest["autoencoder"]
  path = path or made_with["init_from"]
  try:
    ae = autoencoder.load(
      path,
      scaling_factor=manifest["scaling_factor"],
      dtype=dtype,
      space_to_channel=made_with["space_to_channel"],
    )
  except (ValueError, OSError) as error:
    raise errors.UserError(
      f"the autoencoder {path!r} cannot be loaded ({error}); {advice}"
    ) from error
  encoder = encode.encoder_variables(ae.variables)
  if conversion.fingerprint(encoder) != made_with["encoder_sha256"]:
    raise errors.UserError(
      f"{path!r} does not have the encoder that these latents were made with "
      f"(sha256 {made_with['encoder_sha256']}); {advice}"
    )
  return ae


def to_pixels(ae: autoencoder.Autoencoder, z: np.ndarray) -> np.ndarray:
  """Latents [n, h, w, c] as they are stored, to uint8 images."""
  return np.asarray(quantisation.quantise(ae.decode(z)), np.uint8)


def normalisation(described: dict[str, Any]) -> latent_statistics.Normalisation:
  """Of what a run learned from, by its description."""
  if own := described.get("normalisation"):
    return latent_statistics.Normalisation(**own)
  return latent_statistics.by_factor(described)


def description(store: aspect_ratios.Store) -> dict[str, Any]:
  """What a run needs to know of its latents; UserError if it is not there."""
  kept = ("autoencoder", *_SAME)
  described = store.manifest | {
    "encoder": store.manifest.get("autoencoder", {}).get("encoder_sha256"),
    "rows_of_shards": [shard["rows"] for shard in store.manifest["shards"]],
  }
  path = f"{store.path}/{resumable_store.MANIFEST}"
  needed = dict.fromkeys(kept, json_types.ANYTHING)
  json_types.check(path, described, needed, "export it again")
  described = {key: described[key] for key in kept}
  if store.normalisation != normalisation(described):
    described["normalisation"] = store.normalisation._asdict()
  return described


def write_description(workdir: epath.Path, described: dict[str, Any]) -> None:
  """Writes a description into the work directory, on the first process."""
  if jax.process_index() == 0:
    metrics_writer.write_json(workdir / _FILE, described)


def read_description(run: str) -> dict[str, Any]:
  """What `write_description` wrote; a manifest for the functions above.

  Raises:
    UserError: it is not there, or damaged.
  """
  path = epath.Path(run).expanduser() / _FILE
  advice = "bring it back, or start that run of train_diffusion again"
  if not path.exists():
    raise errors.UserError(f"{run} has no {_FILE}; {advice}")
  data = regular_files.checked(path).read_bytes()
  described = json_types.parsed(os.fspath(path), data, _TYPES, advice)
  made_with = described["autoencoder"]
  made_with["init_from"] = places.found(made_with["init_from"], run)
  return described


def check_same_latents(workdir: epath.Path, described: dict[str, Any]) -> None:
  """Raises UserError if a run began with other latents than these."""
  if (workdir / _FILE).exists():
    before = read_description(str(workdir))
    differences.check_same(
      *_parts(_SAME, before, described),
      f"the run in {workdir} began with other latents",
      "bring them back, or choose another --workdir",
    )
    for key, other in _OPTIONAL.items():
      differences.check_same(
        *({key: x.get(key)} for x in (before, described)),
        f"the run in {workdir} began with {other}",
        "name it again, or choose another --workdir",
      )


def check_same_meaning(run: str, store: aspect_ratios.Store) -> None:
  """Raises UserError if a store has other latents than a run learned from."""
  differences.check_same(
    *_parts(_MEANING, read_description(run), description(store)),
    f"{store.path} holds other latents than {run} was trained on",
    "name the store that it was trained on",
  )


def _parts(
  keys: tuple[str, ...], *descriptions: dict[str, Any]
) -> list[dict[str, Any]]:
  return [{key: x[key] for key in keys} for x in descriptions]
