"""Where images come from: a folder, a TFDS dataset, or an installed package.

A source is a random-access sequence of encoded images with labels; nothing is
decoded here. All sources are picklable, since loader workers are processes.
"""

import errno
import glob
import hashlib
import importlib.util
import os
import pathlib
import stat
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import fsspec
import tensorflow_datasets as tfds
from etils import epath

SUFFIXES = (
  ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
)  # fmt: skip


_LARGEST_FILE = 2**31  # bytes


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


def limited(source: "Source", most: int) -> int:
  """How many of its records are used; `most` of 0: all."""
  return min(len(source), most or len(source))


@runtime_checkable
class Source(Protocol):
  """A random-access sequence of records; reading one may raise OSError."""

  classes: list[str]  # names, by label

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...

  def name(self, index: int) -> str: ...

  def key(self, index: int) -> str: ...

  def fingerprint(self) -> str: ...


class Files:
  """Files, local or remote, each of a class.

  Attributes:
    classes: their names, by label.
  """

  def __init__(
    self,
    paths: list[str],
    labels: list[int],
    keys: list[str],
    classes: list[str],
    sizes: list[int | None] | None = None,
  ):
    """Opens nothing.

    Args:
      paths: where the files are.
      labels: of their classes.
      keys: their names, the same wherever the files are.
      classes: names, by label.
      sizes: in bytes, as far as they are known.
    """
    self.classes = classes
    self._paths, self._labels = paths, labels
    self._keys, self._sizes = keys, sizes

  def __len__(self) -> int:
    return len(self._paths)

  def name(self, index: int) -> str:
    return self._paths[index]

  def key(self, index: int) -> str:
    """The name, without the directory that differs from machine to machine."""
    return self._keys[index]

  def fingerprint(self) -> str:
    """sha256 of names, labels and sizes of all files, which are not opened."""
    known = self._sizes or [None] * len(self)
    sizes = [
      _size(path) if size is None else size
      for path, size in zip(self._paths, known, strict=True)
    ]
    digest = hashlib.sha256()
    for entry in zip(self._keys, self._labels, sizes, strict=True):
      digest.update(f"{entry}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()

  def __getitem__(self, index: int) -> Record:
    path = self._paths[index]
    read = _read_remote if "://" in path else _read_local
    return Record(path, read(path), self._labels[index])


def _size(path: str) -> int:
  try:
    return os.path.getsize(path)
  except OSError:  # as unusable as an empty one
    return 0


def _read_local(path: str) -> bytes:
  found = os.stat(path)
  if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
    raise OSError(errno.ENXIO, "no regular file", path)
  if found.st_size > _LARGEST_FILE:
    raise OSError(errno.EFBIG, f"{found.st_size} bytes are no image", path)
  return pathlib.Path(path).read_bytes()


def _read_remote(path: str, attempts: int = 5) -> bytes:
  """Tries again, ever later: a passing fault must not change the data."""
  for attempt in range(attempts):
    try:
      return epath.Path(path).read_bytes()
    except Exception as error:  # the client's own kinds among them
      if attempt == attempts - 1 or isinstance(error, FileNotFoundError):
        text = " ".join(str(error).split()) or type(error).__name__
        raise OSError(errno.EIO, f"cannot be read: {text}", path) from error
      time.sleep(2**attempt)


def folder(path: str) -> Files:
  """All images below a directory, in sorted order, a class per sub-folder.

  Args:
    path: a local directory or a `gs://` address.

  Raises:
    ValueError: there is no such directory, or it holds no images.
  """
  return _tree(path, SUFFIXES, "image")


def latent_files(path: str) -> Files:
  """All `.npy` files below a directory, as `folder` finds images."""
  return _tree(path, (".npy",), "latent")


def _tree(path: str, suffixes: tuple[str, ...], what: str) -> Files:
  root = epath.Path(path).expanduser()
  if not path or not root.is_dir():
    raise ValueError(
      f"{what} folder {path!r} does not exist or is not a directory; name a "
      f"tree of {what}s (config.source.path; for a training run, "
      "config.data.source.path and config.evaluation.source.path)"
    )
  root = os.fspath(root)
  walk = _remote_files if "://" in path else _local_files
  sizes = walk(root)
  paths = sorted(
    name
    for name in sizes
    if name.lower().endswith(suffixes)
    and not os.path.basename(name).startswith(".")
  )
  if not paths:
    raise ValueError(
      f"{what} folder {path!r} holds no {what}s ({', '.join(suffixes)})"
    )
  keys = [
    os.path.relpath(name, root).encode("utf-8", "backslashreplace").decode()
    for name in paths
  ]
  parts = [key.split("/") for key in keys]
  of_file = [part[0] if len(part) > 1 else "" for part in parts]
  classes = sorted(set(of_file))
  index = {name: i for i, name in enumerate(classes)}
  labels = [index[name] for name in of_file]
  return Files(paths, labels, keys, classes, [sizes[name] for name in paths])


def pictures(path: str) -> Files:
  """One image file, all of a folder, or those that a shell pattern matches.

  Raises:
    ValueError: there is none.
  """
  root = epath.Path(path).expanduser()
  if path and root.is_dir():
    return folder(path)
  if path and root.is_file():
    return _unlabelled([os.fspath(root)])
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
  return _unlabelled(files)


def _unlabelled(paths: list[str], keys: list[str] | None = None) -> Files:
  return Files(paths, [0] * len(paths), keys or paths, [""])


def _local_files(root: str) -> dict[str, int | None]:
  """Paths, without their sizes, which would have to be asked for."""
  files, visited = {}, set()
  for directory, subdirectories, names in os.walk(root, followlinks=True):
    real = os.path.realpath(directory)
    if real in visited:  # a link back to a directory above it
      subdirectories.clear()
      continue
    visited.add(real)
    files |= {os.path.join(directory, name): None for name in names}
  return files


def _remote_files(root: str) -> dict[str, int | None]:
  """Paths and sizes, which come with the listing."""
  system, prefix = fsspec.core.url_to_fs(root)
  found = system.find(prefix, detail=True)
  return {
    system.unstrip_protocol(name): info["size"] for name, info in found.items()
  }


# Photographs inside packages of the Python package index: package, pattern of
# the files, and what stands in it. The two sets share no photograph and no
# scene. (Left out: drawings, renders, paintings, crops of others, near-blank
# pictures.) New ones go last: whoever takes the first ones keeps what they had.
_EMBEDDED = {
  "train": (
    (
      "interior_photos",  # MIT; photographs of Pexels
      "images/pexels-{}.jpg",
      "1317558 2416933 2560067 36030587 36179987 36236147 36358763 4389955 "
      "4400637 4543103 5386834 5604956 5853819 6373478 6707631 6830376 6956495 "
      "6963783 6963788 7247504 7303773 7303782 7303800 7303842 7303992 7303994 "
      "7303995 7688357 cup-of-couple-6962851 cup-of-couple-6963787 "
      "cup-of-couple-7303987 maksgelatin-4352247",
    ),
    (
      "skimage",  # public domain, CC0, or no known restrictions
      "data/{}",
      "brick.png grass.png gravel.png hubble_deep_field.jpg ihc.png retina.jpg",
    ),
    (
      "theme_soft_design",  # MIT
      "static/img/{}.jpg",
      "anastasia annie-spratt blog7-1 blog7-2 blog7-3 brooke card-2 card-3 "
      "charles ivana ivancik jordan kal-visuals marie meeting nastuh team-1 "
      "team-2 team-3 team-4 toa-heftiba",
    ),
    (
      "theme_material_kit",  # MIT
      "static/assets/img/{}.jpg",
      "bg bg0 bg10 bg2 bg3 bg5 bg9 bruce-mars city-profile examples/blog-9-4 "
      "examples/blog2 examples/testimonial-6-2 examples/testimonial-6-3 "
      "ivana-square ivana-squares team-1 team-2 team-3 team-4 team-5",
    ),
    # Public domain.
    ("matplotlib", "mpl-data/sample_data/{}.jpg", "grace_hopper"),
    ("skimage", "data/{}.png", "coins"),  # no known restrictions
  ),
  "validation": (
    ("skimage", "data/{}.png", "astronaut chelsea coffee"),
    ("sklearn", "datasets/images/{}.jpg", "china flower"),
    ("skimage", "data/{}", "motorcycle_left.png rocket.jpg camera.png"),
  ),
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
  files = [
    (package, pattern.format(name))
    for package, pattern, names in _EMBEDDED[split]
    for name in names.split()
  ]
  paths = []
  for package, file in files:
    spec = importlib.util.find_spec(package)
    directory = pathlib.Path(spec.origin).parent if spec else None
    if directory is None or not (directory / file).is_file():
      raise ValueError(
        f"the embedded photograph {package}/{file} is not installed; run "
        "`pip install -r requirements-quickstart.txt`"
      )
    paths.append(str(directory / file))
  keys = [f"{package}/{file}" for package, file in files]
  return _unlabelled(paths, keys)


class Subset:
  """Some images of another source; its classes and labels stay.

  Attributes:
    classes: the other source's.
  """

  def __init__(self, source: Source, indices: Sequence[int]):
    self.classes = source.classes
    self._source, self._indices = source, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Record:
    return self._source[self._indices[index]]

  def name(self, index: int) -> str:
    return self._source.name(self._indices[index])

  def key(self, index: int) -> str:
    return self._source.key(self._indices[index])

  def fingerprint(self) -> str:
    """sha256 of the other one's, and of what is taken from it."""
    text = f"{list(self._indices)} of {self._source.fingerprint()}"
    return hashlib.sha256(text.encode()).hexdigest()


def split(source: Source, held_out: float) -> tuple[Subset, Subset]:
  """A source in two: what is trained on, and what is held out.

  An image is held out by the hash of its key alone: in every run the same,
  whatever is added to the source. Of few images, where that would leave none on
  a side, the one with the lowest or highest hash is there. The
  held-out ones are in the order of their hashes, so that the first of them are
  a fair choice.

  Args:
    source: of two images or more.
    held_out: part of the images, between 0 and 1.

  Raises:
    ValueError: the source or the part is too small, or the part too large.
  """
  if not 0 < held_out < 1:
    raise ValueError(f"the held-out part {held_out} is not between 0 and 1")
  if len(source) < 2:
    raise ValueError(
      f"{source.name(0)} is the only image, and none is left to be held out; "
      "add more of them, or name other ones to evaluate on"
    )
  hashes = [_hash(source.key(i)) for i in range(len(source))]
  order = sorted(range(len(source)), key=hashes.__getitem__)
  count = sum(value < held_out for value in hashes)
  count = min(max(count, 1), len(source) - 1)
  return Subset(source, sorted(order[count:])), Subset(source, order[:count])


def _hash(key: str) -> float:
  """From 0 to 1, evenly."""
  digest = hashlib.sha256(key.encode("utf-8", "backslashreplace")).digest()
  return int.from_bytes(digest[:8], "big") / 2**64


class ClassPerImage(Subset):
  """The first images of another source, each a class of its own.

  Attributes:
    classes: the images' keys.
  """

  def __init__(self, source: Source, count: int):
    super().__init__(source, range(count))
    self.classes = [source.key(i) for i in range(count)]

  def __getitem__(self, index: int) -> Record:
    return super().__getitem__(index)._replace(label=index)

  def fingerprint(self) -> str:
    """sha256 of the other one's, and of what is different here."""
    text = f"{len(self)} classes of {self._source.fingerprint()}"
    return hashlib.sha256(text.encode()).hexdigest()


class TensorFlowDataset:
  """Images of a prepared TFDS dataset in array_record format.

  Reads without TensorFlow, local or `gs://`, without decoding.
  """

  def __init__(self, name: str, split: str, data_dir: str):
    self._arguments = (name, split, data_dir)
    self._builder = self._prepared()
    label = dict(self._builder.info.features).get("label")
    self.classes = list(getattr(label, "names", None) or [])
    self._records = self._builder.as_data_source(
      split=split, decoders={"image": tfds.decode.SkipDecoding()}
    )

  def _prepared(self):
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
    return builder

  def __getstate__(self):
    return self._arguments

  def __setstate__(self, arguments):
    self.__init__(*arguments)

  def __len__(self) -> int:
    return len(self._records)

  def name(self, index: int) -> str:
    name, split, _ = self._arguments
    return f"{name}:{split}[{index}]"

  def key(self, index: int) -> str:
    """The split and the position in it."""
    return f"{self._arguments[1]}[{index}]"

  def fingerprint(self) -> str:
    """sha256 of the dataset's name and version, and its split's shards."""
    info, (_, split, _) = self._builder.info, self._arguments
    shards = info.splits[split]
    entry = (info.full_name, split, len(self), shards.num_examples)
    return hashlib.sha256(repr(entry).encode()).hexdigest()

  def __getitem__(self, index: int) -> Record:
    example = self._records[index]
    label = int(example["label"]) if "label" in example else 0
    return Record(self.name(index), example["image"], label)
