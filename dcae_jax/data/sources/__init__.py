"""Where images come from: folders, tars, TFDS datasets, installed packages.

A kind of source is one file, and one line in `KINDS`.
"""

from collections.abc import Callable

from dcae_jax.data.sources.embedded_photographs import embedded
from dcae_jax.data.sources.files import (
  Files,
  folder,
  latent_files,
  listed,
  pictures,
)
from dcae_jax.data.sources.parquet import Parquet
from dcae_jax.data.sources.protocol import (
  Groups,
  Record,
  Source,
  groups,
  limited,
  sizes,
)
from dcae_jax.data.sources.records import Records
from dcae_jax.data.sources.subsets import ClassPerImage, Subset, at_least, split
from dcae_jax.data.sources.tar import Tars
from dcae_jax.runs import installed


def tfds(name: str, split: str, path: str, captions: bool = False) -> Source:
  """A `TensorFlowDataset`; UserError without the packages of the extra."""
  installed.require("tensorflow_datasets", "tfds", "a source of kind 'tfds'")
  from dcae_jax.data.sources import tensorflow_dataset

  return tensorflow_dataset.TensorFlowDataset(name, split, path, captions)


# By `kind`: what opens it. Its parameters are named after the keys of
# `source()` in configs/base.py that it is called with; others are `options`.
KINDS: dict[str, Callable[..., Source]] = {
  "folder": folder,
  "tfds": tfds,
  "embedded": embedded,
  "records": Records,
  "tar": Tars,
  "parquet": Parquet,
}

__all__ = [
  "KINDS", "ClassPerImage", "Files", "Groups", "Parquet", "Record", "Records",
  "Source", "Subset", "Tars", "at_least", "embedded", "folder", "groups",
  "latent_files", "limited", "listed", "pictures", "sizes", "split", "tfds",
]  # fmt: skip
