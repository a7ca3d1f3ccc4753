"""Prompts that samples are drawn for, from the files that hold them."""

import json
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from etils import epath

from dcae_jax import errors
from dcae_jax.runs import regular_files


class Prompt(NamedTuple):
  """A prompt, its category, if there are any, and the object it came in."""

  text: str
  category: str
  metadata: dict[str, Any]


def of_texts(texts: Iterable[str]) -> list[Prompt]:
  return [Prompt(text, "", {"prompt": text}) for text in texts]


def read(path: str | os.PathLike) -> list[Prompt]:
  """The prompts of a file, in order.

  `.json` is MJHQ-30K's meta_data.json, an object of objects with `prompt` and
  `category` by the name of an image: they come by category, then by name.
  `.jsonl` is GenEval's evaluation_metadata.jsonl, an object with `prompt` a
  line. Any other file has a prompt a line.

  Raises UserError for a file that cannot be read, has another form or is empty.
  """
  file = epath.Path(path).expanduser()
  try:
    data = regular_files.checked(file).read_bytes().decode("utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
      f"prompts of {path} cannot be read: {error}"
    ) from error
  readers = {".json": _of_images, ".jsonl": _of_lines}
  try:
    prompts = readers.get(file.suffix.lower(), _of_text)(data)
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise errors.UserError(
      f"{path} does not hold prompts as MJHQ-30K (.json) or GenEval (.jsonl) "
      f"have them: {type(error).__name__} {error}"
    ) from error
  if not prompts or not all(prompt.text.strip() for prompt in prompts):
    raise errors.UserError(f"{path} has no prompts, or empty ones")
  return prompts


def _of_text(data: str) -> list[Prompt]:
  return of_texts(line.strip() for line in data.splitlines() if line.strip())


def _of_lines(data: str) -> list[Prompt]:
  # Not by all that Unicode calls the end of a line: a string may have them.
  values = [json.loads(line) for line in data.split("\n") if line.strip()]
  return [_prompt(x["prompt"], x.get("tag", ""), x) for x in values]


def _of_images(data: str) -> list[Prompt]:
  images = json.loads(data).items()
  order = sorted(images, key=lambda pair: (pair[1]["category"], pair[0]))
  return [
    _prompt(x["prompt"], x["category"], {"image": name} | x)
    for name, x in order
  ]


def _prompt(text: Any, category: Any, metadata: dict[str, Any]) -> Prompt:
  if not isinstance(text, str) or not isinstance(category, str):
    raise ValueError(f"{text!r} of the category {category!r} is no text")
  return Prompt(text, category, metadata)
