"""DCAE against diffusers' AutoencoderDC: the same weights, the same numbers.

Reduced widths and depths, one model per released family. Their settings are
written out here, ours are those of the named variant. Weights, norm parameters
and running statistics are all random: fresh initial values would hide errors.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dcae_jax.models import dcae

WIDTHS = (16, 32, 64, 64, 128)  # one equal-width and one doubling resampling
LATENT_CHANNELS = 32
RES, EFFICIENTVIT = "ResBlock", "EfficientViTBlock"
MIXED = (RES, RES, RES, EFFICIENTVIT, EFFICIENTVIT)
SINGLE_SCALE = ((),) * 5
MULTI_SCALE = ((), (), (), (5,), (5,))


class Family(NamedTuple):
  """A released family, by our name and by the settings of AutoencoderDC."""

  variant: str
  encoder_depths: tuple[int, ...]
  decoder_depths: tuple[int, ...]
  settings: dict[str, Any]


FAMILIES = {
  "in": Family(
    "f32c32",
    (0, 1, 2, 1, 1),
    (0, 2, 1, 1, 1),
    {
      "encoder_block_types": MIXED,
      "decoder_block_types": MIXED,
      "encoder_qkv_multiscales": SINGLE_SCALE,
      "decoder_qkv_multiscales": SINGLE_SCALE,
      "downsample_block_type": "pixel_unshuffle",
      "upsample_block_type": "pixel_shuffle",
      "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 2,
      "decoder_act_fns": ("relu",) * 3 + ("silu",) * 2,
    },
  ),
  "sana": Family(
    "f32c32-sana",
    (1, 1, 1, 1, 2),
    (1, 1, 1, 2, 1),
    {
      "encoder_block_types": MIXED,
      "decoder_block_types": MIXED,
      "encoder_qkv_multiscales": MULTI_SCALE,
      "decoder_qkv_multiscales": MULTI_SCALE,
      "downsample_block_type": "Conv",
      "upsample_block_type": "interpolate",
      "decoder_norm_types": "rms_norm",
      "decoder_act_fns": "silu",
    },
  ),
  "lite": Family(
    "f32c32-lite",
    (1, 1, 1, 1, 1),
    (0, 1, 1, 2, 1),
    {
      "encoder_block_types": MIXED,
      "decoder_block_types": RES,
      "encoder_qkv_multiscales": MULTI_SCALE,
      "decoder_qkv_multiscales": SINGLE_SCALE,
      "downsample_block_type": "Conv",
      "upsample_block_type": "pixel_shuffle",
      "decoder_norm_types": "rms_norm",
      "decoder_act_fns": "silu",
      "decoder_conv_act_fn": "silu",
    },
  ),
  "1.5": Family(
    "f32c128-1.5",
    (0, 1, 1, 1, 1),
    (0, 1, 1, 1, 1),
    {
      "encoder_block_types": RES,
      "decoder_block_types": RES,
      "encoder_qkv_multiscales": SINGLE_SCALE,
      "decoder_qkv_multiscales": SINGLE_SCALE,
      "downsample_block_type": "pixel_unshuffle",
      "upsample_block_type": "pixel_shuffle",
      "decoder_norm_types": "rms_norm",
      "decoder_act_fns": "silu",
      "encoder_out_shortcut": False,
      "decoder_in_shortcut": False,
      "decoder_conv_act_fn": "silu",
    },
  ),
}

# Modules inside a block, theirs to ours.
BLOCKS = {
  "res": {"conv1": "conv1", "conv2": "conv2", "norm": "norm"},
  "efficientvit": {
    "attn.to_qkv": "context/qkv",
    "attn.to_qkv_multiscale.0.proj_in": "context/aggregate_5",
    "attn.to_qkv_multiscale.0.proj_out": "context/aggregate_5_mix",
    "attn.to_out": "context/project",
    "attn.norm_out": "context/norm",
    "conv_out.conv_inverted": "local/inverted",
    "conv_out.conv_depth": "local/depthwise",
    "conv_out.conv_point": "local/point",
    "conv_out.norm": "local/norm",
  },
}


def _modules(model: dcae.DCAE) -> Iterator[tuple[str, str]]:
  """Their module, our module."""
  encoder, decoder = model.encoder.stages, model.decoder.stages
  yield "encoder.conv_in", "encoder/project_in"
  yield "encoder.conv_in.conv", "encoder/project_in/conv"
  yield "encoder.conv_out", "encoder/project_out/conv"
  yield "decoder.conv_in", "decoder/project_in/conv"
  yield "decoder.norm_out", "decoder/project_out/norm"
  yield "decoder.conv_out", "decoder/project_out/conv"
  yield "decoder.conv_out.conv", "decoder/project_out/conv"
  for i, stage in enumerate(encoder):
    theirs, ours = f"encoder.down_blocks.{i}", f"encoder/stage_{i}"
    yield f"{theirs}.{stage.depth}.conv", f"{ours}/downsample/conv"
    for j in range(stage.depth):
      for a, b in BLOCKS[stage.block].items():
        yield f"{theirs}.{j}.{a}", f"{ours}/block_{j}/{b}"
  for i, stage in enumerate(decoder):
    theirs, ours = f"decoder.up_blocks.{i}", f"decoder/stage_{i}"
    yield f"{theirs}.0.conv", f"{ours}/upsample/conv"
    first = 0 if i + 1 == len(decoder) else 1
    for j in range(stage.depth):
      for a, b in BLOCKS[stage.block].items():
        yield f"{theirs}.{first + j}.{a}", f"{ours}/block_{j}/{b}"


def _leaf(name: str, tensor: torch.Tensor) -> tuple[str, str, np.ndarray]:
  """Collection, name and value of our variable."""
  value = tensor.numpy()
  if name == "weight" and value.ndim > 1:
    value = value.reshape(*value.shape[:2], *(value.shape[2:] or (1, 1)))
    return "params", "kernel", value.transpose(2, 3, 1, 0)
  return {
    "weight": ("params", "scale", value),
    "bias": ("params", "bias", value),
    "running_mean": ("batch_stats", "mean", value),
    "running_var": ("batch_stats", "var", value),
  }[name]


def _variables(theirs: torch.nn.Module, ours: dcae.DCAE) -> dict[str, Any]:
  """Our variables with their values; all of theirs, and all of ours."""
  state = {
    name: tensor.detach().clone()
    for name, tensor in theirs.state_dict().items()
    if not name.endswith("num_batches_tracked")
  }
  for name in [name for name in state if name.endswith("to_q.weight")]:
    parts = [state.pop(name.replace("to_q", f"to_{x}")) for x in "qkv"]
    state[name.replace("to_q", "to_qkv")] = torch.cat(parts)
  variables = {}
  modules = dict(_modules(ours))
  for name, tensor in state.items():
    module, _, leaf = name.rpartition(".")
    collection, leaf, value = _leaf(leaf, tensor)
    tree = variables.setdefault(collection, {})
    for key in modules[module].split("/"):
      tree = tree.setdefault(key, {})
    tree[leaf] = jnp.asarray(value)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
  expected = jax.eval_shape(ours.init, jax.random.key(0), images)
  shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
  assert shapes(variables) == shapes(expected)
  return variables


def _randomise(model: torch.nn.Module) -> None:
  """Random values for which each bias, scale and epsilon tells.

  What enters a norm is small (about 0.02), so that an epsilon of 1e-5 changes
  the result by about one percent.
  """
  generator = torch.Generator().manual_seed(0)

  def uniform(shape, low, high):
    return low + (high - low) * torch.rand(shape, generator=generator)

  for name, tensor in model.state_dict().items():
    module, _, leaf = name.rpartition(".")
    if leaf == "num_batches_tracked":
      continue
    if leaf == "weight" and tensor.ndim > 1:
      scale = tensor[0].numel() ** -0.5
      if module.endswith(("conv2", "to_out", "conv_point")):
        scale *= 0.02
      value = scale * torch.randn(tensor.shape, generator=generator)
    elif leaf == "weight":
      value = uniform(tensor.shape, 0.5, 1.5)
    elif leaf == "bias":
      value = 0.3 * torch.randn(tensor.shape, generator=generator)
    elif leaf == "running_mean":
      value = 0.02 * torch.randn(tensor.shape, generator=generator)
    else:
      value = uniform(tensor.shape, 1e-4, 1e-3)
    tensor.copy_(value)


def _stages(
  stages: tuple[dcae.Stage, ...], depths: tuple[int, ...]
) -> tuple[dcae.Stage, ...]:
  return tuple(
    stage._replace(width=width, depth=depth)
    for stage, width, depth in zip(
      stages[: len(WIDTHS)], WIDTHS, depths, strict=True
    )
  )


def _pair(family: Family) -> tuple[torch.nn.Module, dcae.DCAE, dict[str, Any]]:
  """Their model, our module and our variables, with the same weights."""
  theirs = diffusers.AutoencoderDC(
    latent_channels=LATENT_CHANNELS,
    encoder_block_out_channels=WIDTHS,
    decoder_block_out_channels=WIDTHS,
    encoder_layers_per_block=family.encoder_depths,
    decoder_layers_per_block=family.decoder_depths,
    **family.settings,
  ).eval()
  _randomise(theirs)
  published = dcae.create(family.variant)
  encoder, decoder = published.encoder, published.decoder
  ours = dcae.DCAE(
    encoder=encoder.clone(
      stages=_stages(encoder.stages, family.encoder_depths),
      latent_channels=LATENT_CHANNELS,
    ),
    decoder=decoder.clone(
      stages=_stages(decoder.stages, family.decoder_depths)
    ),
  )
  return theirs, ours, _variables(theirs, ours)


def _normal(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).normal(0, 0.5, shape).astype("float32")


def _to_torch(x: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def _relative_error(ours: jax.Array, theirs: torch.Tensor) -> float:
  """Of the whole array, in the 2-norm; ours is NHWC, theirs NCHW."""
  expected = theirs.detach().double().numpy()
  if expected.ndim == 4:
    expected = expected.transpose(0, 2, 3, 1)
  found = np.asarray(ours, np.float64)
  assert found.shape == expected.shape
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# Deepest grids of 2x4 (and 4x8, one step before) and of 6x6: attention takes
# its quadratic form up to 32 positions, its linear form beyond.
@pytest.mark.parametrize(("height", "width"), [(32, 64), (96, 96)])
@pytest.mark.parametrize("family", FAMILIES)
def test_latents_images_and_gradients_equal_diffusers(family, height, width):
  theirs, ours, variables = _pair(FAMILIES[family])
  images = _normal(2, height, width, 3)
  # What an L1 loss would send back, had its residuals these signs. The signs of
  # a computed residual would be arbitrary where it is 0 up to rounding.
  signs = np.random.default_rng(1).choice([-1.0, 1.0], images.shape)
  signs = signs.astype("float32")

  their_images = _to_torch(images).requires_grad_()
  their_z = theirs.encode(their_images).latent
  their_y = theirs.decode(their_z).sample
  (their_y * _to_torch(signs)).mean().backward()

  def loss(images, variables, signs):
    z = ours.apply(variables, images, method="encode")
    y = ours.apply(variables, z, method="decode")
    return jnp.mean(y * signs), (z, y)

  gradient, (z, y) = jax.jit(jax.grad(loss, has_aux=True))(
    jnp.asarray(images), variables, jnp.asarray(signs)
  )
  assert _relative_error(z, their_z) < 1e-4
  assert _relative_error(y, their_y) < 1e-4
  # Rounding may put a ReLU's argument on the other side of 0, which changes the
  # gradient of that image by about 1e-3; without it, the error is about 1e-6.
  errors = [
    _relative_error(a[None], b[None])
    for a, b in zip(gradient, their_images.grad, strict=True)
  ]
  assert min(errors) < 1e-3
  assert max(errors) < 1e-2


def test_training_moves_the_batch_statistics_as_torch_does():
  theirs, ours, variables = _pair(FAMILIES["in"])
  z = _normal(2, 1, 2, LATENT_CHANNELS)

  with torch.no_grad():
    their_y = theirs.train().decode(_to_torch(z)).sample
  expected = _variables(theirs, ours)["batch_stats"]

  @jax.jit
  def decode(variables, z):
    return ours.apply(variables, z, method="decode", mutable=["batch_stats"])

  y, moved = decode(variables, jnp.asarray(z))
  assert _relative_error(y, their_y) < 1e-4
  errors = jax.tree.map(
    lambda a, b: _relative_error(a, torch.from_numpy(np.array(b))),
    moved["batch_stats"],
    expected,
  )
  assert len(jax.tree.leaves(errors)) == 2 * 3  # blocks with a batch norm
  assert max(jax.tree.leaves(errors)) < 1e-4, errors
