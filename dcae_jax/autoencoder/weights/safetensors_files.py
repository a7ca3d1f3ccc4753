"""Safetensors: finding and reading them in local folders and files and in the
hub's cache, and writing the folders that other libraries load.

Pickled checkpoints run code when they are read, so that they are refused, with
the command that converts them.
"""

import contextlib
import ctypes
import fcntl
import glob
import json
import os
import pathlib
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import huggingface_hub
import numpy as np
import safetensors
import safetensors.numpy

from dcae_jax import errors
from dcae_jax.runs import regular_files, work_directory

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar")
_RECIPE = (
  'convert it once, where torch is installed: python -c "import torch; from '
  "safetensors.torch import save_file as s; d = torch.load('{name}', "
  "map_location='cpu', weights_only=True); s({{k: v.contiguous() for k, v in "
  "d.get('state_dict', d).items()}}, 'model.safetensors')\""
)
# A repository, and maybe a file in it; a lone file in a folder is a local one.
_HUB_FILE = re.compile(
  r"([\w-][\w.-]*/(?![^/]*\.(?:npz|safetensors|pth|ckpt)$)[\w.-]+)(?:/(.+))?"
)
_WANTED = ("*.safetensors", "*.json", "*.model")  # of a repository of the hub
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32")
_NEW, _OLD = ".saving", ".replaced"  # folders beside one that is saved
_CURRENT_DIRECTORY, _EXCHANGE = -100, 2  # of Linux's renameat2


def find(
  source: str, parts: Sequence[str] = ()
) -> tuple[list[pathlib.Path], dict[str, Any]]:
  """The safetensors files of a model, and its `config.json`.

  `source` is a folder, a safetensors file, or a hub id; there may be several
  shards, and the config is {} if there is none. In a pipeline of diffusers, the
  model is in the first of the folders `parts`, and the others are downloaded
  with it. Raises UserError if there is no such thing, or no safetensors in it.
  """
  path = _settled(pathlib.Path(os.path.expanduser(source)))
  if not source or ":/" in source:
    raise errors.UserError(
      f"{source!r} is no local path and no hub id; copy released weights to a "
      "local folder first (of gs://, only runs are read)"
    )
  if path.exists() and not path.is_dir():
    _refuse_pickle(path)
    files, folder = [path], path.parent
  else:
    folder = path if path.is_dir() else _download(source, parts)
    from_hub = folder != path
    if parts and (folder / parts[0]).is_dir():
      folder /= parts[0]
    # Some repositories have the same weights in another layout beside it.
    usual = folder / "diffusion_pytorch_model.safetensors"
    files = [usual] if from_hub and usual.is_file() else _files(folder, source)
  config = folder / "config.json"
  if not config.exists():
    return files, {}
  regular_files.checked(config)
  try:
    values = json.loads(config.read_bytes())
  except (ValueError, RecursionError) as error:
    raise errors.UserError(f"{config} is damaged ({error})") from error
  if not isinstance(values, dict):
    raise errors.UserError(f"{config} is not the config of a model")
  return files, values


def find_file(source: str) -> pathlib.Path:
  """A local file, or one of the hub, which is downloaded once.

  In the hub it is `owner/name/FILE`, or `owner/name` for its only safetensors
  file. Raises UserError if the hub does not give it.
  """
  path = pathlib.Path(os.path.expanduser(source))
  if path.exists() or not (match := _HUB_FILE.fullmatch(source)):
    return path
  repository, file = match.groups()
  if file is None:
    files = find(repository)[0]
    if len(files) > 1:
      raise errors.UserError(
        f"{source!r} holds several files; name one of them"
      )
    return files[0]
  return _of_hub(source, repository, [file, "*.json"]) / file


def _refuse_pickle(path: pathlib.Path) -> None:
  if path.suffix.lower() in _PICKLES:
    raise errors.UserError(
      f"{path} is a pickle, which may run code of others; "
      f"{_RECIPE.format(name=path)}"
    )
  if path.suffix.lower() != ".safetensors":
    raise errors.UserError(f"{path} is not a safetensors file")


def _download(source: str, parts: Sequence[str]) -> pathlib.Path:
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
    raise errors.UserError(
      f"{source!r} is not the work directory of a run, nor a folder or file of "
      "weights, nor a hub id such as mit-han-lab/dc-ae-f64c128-in-1.0-diffusers"
    )
  folder = _of_hub(source, source, _WANTED, "*/*")
  if parts:
    wanted = [f"{part}/{x}" for part in parts for x in _WANTED]
    _of_hub(source, source, wanted, "*.fp16*")  # the same weights again
  return folder


