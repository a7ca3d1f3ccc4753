"""What a denoiser is told of an image beside the time: its condition.

A condition is a tree of arrays with a row for each example. A kind of condition
is a small value: all that others need to know of it, so that training, guidance
and samplers pass conditions on without a look inside. Which kind a denoiser
takes is said in the table of denoisers.
"""

import abc
import dataclasses
import logging
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dcae_jax import errors
from dcae_jax.data import captions
from dcae_jax.diffusion.text import encoders

_LOG = logging.getLogger(__name__)
_DESCRIBED = 64  # captions that a run keeps of those that it learned from
Condition = Any  # a tree of arrays [b, ...]


class Conditioning(abc.ABC):
  """A kind of condition.

  A frozen dataclass, whose fields are numbers of a denoiser's config that come
  from the latents.
  """

  name: ClassVar[str]  # of the array of a latent store that holds them
  is_text: ClassVar[bool] = False  # which a text encoder makes conditions of

  @classmethod
  @abc.abstractmethod
  def of_latents(
    cls, rows: np.ndarray, classes: Sequence[str], path: str
  ) -> "Conditioning":
    """That of some latents; raises UserError for rows that cannot be.

    There are no rows where there is no store yet, and no names of classes where
    images have none. The path of the store is for messages.
    """

  @abc.abstractmethod
  def describe_rows(self, rows: np.ndarray) -> dict[str, Any]:
    """What a run keeps of what it learned from; `choices` reads it."""

  @abc.abstractmethod
  def abstract(self, b: int) -> Condition:
    """Shapes and dtypes of a batch."""

  @abc.abstractmethod
  def null(self, condition: Condition) -> Condition:
    """The null condition, one row for each example."""

  @abc.abstractmethod
  def check_chosen(self, chosen: Sequence[Any]) -> None:
    """Raises UserError for choices of a user that are not of this kind."""

  @abc.abstractmethod
  def choices(
    self, chosen: Sequence[Any], learned: dict[str, Any]
  ) -> Condition:
    """Those that samples are drawn for: all that are chosen, or were learned.

    Raises UserError for one that was not learned, or if what was learned is
    not known.
    """

  @abc.abstractmethod
  def shown(self, choices: Condition, count: int) -> Condition:
    """At most so many different ones of the choices, for a picture."""

  @abc.abstractmethod
  def like(self, condition: Condition, rows: np.ndarray) -> np.ndarray:
    """For each row of a condition, a row of a store that has the same."""

  @abc.abstractmethod
  def file_names(self, condition: Condition) -> list[str]:
    """For the names of files."""

  @abc.abstractmethod
  def titles(self, condition: Condition, classes: Sequence[str]) -> list[str]:
    """For people."""

  def texts(self, condition: Condition) -> list[dict[str, str]]:
    """What the files of images keep, by keyword."""
    return [{} for _ in condition]


