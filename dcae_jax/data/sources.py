"""Where images come from: a folder, a TFDS dataset, or an installed package.

A source is a random-access sequence of encoded images with labels; nothing is
decoded here. All sources are picklable, since loader workers are processes.
"""

import glob
import importlib.util
import os
import pathlib
import time
from typing import NamedTuple, Protocol, runtime_checkable

import tensorflow_datasets as tfds
from etils import epath

SUFFIXES = (
  ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
)  # fmt: skip


class Record(NamedTuple):
  """One encoded image.

  Attributes:
    name: where it is, for messages.
    encoded: the file's bytes.
    label: index of its class.
  """

  name: str
  encoded: bytes
  label: int


@runtime_checkable
class Source(Protocol):
  """A random-access sequence of records; reading one may raise OSError."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...

  def name(self, index: int) -> str: ...


class Files:
  """Image files, local or remote, one class per entry of `labels`."""

  def __init__(self, paths: list[str], labels: list[int]):
    self._paths, self._labels = paths, labels

  def __len__(self) -> int:
    return len(self._paths)

  def name(self, index: int) -> str:
    return self._paths[index]

  def __getitem__(self, index: int) -> Record:
    path = self._paths[index]
    if "://" in path:
      encoded = _read_remote(path)
    else:
      encoded = pathlib.Path(path).read_bytes()
    return Record(path, encoded, self._labels[index])


def _read_remote(path: str, attempts: int = 5) -> bytes:
  """Tries again, ever later: a passing fault must not change the data."""
  for attempt in range(attempts - 1):
    try:
      return epath.Path(path).read_bytes()
    except FileNotFoundError:
      raise
    except OSError:
      time.sleep(2**attempt)
  return epath.Path(path).read_bytes()


def folder(path: str) -> Files:
  """All images below a directory, in sorted order, a class per sub-folder.

  Args:
    path: a local directory or a `gs://` address.

  Raises:
    ValueError: there is no such directory, or it holds no images.
  """
  root = epath.Path(path).expanduser()
  if not path or not root.is_dir():
    raise ValueError(
      f"image folder {path!r} does not exist or is not a directory; name a "
      "tree of images (for a run, config.data.source.path and "
      "config.evaluation.source.path)"
    )
  walk = _remote_files if "://" in path else _local_files
  files = sorted(
    name
    for name in walk(os.fspath(root))
    if name.lower().endswith(SUFFIXES)
    and not os.path.basename(name).startswith(".")
  )
  if not files:
    raise ValueError(
      f"image folder {path!r} holds no images ({', '.join(SUFFIXES)})"
    )
  parts = [os.path.relpath(file, os.fspath(root)).split("/") for file in files]
  classes = [part[0] if len(part) > 1 else "" for part in parts]
  index = {name: i for i, name in enumerate(sorted(set(classes)))}
  return Files(files, [index[name] for name in classes])


def pictures(path: str) -> Files:
  """One image file, all of a folder, or those that a shell pattern matches.

  Raises:
    ValueError: there is none.
  """
  root = epath.Path(path).expanduser()
  if path and root.is_dir():
    return folder(path)
  if path and root.is_file():
    return Files([os.fspath(root)], [0])
  files = sorted(
    file
    for file in glob.glob(os.path.expanduser(path), recursive=True)
    if file.lower().endswith(SUFFIXES)
  )
  if not files:
    raise ValueError(
      f"{path!r} is no image file, folder of images, or pattern of image files "
      f"({', '.join(SUFFIXES)})"
    )
  return Files(files, [0] * len(files))


def _local_files(root: str) -> list[str]:
  files, visited = [], set()
  for directory, subdirectories, names in os.walk(root, followlinks=True):
    real = os.path.realpath(directory)
    if real in visited:  # a link back to a directory above it
      subdirectories.clear()
      continue
    visited.add(real)
    files.extend(os.path.join(directory, name) for name in names)
  return files


def _remote_files(root: str) -> list[str]:
  files, directories = [], [epath.Path(root)]
  while directories:
    for entry in directories.pop().iterdir():
      if entry.is_dir():
        directories.append(entry)
      else:
        files.append(os.fspath(entry))
  return files


# Photographs inside packages of the Python package index. The two sets share no
# photograph and no scene. (Left out: drawings, renders, near-blank pictures.)
_INTERIORS = [
  "1317558",
  "2416933",
  "2560067",
  "36030587",
  "36179987",
  "36236147",
  "36358763",
  "4389955",
  "4400637",
  "4543103",
  "5386834",
  "5604956",
  "5853819",
  "6373478",
  "6707631",
  "6830376",
  "6956495",
  "6963783",
  "6963788",
  "7247504",
  "7303773",
  "7303782",
  "7303800",
  "7303842",
  "7303992",
  "7303994",
  "7303995",
  "7688357",
  "cup-of-couple-6962851",
  "cup-of-couple-6963787",
  "cup-of-couple-7303987",
  "maksgelatin-4352247",
]
_EMBEDDED = {
  "train": [
    *(("interior_photos", f"images/pexels-{n}.jpg") for n in _INTERIORS),
    ("skimage", "data/brick.png"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/gravel.png"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/ihc.png"),
    ("skimage", "data/retina.jpg"),
  ],
  "validation": [
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/camera.png"),
  ],
}


def embedded(split: str) -> Files:
  """Photographs inside installed packages: nothing is downloaded.

  Args:
    split: "train" or "validation"; different photographs.

  Raises:
    ValueError: unknown split, or a package that is not installed.
  """
  if split not in _EMBEDDED:
    raise ValueError(
      f"embedded photographs have the splits {', '.join(_EMBEDDED)}, "
      f"not {split!r}"
    )
  paths = []
  for package, file in _EMBEDDED[split]:
    spec = importlib.util.find_spec(package)
    directory = pathlib.Path(spec.origin).parent if spec else None
    if directory is None or not (directory / file).is_file():
      raise ValueError(
        f"the embedded photograph {package}/{file} is not installed; run "
        "`pip install -r requirements-quickstart.txt`"
      )
    paths.append(str(directory / file))
  return Files(paths, [0] * len(paths))


class TensorFlowDataset:
  """Images of a prepared TFDS dataset in array_record format.

  Reads without TensorFlow, local or `gs://`, without decoding.
  """

  def __init__(self, name: str, split: str, data_dir: str):
    self._arguments = (name, split, data_dir)
    self._records = self._open()

  def _open(self):
    name, split, data_dir = self._arguments
    try:
      builder = tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
      place = data_dir or "the default place"
      raise ValueError(
        f"there is no TFDS dataset {name!r} in {place}"
      ) from error
    if "image" not in builder.info.features:
      raise ValueError(
        f"TFDS dataset {name!r} has no feature `image`; its features are "
        f"{', '.join(builder.info.features)}"
      )
    if split not in builder.info.splits:
      known = ", ".join(builder.info.splits) or "none: it is not prepared"
      raise ValueError(
        f"TFDS dataset {name!r} has no split {split!r}; there are {known}"
      )
    return builder.as_data_source(
      split=split, decoders={"image": tfds.decode.SkipDecoding()}
    )

  def __getstate__(self):
    return self._arguments

  def __setstate__(self, arguments):
    self.__init__(*arguments)

  def __len__(self) -> int:
    return len(self._records)

  def name(self, index: int) -> str:
    name, split, _ = self._arguments
    return f"{name}:{split}[{index}]"

  def __getitem__(self, index: int) -> Record:
    example = self._records[index]
    label = int(example["label"]) if "label" in example else 0
    return Record(self.name(index), example["image"], label)