def _of_hub(
  source: str, repository: str, wanted: Sequence[str], but: str = ""
) -> pathlib.Path:
  """Where the files of some patterns are, but those of another one.

  Raises UserError, which names the source, if the hub does not give them.
  """
  try:
    folder = huggingface_hub.snapshot_download(
      repository, allow_patterns=list(wanted), ignore_patterns=but or None
    )
  except Exception as error:  # of the hub, of the network, of the disk
    reason = str(error).strip().split("\n")[0]
    raise errors.UserError(
      f"{source!r} is not a local folder or file, and the hub did not give it: "
      f"{reason or type(error).__name__}"
    ) from error
  return pathlib.Path(folder)


def _files(folder: pathlib.Path, source: str) -> list[pathlib.Path]:
  indices = sorted(folder.glob("*.safetensors.index.json"))
  if len(indices) == 1:
    regular_files.checked(indices[0])
    try:
      shards = json.loads(indices[0].read_bytes())["weight_map"].values()
      names = sorted(set(shards))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
      raise errors.UserError(
        f'{indices[0]} has no "weight_map" from tensors to files; download it '
        "again"
      ) from None
    for name in names:  # an index from elsewhere must not point out of here
      if not re.fullmatch(r"[^/\\]+\.safetensors", str(name)):
        raise errors.UserError(
          f"{indices[0]} names {name!r}, which is not a safetensors file of "
          "that folder"
        )
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
      raise errors.UserError(
        f"{source!r} lacks the shards {', '.join(missing)}"
      )
    return files
  files = sorted(folder.glob("*.safetensors"))
  if len(files) == 1:
    return files
  if files:
    names = ", ".join(file.name for file in files)
    raise errors.UserError(
      f"{source!r} holds several models: {names}; name one file"
    )
  for file in sorted(folder.iterdir()):
    if file.suffix.lower() in _PICKLES:
      _refuse_pickle(file)
  advice = ""
  if (folder / "vae").is_dir():
    advice = f"; the autoencoder of a pipeline is in {folder / 'vae'}"
  raise errors.UserError(
    f"{source!r} is not a model: it has no safetensors file{advice}"
  )


def _open(file: pathlib.Path):
  # Not through a memory map, whose pages would count as this process's memory.
  regular_files.checked(file)
  try:
    return safetensors.safe_open(file, framework="numpy", backend="pread")
  except (safetensors.SafetensorError, OSError) as error:
    raise errors.UserError(
      f"{file} is not a whole safetensors file ({error}); download or copy it "
      "again"
    ) from error