@dataclasses.dataclass(frozen=True)
class ClassLabels(Conditioning):
  """A class label for each example; the one after the last means none.

  Attributes:
    num_classes: without the null class.
  """

  num_classes: int
  name: ClassVar[str] = "labels"

  def __post_init__(self):
    if self.num_classes < 1:
      raise errors.UserError(
        f"num_classes={self.num_classes} is below 1; give 1, and every image "
        "the label 0, for data without classes"
      )

  @classmethod
  def of_latents(
    cls, rows: np.ndarray, classes: Sequence[str], path: str
  ) -> "ClassLabels":
    least, most = rows.min(initial=0), rows.max(initial=0)
    if least < 0 or (classes and most >= len(classes)):
      raise errors.UserError(
        f"{path} has labels from {least} to {most}, and {len(classes)} "
        "classes; labels count from 0: export it again"
      )
    count = len(classes) or int(most) + 1
    empty = count - len(np.unique(rows))
    if len(rows) and empty:
      _LOG.warning("%d of %d classes of %s have no latents", empty, count, path)
    return cls(count)

  def describe_rows(self, rows: np.ndarray) -> dict[str, Any]:
    counts = np.bincount(rows, minlength=self.num_classes)
    return {"rows_of_classes": counts.tolist()}

  def abstract(self, b: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((b,), jnp.int32)

  def null(self, condition: Int[Array, " b"]) -> Int[Array, " b"]:
    return jnp.full_like(condition, self.num_classes)

  def check_chosen(self, chosen: Sequence[Any]) -> None:
    for label in chosen:
      if type(label) is not int or not 0 <= label < self.num_classes:
        raise errors.UserError(
          f"class {label!r} is not from 0 to {self.num_classes - 1}, the "
          "classes of the model"
        )

  def choices(
    self, chosen: Sequence[Any], learned: dict[str, Any]
  ) -> np.ndarray:
    self.check_chosen(chosen)
    rows = learned.get("rows_of_classes", ())
    if len(rows) != self.num_classes:
      raise errors.UserError(
        f"latents.json of the run has no 'rows_of_classes' of "
        f"{self.num_classes} classes: it is damaged; bring it back, or train "
        "again"
      )
    for label in chosen:
      if not rows[label]:
        raise errors.UserError(
          f"class {label} in config.classes had no latents: the run did not "
          "learn it"
        )
    return np.array(list(chosen) or np.flatnonzero(rows), np.int32)

  def shown(self, choices: np.ndarray, count: int) -> np.ndarray:
    """Evenly spread, in order."""
    known = np.unique(choices)
    places = np.linspace(0, len(known) - 1, min(count, len(known)))
    return known[places.astype(int)]

  def like(self, condition: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.array([np.flatnonzero(rows == label)[0] for label in condition])

  def file_names(self, condition: np.ndarray) -> list[str]:
    return [f"class_{label}" for label in condition]

  def titles(self, condition: np.ndarray, classes: Sequence[str]) -> list[str]:
    if not classes:
      return [f"class {label}" for label in condition]
    return [
      f"{label}: {pathlib.PurePath(classes[label]).stem}" for label in condition
    ]


@dataclasses.dataclass(frozen=True)
class Captions(Conditioning):
  """A caption for each example, as a frozen text encoder sees it.

  A condition is `{"states": [b, l, d], "mask": [b, l] bool, "is_null": [b]
  bool}`: the encoder's states of a caption's tokens, which of them are tokens,
  and whether the denoiser takes its null caption instead of the states, under
  the same mask. What is chosen to be drawn are prompts, an array of strings.

  Attributes:
    caption_tokens: l, the most that a caption has.
    caption_width: d, of the states.
  """

  caption_tokens: int
  caption_width: int
  name: ClassVar[str] = "captions"
  is_text: ClassVar[bool] = True

  @classmethod
  def of_latents(
    cls, rows: np.ndarray, classes: Sequence[str], path: str
  ) -> "Captions":
    """Without its numbers, which are those of a text encoder."""
    empty = sum(not row for row in rows)
    if empty:
      raise errors.UserError(
        f"{empty} of {len(rows)} images of {path} have no caption: it is "
        "damaged; export it again"
      )
    return cls(0, 0)

  def describe_rows(self, rows: np.ndarray) -> dict[str, Any]:
    """Some captions, the first one of each of some rows."""
    places = np.linspace(0, len(rows) - 1, min(_DESCRIBED, len(rows)))
    firsts = [captions.split(rows[i])[0].text for i in places.astype(int)]
    return {"captions": list(dict.fromkeys(firsts))}

  def abstract(self, b: int) -> dict[str, jax.ShapeDtypeStruct]:
    tokens, width = self.caption_tokens, self.caption_width
    return {
      "states": jax.ShapeDtypeStruct((b, tokens, width), jnp.float32),
      "mask": jax.ShapeDtypeStruct((b, tokens), jnp.bool_),
      "is_null": jax.ShapeDtypeStruct((b,), jnp.bool_),
    }

  def null(self, condition: Condition) -> Condition:
    return condition | {"is_null": jnp.ones_like(condition["is_null"])}

  def check_chosen(self, chosen: Sequence[Any]) -> None:
    for prompt in chosen:
      if not isinstance(prompt, str) or not prompt.strip():
        raise errors.UserError(
          f"prompt {prompt!r} is empty, or no text; unconditional samples are "
          "those of guidance 0"
        )
      if re.search("[\ud800-\udfff]", prompt):
        raise errors.UserError(
          f"prompt {prompt!a} is no whole text; write it in UTF-8"
        )

  def choices(
    self, chosen: Sequence[Any], learned: dict[str, Any]
  ) -> np.ndarray:
    """The prompts that are chosen, or else some captions that were learned."""
    self.check_chosen(chosen)
    prompts = list(chosen) or learned.get("captions")
    if not prompts:
      raise errors.UserError(
        "latents.json of the run has no 'captions': it is damaged; bring it "
        "back, or name prompts"
      )
    return np.array(prompts)

  def shown(self, choices: np.ndarray, count: int) -> np.ndarray:
    """The first ones."""
    return choices[np.sort(np.unique(choices, return_index=True)[1])][:count]

  def like(self, condition: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """-1 for a prompt that is nobody's caption."""
    known = {
      caption: i
      for i, row in reversed(list(enumerate(rows)))
      for caption, _ in captions.split(row)
    }
    return np.array([known.get(prompt, -1) for prompt in condition])

  def file_names(self, condition: np.ndarray) -> list[str]:
    words = (re.sub(r"[^a-z0-9]+", "_", x.lower()) for x in condition)
    return [text.strip("_")[:48] or "prompt" for text in words]

  def titles(self, condition: np.ndarray, classes: Sequence[str]) -> list[str]:
    return list(map(str, condition))

  def texts(self, condition: np.ndarray) -> list[dict[str, str]]:
    return [{"prompt": prompt} for prompt in condition]


class Loaded(NamedTuple):
  """What a training's batches bring of a condition.

  Attributes:
    abstract: shapes and dtypes of a batch of so many.
    constants: what the step takes after the batch, as shapes: frozen arrays.
    condition: `(loaded, *constants) -> condition`, for the step's program.
    macs: multiply-accumulates of that, for a row.
  """

  abstract: Callable[[int], Any]
  constants: tuple[Any, ...]
  condition: Callable[..., Condition]
  macs: int = 0


def as_it_is(conditioning: Conditioning) -> Loaded:
  return Loaded(conditioning.abstract, (), lambda loaded: loaded)


def of_states(conditioning: Captions) -> Loaded:
  """States that were encoded before, in bfloat16, with their mask."""

  def abstract(b):
    states = conditioning.abstract(b)["states"]
    mask = conditioning.abstract(b)["mask"]
    return {
      "states": jax.ShapeDtypeStruct(states.shape, jnp.bfloat16),
      "mask": mask,
    }

  return Loaded(abstract, (), lambda loaded: told(**loaded))


def of_tokens(encoder: encoders.TextEncoder) -> Loaded:
  """Tokens, which the step encodes; the encoder's arrays may be shapes."""

  def abstract(b):
    shape = (b, encoder.length)
    return {
      "ids": jax.ShapeDtypeStruct(shape, jnp.int32),
      "mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
    }

  def condition(loaded, variables):
    states = encoder.apply(variables, **loaded)
    return told(jax.lax.stop_gradient(states), encoder.kept(loaded["mask"]))

  return Loaded(abstract, (encoder.variables,), condition, encoder.forward_macs)


def told(states: Any, mask: Any) -> Condition:
  """The condition that captions are whose states these are."""
  is_null = jnp.zeros(len(states), jnp.bool_)
  return {"states": states, "mask": mask, "is_null": is_null}


def dropped(
  conditioning: Conditioning, key: Array, condition: Condition, rate: float
) -> Condition:
  """The condition, with a part `rate` of its rows replaced by none."""
  rows = len(jax.tree.leaves(condition)[0])
  drop = jax.random.bernoulli(key, rate, (rows,))
  return jax.tree.map(
    lambda x, null: jnp.where(drop.reshape(-1, *[1] * (x.ndim - 1)), null, x),
    condition,
    conditioning.null(condition),
  )


def drawn(
  choices: Condition, number: int, size: int, seed: int | None = None
) -> Condition:
  """A batch of some choices, the rows of a condition.

  Without a seed they come in turn, and the batch of the next number goes on
  with them. A seed draws them at random, with replacement.
  """
  count = len(jax.tree.leaves(choices)[0])
  if seed is None:
    places = np.arange(number * size, (number + 1) * size) % count
  else:
    places = np.random.default_rng((seed, number)).integers(count, size=size)
  return jax.tree.map(lambda x: x[places], choices)
