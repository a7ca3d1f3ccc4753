"""Captions of an image: one or several, each with a weight.

As a string, in which a latent store keeps them, each is a line: the caption,
and behind a tab its weight unless that is 1.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

SIDECARS = (".json", ".txt")  # beside an image, in place of its suffix
KEYS = ("captions", "caption", "text", "prompt")  # of a JSON object


class Caption(NamedTuple):
  """What is drawn of several captions by its weight, relative to the others'.

  The text is a single line.
  """

  text: str
  weight: float = 1.0


def joined(captions: Sequence[Caption]) -> str:
  """As a string; `split` is the inverse."""
  return "\n".join(
    text if weight == 1 else f"{text}\t{weight:.9g}"
    for text, weight in captions
  )


def split(text: str) -> list[Caption]:
  captions = []
  for line in text.split("\n") if text else ():
    caption, _, weight = line.partition("\t")
    captions.append(Caption(caption, float(weight or 1)))
  return captions


def drawn(weights: Sequence[float], uniform: float) -> int:
  """Which of several captions a uniform number from [0, 1) draws."""
  left = uniform * sum(weights)
  for i, weight in enumerate(weights):
    left -= weight
    if left < 0:
      return i
  return len(weights) - 1  # rounding


def of_text(data: bytes) -> tuple[Caption, ...]:
  """A caption a line, of a text file; empty lines do not count."""
  return _captions(data.decode("utf-8-sig").splitlines())


def of_json(data: bytes) -> tuple[Caption, ...]:
  """Of a JSON file, see `of_object`."""
  return of_object(json.loads(data))


def of_object(values: Any) -> tuple[Caption, ...]:
  """Of an object with the key captions, caption, text or prompt.

  Its value is a string or a list of them, and `weights` are as many numbers;
  those with weight 0 are left out, and halves of characters, which text that
  was cut may end in. Raises ValueError for anything else.
  """
  if not isinstance(values, dict):
    raise ValueError(f"captions are not an object: {str(values)[:40]!r}")
  key = next((key for key in KEYS if values.get(key)), None)
  if key is None:
    return ()
  texts, weights = values[key], values.get("weights")
  return _captions([texts] if isinstance(texts, str) else texts, weights)


def _captions(texts: Any, weights: Any = None) -> tuple[Caption, ...]:
  is_list = isinstance(texts, list) and all(
    isinstance(x, str) and "\0" not in x for x in texts
  )
  if not is_list:
    raise ValueError(f"captions are no texts: {str(texts)[:40]!r}")
  weights = [1] * len(texts) if weights is None else weights
  is_numbers = isinstance(weights, list) and all(
    type(x) in (int, float) and 0 <= x < math.inf for x in weights
  )
  if not is_numbers or len(weights) != len(texts):
    raise ValueError(
      f"weights={str(weights)[:40]} are not {len(texts)} numbers of at least 0"
    )
  whole = (text.encode("utf-8", "ignore").decode() for text in texts)
  lines = [" ".join(text.split()) for text in whole]
  captions = tuple(
    Caption(line, float(weight))
    for line, weight in zip(lines, weights, strict=True)
    if line and weight
  )
  if any(lines) and not captions:
    raise ValueError("all captions have the weight 0")
  return captions
