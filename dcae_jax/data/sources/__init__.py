"""Where images come from: folders, tars, TFDS datasets, installed packages.

A kind of source is one file, and one line in `KINDS`.
"""

from collections.abc import Callable

from dcae_jax.data.sources.embedded_photographs import embedded
from dcae_jax.data.sources.files import Files, folder, latent_files, pictures
from dcae_jax.data.sources.protocol import Record, Source, limited
from dcae_jax.data.sources.records import Records
from dcae_jax.data.sources.subsets import ClassPerImage, split
from dcae_jax.data.sources.tar import Tars
from dcae_jax.data.sources.tensorflow_dataset import TensorFlowDataset

# By `kind`: what opens it. Its parameters are named after the keys of
# `source()` in configs/base.py that it is called with.
KINDS: dict[str, Callable[..., Source]] = {
  "folder": folder,
  "tfds": TensorFlowDataset,
  "embedded": embedded,
  "records": Records,
  "tar": Tars,
}

__all__ = [
  "KINDS", "ClassPerImage", "Files", "Record", "Records", "Source", "Tars",
  "TensorFlowDataset", "embedded", "folder", "latent_files", "limited",
  "pictures", "split",
]  # fmt: skip
