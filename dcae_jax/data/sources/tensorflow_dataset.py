"""Prepared datasets of TFDS, read without TensorFlow.

From their files alone: no code that makes datasets is looked for, and files
that name code to be imported are refused, since a dataset may be of others.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import constants, naming

from dcae_jax import errors
from dcae_jax.data import captions as image_captions
from dcae_jax.data.sources import files, protocol

_FEATURES, _INFO = constants.FEATURES_FILENAME, constants.DATASET_INFO_FILENAME
# A class that tfds imports; the last one is that of TFDS's first versions.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
_FEATURE_CLASSES = {
  name
  for kind in vars(tfds.features).values()
  if isinstance(kind, type) and issubclass(kind, tfds.features.FeatureConnector)
  for name in (f"{kind.__module__}.{kind.__name__}", *kind.ALIASES)
}


class TensorFlowDataset:
  """Images of a prepared TFDS dataset in array_record format.

  Reads without TensorFlow, local or `gs://`, without decoding. `path` is the
  `data_dir`; "": the default one. `name` may go on with a config and a version,
  as in "coco_captions/2014:1.1.0"; otherwise they are the default config that
  is noted beside the data, and the latest version that is there.
  With `captions`, they are those of its text feature, or of the one that is
  named after captions.
  """

  def __init__(self, name: str, split: str, path: str, captions: bool = False):
    self._arguments = (name, split, path, captions)
    self._builder = self._prepared()
    label = dict(self._builder.info.features).get("label")
    self._text = self._text_feature() if captions else None
    self.classes = list(getattr(label, "names", None) or [])
    try:
      self._records = self._builder.as_data_source(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
      )
    except NotImplementedError as error:
      raise errors.UserError(
        f"TFDS dataset {name!r} is not prepared for random access; prepare it "
        'with file_format="array_record"'
      ) from error

  def _prepared(self):
    name, split, data_dir, _ = self._arguments
    directory = _directory(name, data_dir)
    _check_files(directory)
    try:
      builder = tfds.builder_from_directory(directory)
    except Exception as error:  # whatever tfds makes of damaged files
      raise errors.UserError(
        f"TFDS dataset {str(directory)!r} is damaged "
        f"({errors.first_line(error)}); prepare or copy it again"
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


def _directory(name: str, data_dir: str) -> epath.Path:
  """Where the version of a dataset lies that its name means.

  Raises UserError for what is no name, or if there is nothing of that name.
  """
  try:
    parsed, parts = naming.parse_builder_name_kwargs(name)
  except ValueError:
    parsed, parts = None, {}
  config, version = parts.pop("config", ""), parts.pop("version", "*.*.*")
  if not parsed or parsed.namespace or parts or set(config) == {"."}:
    raise errors.UserError(
      f"{name!r} is no name of a TFDS dataset; name it as in 'mnist', "
      "'mnist:3.0.1' or 'coco_captions/2014:1.1.0', and the directory that "
      "holds it in the path of the source"
    )
  place = epath.Path(data_dir or constants.DATA_DIR).expanduser()
  dataset = place / parsed.name
  # What was prepared before a dataset had configs lies where they do now.
  folders = [config] if config else [_default_config(dataset), ""]
  for folder in folders:
    versions = [
      tfds.core.Version(entry)
      for entry in _entries(dataset / folder)
      if tfds.core.Version.is_valid(entry)
    ]
    if versions := [x for x in versions if x.match(version)]:
      return dataset / folder / str(max(versions))
  there = ", ".join(_entries(dataset))
  raise errors.UserError(
    f"there is no TFDS dataset {name!r} in {str(place)!r}"
    + (f"; of {parsed.name} there are {there}" if there else "")
  )


def _entries(directory: epath.Path) -> list[str]:
  try:
    entries = [entry.name for entry in directory.iterdir()]
  except (FileNotFoundError, NotADirectoryError):
    return []
  return sorted(entry for entry in entries if not entry.startswith("."))


def _default_config(dataset: epath.Path) -> str:
  """As tfds notes it beside the configs that it prepares; "" if it has none."""
  file = dataset / ".config" / constants.METADATA_FILENAME
  noted = file.exists() and _read_json(file).get("default_config_name")
  return str(noted or "")


def _check_files(directory: epath.Path) -> None:
  """Raises UserError if reading a prepared dataset would run its code, or wait.

  The classes of features are named in features.json, or dataset_info.json, and
  tfds imports the modules that they are said to be in.
  """
  is_local = "://" not in os.fspath(directory)
  for entry in pathlib.Path(directory).iterdir() if is_local else ():
    if not entry.is_file() and not entry.is_dir():  # a pipe is waited for
      raise errors.UserError(f"{str(entry)!r} is no regular file; remove it")
  for name in (_FEATURES, _INFO):
    if not (directory / name).exists():
      raise errors.UserError(
        f"TFDS dataset {str(directory)!r} has no {name}; prepare it again, "
        "with a version of TFDS from 4.0 on"
      )
  described = _read_json(directory / _FEATURES)
  also = _read_json(directory / _INFO).get("features")
  for kind in (*_classes(described), *_classes(also)):
    if kind not in _FEATURE_CLASSES:
      raise errors.UserError(
        f"TFDS dataset {str(directory)!r} has features of the class {kind!r}, "
        "which is none of tensorflow_datasets; code that data name is not run"
      )


def _read_json(file: epath.Path) -> dict[str, Any]:
  try:
    values = json.loads(files._read(os.fspath(file)).decode())
    if not isinstance(values, dict):
      raise ValueError("no object of JSON")
    return values
  except (ValueError, RecursionError) as error:
    raise errors.UserError(
      f"{str(file)!r} is damaged ({errors.first_line(error)}); prepare or copy "
      "the dataset again"
    ) from error


def _classes(described: Any) -> Iterator[str]:
  """The names of classes in what features.json holds, at any depth.

  Also in JSON within strings, as which features without a protocol buffer of
  their own are described.
  """
  parts = [described]
  while parts:
    part = parts.pop()
    if isinstance(part, str):
      with contextlib.suppress(ValueError, RecursionError):
        parts.append(json.loads(part))
    elif isinstance(part, list):
      parts += part
    elif isinstance(part, dict):
      for key, value in part.items():
        if key in _CLASS_KEYS and isinstance(value, str):
          yield value
        else:
          parts.append(value)


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
