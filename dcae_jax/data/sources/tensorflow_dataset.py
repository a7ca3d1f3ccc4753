"""Prepared datasets of TFDS, read without TensorFlow."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dcae_jax import errors
from dcae_jax.data import captions as image_captions
from dcae_jax.data.sources import protocol


class TensorFlowDataset:
  """Images of a prepared TFDS dataset in array_record format.

  Reads without TensorFlow, local or `gs://`, without decoding. `path` is the
  `data_dir`; "": the default one. With `captions`, they are those of its text
  feature, or of the one that is named after captions.
  """

  def __init__(self, name: str, split: str, path: str, captions: bool = False):
    self._arguments = (name, split, path, captions)
    self._builder = self._prepared()
    label = dict(self._builder.info.features).get("label")
    self._text = self._text_feature() if captions else None
    self.classes = list(getattr(label, "names", None) or [])
    self._records = self._builder.as_data_source(
      split=split, decoders={"image": tfds.decode.SkipDecoding()}
    )

  def _prepared(self):
    name, split, data_dir, _ = self._arguments
    try:
      builder = tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
      place = data_dir or "the default place"
      raise errors.UserError(
        f"there is no TFDS dataset {name!r} in {place}"
      ) from error
    if "image" not in builder.info.features:
      raise errors.UserError(
        f"TFDS dataset {name!r} has no feature `image`; its features are "
        f"{', '.join(builder.info.features)}"
      )
    if split not in builder.info.splits:
      known = ", ".join(builder.info.splits) or "none: it is not prepared"
      raise errors.UserError(
        f"TFDS dataset {name!r} has no split {split!r}; there are {known}"
      )
    return builder

  def __getstate__(self):
    return self._arguments

  def __setstate__(self, arguments):
    self.__init__(*arguments)

  def __len__(self) -> int:
    return len(self._records)

  def name(self, index: int) -> str:
    name, split, *_ = self._arguments
    return f"{name}:{split}[{index}]"

  def key(self, index: int) -> str:
    """The split and the position in it."""
    return f"{self._arguments[1]}[{index}]"

  def fingerprint(self) -> str:
    """sha256 of the dataset's name and version, and its split's shards.

    And of the name of its captions.
    """
    info, (_, split, *_) = self._builder.info, self._arguments
    shards = info.splits[split]
    entry = (info.full_name, split, len(self), shards.num_examples)
    entry += (self._text,) if self._text else ()
    return hashlib.sha256(repr(entry).encode()).hexdigest()

  def __getitem__(self, index: int) -> protocol.Record:
    example = self._records[index]
    label = int(example["label"]) if "label" in example else 0
    captions = ()
    if self._text:
      texts = example
      for key in self._text:
        texts = texts[key]
      texts = [
        x.replace(b"\0", b" ").decode("utf-8", "replace")
        for x in np.ravel(texts)
      ]
      captions = image_captions.of_object({"captions": texts})
    return protocol.Record(self.name(index), example["image"], label, captions)

  def _text_feature(self) -> tuple[str, ...]:
    """The path of the feature that holds captions."""
    known = list(_texts(self._builder.info.features))
    named = [path for path in known if set(path) & set(image_captions.KEYS)]
    for paths in (named, known):
      if len(paths) == 1:
        return paths[0]
    names = ", ".join("/".join(path) for path in known) or "none"
    raise errors.UserError(
      f"TFDS dataset {self._arguments[0]!r} has not one feature of captions; "
      f"its features of text are {names}, and captions are called "
      f"{', '.join(image_captions.KEYS)}"
    )


def _texts(
  feature: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
  """The paths of the features of text in a feature."""
  if isinstance(feature, tfds.features.Text):
    yield path
  elif isinstance(feature, tfds.features.Sequence):
    yield from _texts(feature.feature, path)
  elif isinstance(feature, tfds.features.FeaturesDict):
    for name, part in feature.items():
      yield from _texts(part, (*path, name))
