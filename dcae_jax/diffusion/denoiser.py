"""`Denoiser`: draw samples, predict and save, for those who only use one.

  import dcae_jax
  denoiser = dcae_jax.load_denoiser("runs/f64/uvit_h")
  images = denoiser.sample(labels=[207, 360], guidance=1.5)

On one device; training and evaluation over many devices are tasks of their own.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dcae_jax import errors
from dcae_jax.autoencoder import autoencoder as autoencoder_lib
from dcae_jax.autoencoder import latent_statistics, network
from dcae_jax.diffusion import conditioning, sampling
from dcae_jax.diffusion.denoisers import released
from dcae_jax.diffusion.text import encoders
from dcae_jax.training import sharding

_Numbers = ArrayLike | Sequence[Any]
_LARGEST_BATCH = 16  # samples at a time; more of them go in parts
_AXES = {"z": "bhwc", "t": "b", "labels": "b", "states": "bld", "mask": "bl"}


class Denoiser:
  """A denoiser of latents with its weights.

  Attributes:
    variant: such as "UViT-H", or "custom".
    diffusion: the linen module `diffusion.denoiser`, what it learned, and how
      it is sampled.
    variables: `{"params": ...}`.
  """

  def __init__(
    self,
    variant: str,
    diffusion: sampling.LatentDiffusion,
    variables: Any,
    *,
    load_autoencoder: Callable[[], autoencoder_lib.Autoencoder],
    load_text_encoder: Callable[[], encoders.TextEncoder] | None = None,
    null_is_empty_text: bool = False,
    name: str = "",
    origin: dict[str, Any] | None = None,
  ):
    """Wraps variables; `load_denoiser` makes them from files.

    Args:
      variant: see the class, as for `diffusion` and `variables`.
      load_autoencoder: is called when samples are first decoded.
      load_text_encoder: is called when prompts are first encoded.
      null_is_empty_text: there is no null caption: guidance leads away from an
        empty prompt.
      name: of released weights.
      origin: `autoencoder`, `scaling_factor` and, if it is of each channel,
        `normalisation` of the latents, as far as they are known.
    """
    self.variant, self.diffusion, self.variables = variant, diffusion, variables
    self._load_autoencoder = load_autoencoder
    self._load_text_encoder = load_text_encoder
    self._null_is_empty_text = null_is_empty_text
    self._name, self._origin = name, origin or {}
    self._mesh = sharding.create_mesh(1, 1, 1, jax.local_devices()[:1])
    self._predict = jax.jit(self.apply)
    self._samplers = {}

  @functools.cached_property
  def autoencoder(self) -> autoencoder_lib.Autoencoder:
    """What decodes samples; it may be set. UserError if it cannot be loaded."""
    return self._load_autoencoder()

  @functools.cached_property
  def text_encoder(self) -> encoders.TextEncoder:
    """What encodes prompts; it may be set. UserError if it cannot be loaded."""
    if self._load_text_encoder is None:
      raise errors.UserError(f"{self.variant} is told labels, and no captions")
    return self._load_text_encoder()

  def apply(
    self,
    variables: Any,
    z: jax.Array,
    t: jax.Array,
    condition: conditioning.Condition,
  ) -> jax.Array:
    """The network as a function, for your own `jax.jit`; nothing is checked."""
    is_exact = jnp.dtype(self.diffusion.denoiser.dtype) == jnp.float32
    with jax.default_matmul_precision("highest" if is_exact else None):
      return self.diffusion.denoiser.apply(variables, z, t, condition)  # pyright: ignore[reportReturnType]

  def predict(
    self,
    z: _Numbers,
    t: _Numbers,
    *,
    labels: _Numbers | None = None,
    states: _Numbers | None = None,
    mask: _Numbers | None = None,
    **others: _Numbers,
  ) -> jax.Array:
    """The network alone: one prediction.

    Args:
      z: noisy latents [b, h, w, c], scaled.
      t: times [b] as this network sees them.
      labels: of the classes [b]; the one after the last means none.
      states: of captions [b, l, d], from a text encoder.
      mask: which of them are of tokens [b, l], bool; None: all.
      **others: what some networks take besides: `resolution` [b, 2] and
        `aspect_ratio` [b, 1] of the images, `guidance` [b].

    Returns:
      [b, h, w, outputs] in float32: noise or velocity, and behind it, for
      networks with `learn_sigma`, the variance.

    Raises:
      UserError: a condition of another kind than the network's, or arrays of
        other shapes.
    """
    z, t = jnp.asarray(z, jnp.float32), jnp.asarray(t, jnp.float32)
    if self.diffusion.conditioning.is_text:
      if states is None or labels is not None:
        raise errors.UserError(
          f"{self.variant} is told captions: give states, and no labels"
        )
      states = jnp.asarray(states, jnp.float32)
      mask = jnp.ones(states.shape[:2]) if mask is None else jnp.asarray(mask)
      _check_shapes(z=z, t=t, states=states, mask=mask)
      condition = conditioning.told(states, mask.astype(bool))
      condition |= {k: jnp.asarray(x, jnp.float32) for k, x in others.items()}
    else:
      if labels is None or states is not None or mask is not None or others:
        raise errors.UserError(
          f"{self.variant} is told labels: give them, and nothing else"
        )
      condition = jnp.asarray(labels, jnp.int32)
      _check_shapes(z=z, t=t, labels=condition)
    return self._predict(self.variables, z, t, condition)

  def sample(
    self,
    *,
    labels: Sequence[int] | np.ndarray = (),
    prompts: Sequence[str] = (),
    guidance: float = 1.0,
    seed: int = 0,
    steps: int | None = None,
    negative_prompt: str = "",
    size: tuple[int, int] | None = None,
  ) -> jax.Array:
    """Draws an image for each label or prompt.

    Args:
      labels: of classes.
      prompts: texts.
      guidance: scale of classifier-free guidance; 1: without.
      seed: of the noise.
      steps: of the sampler; None: as in training, or as published.
      negative_prompt: what guidance leads away from; "": the null caption.
      size: height and width of the images; None: those of training. A U-ViT
        draws no others.

    Returns:
      [n, height, width, channels], float32 in [-1, 1].

    Raises:
      UserError: labels or prompts that the network does not know, a scale,
        steps or a size that cannot be, an autoencoder or text encoder that is
        not there, or an autoencoder whose scaling factor is not known.
      FloatingPointError: latents are not finite.
    """
    kind = self.diffusion.conditioning
    wrong, chosen = (labels, prompts) if kind.is_text else (prompts, labels)
    if len(wrong) or not len(chosen):
      needed = "prompts" if kind.is_text else "labels"
      raise errors.UserError(
        f"{self.variant} draws samples of {needed}: name some"
      )
    if negative_prompt and not kind.is_text:
      raise errors.UserError(f"{self.variant} takes no negative_prompt")
    if isinstance(chosen, str):
      raise errors.UserError(f"{chosen!r} is one prompt; give a list of them")
    chosen = np.asarray(chosen).tolist()
    kind.check_chosen(chosen)
    ae = self.autoencoder
    latent_size = None
    if size:
      for side in size:
        network.check_side(side, ae.spatial_compression)
      height, width = size
      factor = ae.spatial_compression
      latent_size = height // factor, width // factor
    draw = self._sampler(guidance, steps, latent_size)
    normalisation = self._normalisation(ae)
    key, images = jax.random.key(seed), []
    for number, first in enumerate(range(0, len(chosen), _LARGEST_BATCH)):
      part = chosen[first : first + _LARGEST_BATCH]
      # Filled up to a power of two: few shapes to compile.
      filled = part + part[-1:] * (
        (1 << (len(part) - 1).bit_length()) - len(part)
      )
      condition, null = self._conditions(filled, negative_prompt)
      z = draw(self.variables, jax.random.fold_in(key, number), condition, null)
      if not np.isfinite(z).all():
        raise FloatingPointError(
          f"samples at guidance {guidance:g} are not finite: the scale is too "
          "large, or the model has diverged"
        )
      z = normalisation.undo(z[: len(part)])
      images.append(jnp.clip(ae.decode(z), -1, 1))
    return jnp.concatenate(images)

  def save(self, folder: str | os.PathLike, layout: str = "original") -> None:
    """Writes weights and `config.json` as other libraries load them.

    Args:
      folder: a new or empty one, or one that was saved to before, which is
        replaced in one step: a kill leaves the old or the new one whole.
      layout: "original" or, of PixArt and SANA, "diffusers".

    Raises:
      UserError: a layout that there is not, or that does not know how the
        latents are normalised, or the folder holds something else,
        is or is in the work directory of a run, or cannot be written.
    """
    released.save(
      folder,
      self.variables,
      self.diffusion.denoiser,
      layout,
      name=self._name,
      objective=self.diffusion.objective,
      **self._origin,
    )

  def _normalisation(
    self, ae: autoencoder_lib.Autoencoder
  ) -> latent_statistics.Normalisation:
    if of_channels := self._origin.get("normalisation"):
      return latent_statistics.Normalisation(**of_channels)
    if ae.scaling_factor is None:
      raise errors.UserError(
        "the scaling factor of the autoencoder is not known; set "
        "denoiser.autoencoder.scaling_factor to that of the training"
      )
    return latent_statistics.Normalisation(ae.shift_factor, ae.scaling_factor)

  def _sampler(
    self,
    guidance: float,
    steps: int | None,
    latent_size: tuple[int, int] | None,
  ) -> Callable[..., jax.Array]:
    steps = self.diffusion.steps if steps is None else steps
    key = guidance, steps, latent_size
    if key not in self._samplers:
      diffusion = dataclasses.replace(self.diffusion, steps=steps)
      whole = sharding.replicated(self._mesh)
      sampler = diffusion.sample_function(guidance, whole, latent_size)
      self._samplers[key] = jax.jit(sampler)
    return self._samplers[key]

  def _conditions(
    self, chosen: list[Any], negative_prompt: str
  ) -> tuple[conditioning.Condition, conditioning.Condition | None]:
    if not self.diffusion.conditioning.is_text:
      return np.asarray(chosen, np.int32), None
    encode = lambda texts: conditioning.told(*self.text_encoder.encode(texts))
    if not negative_prompt and not self._null_is_empty_text:
      return encode(chosen), None
    return encode(chosen), encode([negative_prompt] * len(chosen))


def _check_shapes(**arrays: jax.Array) -> None:
  """Raises UserError unless axes of one letter are of one size."""
  sizes = {}
  for name, x in arrays.items():
    axes = _AXES[name]
    same = (
      sizes.setdefault(axis, size) == size
      for axis, size in zip(axes, x.shape, strict=False)
    )
    if x.ndim != len(axes) or not all(same):
      known = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
      raise errors.UserError(
        f"{name} has the shape {list(x.shape)}, not [{', '.join(axes)}], where "
        f"{known}"
      )
