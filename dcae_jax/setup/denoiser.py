"""Loads a `Denoiser`: of a training run, or of released weights."""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dcae_jax import errors
from dcae_jax.autoencoder import autoencoder as autoencoder_lib
from dcae_jax.diffusion import denoiser, samplers, sampling
from dcae_jax.diffusion.denoisers import released
from dcae_jax.diffusion.text import encoders
from dcae_jax.latents import decode
from dcae_jax.nn import precision
from dcae_jax.runs import work_directory
from dcae_jax.setup import denoising, keys, text
from dcae_jax.training import sharding

_ADVICE = "name it, load_denoiser(..., autoencoder=...)"
_ADAPTIVE = (samplers.Dopri5(), 1000)  # steps at most
# Sampler and steps of released weights, as they are published: of noise, and of
# velocity.
_SAMPLERS = {
  "DiT": ((samplers.DDPM(), 250), _ADAPTIVE),
  "UViT": ((samplers.DPMSolver(), 30), _ADAPTIVE),
  "PixArt": ((samplers.TimeDPMSolver(), 20), (samplers.FlowDPMSolver(), 20)),
  "SANA": ((samplers.TimeDPMSolver(), 20), (samplers.FlowDPMSolver(), 20)),
}
_TEXT_ENCODERS = {
  "PixArt": "PixArt-alpha/PixArt-XL-2-512x512",
  "SANA": "Efficient-Large-Model/gemma-2-2b-it",
}


def load(
  path: str | os.PathLike,
  *,
  autoencoder: str | os.PathLike = "",
  text_encoder: str | os.PathLike = "",
  dtype: DTypeLike = "float32",
) -> denoiser.Denoiser:
  """Loads a denoiser.

  Args:
    path: the work directory of a training run (its averages are loaded); a
      folder, file or hub id of released weights: UViT, USiT or DiT on DC-AE's
      latents, PixArt or SANA, in the original or diffusers' layout; or the
      folder or hub id of a pipeline.
    autoencoder: what decodes samples, as `dcae_jax.load` takes it; "": that of
      the run, of the pipeline's folder, or the one that its authors name on
      the hub.
    text_encoder: what encodes prompts, as `load_text_encoder` takes it; "": as
      for the autoencoder. One with an instruction is set afterwards.
    dtype: of the computation; parameters stay float32.

  Raises:
    UserError: there is nothing of that kind, it is damaged or a pickle, or its
      tensors do not fit.
  """
  path, autoencoder, text_encoder = (
    os.path.expanduser(os.fspath(x)) for x in (path, autoencoder, text_encoder)
  )
  precision.check_dtype(dtype)
  if work_directory.is_run(path):
    return _of_run(path, autoencoder, text_encoder, dtype)
  found = released.find(path)
  family = found.variant.family
  sampler, steps = next(
    (sampler, steps)
    for sampler, steps in _SAMPLERS[family]
    if isinstance(found.objective, sampler.fits)
  )
  diffusion = sampling.LatentDiffusion(
    released.create(found, dtype=dtype), found.objective, sampler, steps
  )
  load_text_encoder = None
  if found.conditioning.is_text:
    usual = path if _is_pipeline(path, found) else _TEXT_ENCODERS[family]
    source = text_encoder or usual
    load_text_encoder = functools.partial(
      encoders.load, source, max_tokens=found.conditioning.caption_tokens
    )
  vae = pathlib.Path(path) / "vae"
  autoencoder = autoencoder or (str(vae) if vae.is_dir() else "")
  return denoiser.Denoiser(
    found.label,
    diffusion,
    released.read(found),
    load_autoencoder=functools.partial(_autoencoder, found, autoencoder),
    load_text_encoder=load_text_encoder,
    null_is_empty_text=not found.has_null,
    name=found.name,
    origin={
      "autoencoder": found.autoencoder,
      "scaling_factor": found.scaling_factor,
      "normalisation": found.normalisation,
    },
  )


def _is_pipeline(path: str, found: released.Released) -> bool:
  """Whether a text encoder is beside it, in a folder or on the hub."""
  if pathlib.Path(path).exists():
    return (pathlib.Path(path) / "text_encoder").is_dir()
  return next(iter(found.files.values())).parent.name == "transformer"


def _autoencoder(
  found: released.Released, path: str
) -> autoencoder_lib.Autoencoder:
  name = found.autoencoder
  if not (path or name):
    raise errors.UserError(
      f"{found.label} does not say which autoencoder its latents are of; "
      f"{_ADVICE}"
    )
  if not path:
    path = f"mit-han-lab/{name}-diffusers"
    if name.startswith("sd-vae"):
      path = f"stabilityai/{name}"
    elif name.startswith("dc-ae-1.5"):
      path = f"dc-ai/{name}"
  return autoencoder_lib.load(path, scaling_factor=found.scaling_factor)


def _of_run(
  run: str, autoencoder: str, text_encoder: str, dtype: DTypeLike
) -> denoiser.Denoiser:
  recorded = work_directory.read_run_config(run, "train_diffusion")
  config = keys.completed(recorded, run)
  config.model.dtype = jnp.dtype(dtype).name
  with work_directory.naming_plugins(run, recorded):
    diffusion = denoising.create(config.model, config.objective, config.sampler)
  mesh = sharding.create_mesh(1, 1, 1, jax.local_devices()[:1])
  whole = sharding.replicated(mesh)
  _, variables = denoising.averages(run, diffusion.denoiser, whole)
  description = decode.read_description(run)
  return denoiser.Denoiser(
    "custom" if config.model.architecture else config.model.variant,
    diffusion,
    variables,
    load_autoencoder=functools.partial(
      decode.load_autoencoder, description, autoencoder, _ADVICE
    ),
    load_text_encoder=(
      functools.partial(
        text.of_run, config.text, description, text_encoder, mesh
      )
      if diffusion.conditioning.is_text
      else None
    ),
    origin={
      "scaling_factor": description["scaling_factor"],
      "normalisation": description.get("normalisation"),
    },
  )
