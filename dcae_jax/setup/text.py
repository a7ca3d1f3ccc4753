"""Text encoders, from configs: to train with, to encode with, or as shapes."""

from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dcae_jax import errors
from dcae_jax.diffusion import conditioning
from dcae_jax.diffusion.text import encoders
from dcae_jax.latents import captions, reader
from dcae_jax.nn import precision
from dcae_jax.runs import differences
from dcae_jax.setup import latent_reading
from dcae_jax.training import sharding

DESCRIBED = "text_encoder"  # in what a run keeps of its latents
NULL_CAPTIONS = ("empty", "random", "learned")


def abstract(config: ConfigDict, mesh: Mesh) -> encoders.TextEncoder:
  """The encoder of a config with shapes as its variables: no weights are read.

  Raises UserError if there is no such encoder, or it cannot be used so.
  """
  return _load(config, mesh, abstract=True)


def load(config: ConfigDict, mesh: Mesh) -> encoders.TextEncoder:
  """With its weights, split over the mesh; raises UserError as `abstract`."""
  return _load(config, mesh, abstract=False)


def _load(config: ConfigDict, mesh: Mesh, abstract: bool):
  precision.check_dtype(config.dtype)
  return encoders.load(
    config.encoder,
    dtype=config.dtype,
    max_tokens=config.max_tokens,
    instruction=config.instruction,
    mesh=mesh,
    abstract=abstract,
  )


def conditioning_of(config: ConfigDict) -> conditioning.Captions:
  """What a denoiser is told by the encoder of a config."""
  device = sharding.create_mesh(1, 1, 1, jax.local_devices()[:1])
  encoder = abstract(config, device)
  return conditioning.Captions(encoder.max_tokens, encoder.width)


class Told(NamedTuple):
  """What conditions of a training take besides the rows of its store.

  Attributes:
    prepare: of a batch, by the name of the condition.
    constants: that the step takes after the batch.
    examples: the condition of the samples that are shown.
    null_caption: states [l, d] that it begins with; None: random numbers.
    described: what a run keeps of its encoder.
  """

  prepare: dict[str, reader.Prepare]
  constants: tuple[Any, ...]
  examples: conditioning.Condition
  null_caption: np.ndarray | None = None
  described: dict[str, Any] = MappingProxyType({})


def told(
  config: ConfigDict, mesh: Mesh, rows: np.ndarray, prompts: np.ndarray
) -> Told:
  """Of a training that learns captions: loads the encoder of `config.text`.

  With a cache it is let go again, once it has encoded the prompts.

  Raises UserError for a cache of other captions, or of another encoder.
  """
  encoder, of_text = load(config.text, mesh), config.text
  prepare = captions.Tokens(encoder.tokenizer)
  if of_text.cache:
    prepare = captions.States(
      of_text.cache,
      encoder.max_tokens,
      cache_megabytes=latent_reading.cache_megabytes(config),
      retries=config.data.retries,
    )
    prepare.check(rows, encoder.description())
  null_caption = None
  if of_text.null == "empty":
    states, _ = encoder.encode([""])
    null_caption = np.asarray(states[0], np.float32)
  return Told(
    {conditioning.Captions.name: prepare},
    () if of_text.cache else (encoder.variables,),
    conditioning.told(*encoder.encode(list(prompts))),
    null_caption,
    {DESCRIBED: encoder.description()},
  )


class Untold:
  """What is chosen is a condition already, and the null condition the usual."""

  def __call__(
    self, choices: np.ndarray
  ) -> tuple[conditioning.Condition, None]:
    return choices, None

  def identity(self, choices: np.ndarray) -> dict[str, Any]:
    """What must be the same to go on with a directory, besides the rest."""
    del choices
    return {}


class Prompting:
  """What is chosen are prompts, and the null condition a negative prompt."""

  def __init__(self, encoder: encoders.TextEncoder, negative_prompt: str):
    """A negative prompt that is empty is the null caption."""
    self._encoder, self._negative = encoder, negative_prompt

  def __call__(
    self, prompts: np.ndarray
  ) -> tuple[conditioning.Condition, conditioning.Condition | None]:
    condition = conditioning.told(*self._encoder.encode(list(prompts)))
    if not self._negative:
      return condition, None
    null = conditioning.told(*self._encoder.encode([self._negative]))
    repeated = lambda x: np.repeat(np.asarray(x), len(prompts), 0)
    return condition, jax.tree.map(repeated, null)

  def identity(self, choices: np.ndarray) -> dict[str, Any]:
    """What must be the same to go on with a directory, besides the rest."""
    return {
      "prompts_sha256": captions.fingerprint(choices),
      "negative_prompt": self._negative,
    }


def of_run(
  config: ConfigDict, described: dict[str, Any], path: str, mesh: Mesh
) -> encoders.TextEncoder:
  """The encoder that a run learned with, split over the mesh.

  Args:
    config: `text` of the run.
    described: what the run says of it.
    path: where it is; "": where it was in training.
    mesh: over whose devices it is split.

  Raises:
    UserError: it cannot be loaded, or is another one.
  """
  config = config.copy_and_resolve_references()
  config.encoder = path or config.encoder
  encoder = load(config, mesh)
  differences.check_same(
    described.get(DESCRIBED, {}),
    encoder.description(),
    f"the text encoder {config.encoder} is not the one that the run learned "
    "with",
    "name that one, with the same config.text",
  )
  return encoder


def check_null(config: ConfigDict) -> None:
  """Raises UserError for an unknown kind of null caption."""
  if config.null not in NULL_CAPTIONS:
    raise errors.UserError(
      f"config.text.null={config.null!r} is not among "
      f"{', '.join(NULL_CAPTIONS)}"
    )