def header(file: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Names and shapes of the tensors in a file.

  Raises UserError for a damaged file, or numbers of an unusual kind.
  """
  shapes = {}
  with _open(file) as opened:
    names = opened.keys()
    for name in names:
      tensor = opened.get_slice(name)
      if tensor.get_dtype() not in _DTYPES:
        raise errors.UserError(
          f"{name} in {file} holds {tensor.get_dtype()}; only "
          f"{', '.join(_DTYPES)} can be read"
        )
      shapes[name] = tuple(tensor.get_shape())
  return shapes


def headers(
  files: list[pathlib.Path],
) -> tuple[dict[str, tuple[int, ...]], dict[str, pathlib.Path]]:
  """Shapes of all tensors in files, and the file of each, by their names.

  Raises UserError for a name that is in two files, or what `header` refuses.
  """
  shapes, paths = {}, {}
  for file in files:
    for name, shape in header(file).items():
      if name in paths:
        raise errors.UserError(f"{name} is in both {paths[name]} and {file}")
      shapes[name], paths[name] = shape, file
  return shapes, paths


def read(file: pathlib.Path, name: str) -> np.ndarray:
  """One tensor, whole, as it is stored."""
  try:
    with _open(file) as opened:
      return opened.get_tensor(name)
  except (safetensors.SafetensorError, OSError) as error:
    raise errors.UserError(
      f"{name} in {file} cannot be read ({error})"
    ) from error


def save(
  folder: str | os.PathLike,
  file: str,
  tensors: dict[str, np.ndarray],
  *,
  config: dict[str, Any],
  model_card: str,
  arrays: dict[str, np.ndarray] | None = None,
) -> None:
  """Writes a folder that diffusers, or the original code, loads as it is.

  It takes the place of one that was saved before in one step: whenever the
  process is killed, the old or the new one is there, whole.

  Args:
    folder: a new or empty one, or one that holds these files alone.
    file: the one that the library looks for.
    tensors: what is in it.
    config: of `config.json`.
    model_card: the text of README.md.
    arrays: what stands beside them, by the names of `.npy` files.

  Raises:
    UserError: the folder holds something else, is or is in the work directory
      of a run, or cannot be written.
  """
  if not os.fspath(folder):
    raise errors.UserError("the folder to save to is empty; name one")
  # A link goes on leading to what is saved.
  folder = pathlib.Path(os.path.realpath(os.path.expanduser(folder)))
  arrays = arrays or {}
  try:
    _remove_leftovers(folder)
    _check_folder(folder, file, ("config.json", "README.md", *arrays))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _new_beside(folder) as new:
      (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
      (new / "README.md").write_text(model_card)
      for name, x in arrays.items():
        np.save(new / name, x)
      safetensors.numpy.save_file(
        tensors, new / file, metadata={"format": "pt"}
      )
      # It is readable by its owner alone, whatever the umask says.
      shutil.copymode(new / "config.json", new / file)
      _replace(folder, new)
  except (safetensors.SafetensorError, OSError) as error:
    raise errors.UserError(f"writing {folder} failed: {error}") from error


def _check_folder(
  folder: pathlib.Path, file: str, beside: Sequence[str]
) -> None:
  """Raises UserError if writing would destroy or confuse something."""
  problem = ""
  held = sorted(os.listdir(folder)) if folder.is_dir() else []
  others = [name for name in held if name not in (file, *beside)]
  runs = [x for x in (folder, *folder.parents) if work_directory.is_run(str(x))]
  if ":/" in str(folder):
    problem = "is not a local folder"
  elif folder.exists() and not folder.is_dir():
    problem = "is not a directory"
  elif runs and runs[0] == folder:
    problem = "is the work directory of a run"
  elif runs:
    problem = f"is inside {runs[0]}, the work directory of a run"
  elif others:
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    problem = f"already holds {', '.join(others[:3])}{more}"
  elif held and file not in held:
    problem = f"holds the {' and '.join(held)} of something else"
  elif os.path.ismount(folder) or folder == pathlib.Path.cwd():
    problem = "cannot be replaced, being mounted or the current directory"
  elif held and not os.access(folder, os.W_OK):
    problem = "is write-protected"
  if problem:
    raise errors.UserError(f"{folder} {problem}; choose another folder")


@contextlib.contextmanager
def _new_beside(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new directory, locked; what is there in the end is removed."""
  new = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{_NEW}")
  new.mkdir()
  handle = os.open(new, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # not every file system has locks
      fcntl.flock(handle, fcntl.LOCK_EX)
    yield new
  finally:
    os.close(handle)
    shutil.rmtree(new, ignore_errors=True)


def _replace(folder: pathlib.Path, new: pathlib.Path) -> None:
  """Swaps the two, or moves the new one to where nothing is."""
  if not folder.exists():
    os.rename(new, folder)
    return
  shutil.copymode(folder, new)
  libc = ctypes.CDLL(None) if sys.platform == "linux" else None
  if hasattr(libc, "renameat2"):
    paths = os.fsencode(new), os.fsencode(folder)
    if not libc.renameat2(
      _CURRENT_DIRECTORY, paths[0], _CURRENT_DIRECTORY, paths[1], _EXCHANGE
    ):
      return
  # Where the system cannot swap: `_settled` knows what a kill leaves.
  old = new.with_suffix(_OLD)
  os.rename(folder, old)
  os.rename(new, folder)
  shutil.rmtree(old, ignore_errors=True)


def _settled(folder: pathlib.Path) -> pathlib.Path:
  """The folder, or what it was if a kill hit a swap in two steps."""
  if folder.exists():
    return folder
  real = pathlib.Path(os.path.realpath(folder))
  return next(_leftovers(real, _OLD), folder)


def _leftovers(folder: pathlib.Path, suffix: str) -> Iterator[pathlib.Path]:
  token = "[0-9a-f]" * 8
  return folder.parent.glob(f".{glob.escape(folder.name)}.{token}{suffix}")


def _remove_leftovers(folder: pathlib.Path) -> None:
  """Of saves that were killed; others, which go on, have theirs locked."""
  old = _settled(folder)
  if old != folder:
    os.rename(old, folder)
  for suffix in (_NEW, _OLD):
    for path in _leftovers(folder, suffix):
      with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
          fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
          shutil.rmtree(path)
        finally:
          os.close(handle)
