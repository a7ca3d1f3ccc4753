"""What a denoiser costs on the latents of an autoencoder: counted, measured.

A training step is the one of a run on stored latents, without the encoder; a
sample is guided, and decoded. Nothing is learned and no weights are read:
arrays hold random numbers.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dcae_jax.autoencoder import families, network
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.runs import compiling
from dcae_jax.setup import denoising, diffusion_training
from dcae_jax.training import hardware, program_cost, sharding


class Pair(NamedTuple):
  """A denoiser in training, and the autoencoder of its latents."""

  training: diffusion_training.Training
  autoencoder: network.Network
  guidance: float
  is_whole: bool = True

  @property
  def devices(self) -> list[jax.Device]:
    return list(self.training.mesh.devices.flat)

  def condition(self, count: int) -> Any:
    """Shapes of what samples are told."""
    loaded = self.training.loaded
    return jax.eval_shape(loaded.condition, loaded.abstract(count))

  def latents(self, count: int) -> jax.ShapeDtypeStruct:
    denoiser = self.training.model.denoiser
    shape = (count, *denoiser.latent_size, denoiser.latent_channels)
    return jax.ShapeDtypeStruct(shape, np.float32)

  @property
  def params(self) -> Any:
    """Shapes of the denoiser's variables, as samples are drawn with them."""
    return {"params": self.training.abstract.params}

  def decoder(self, count: int) -> tuple[Callable[..., Any], Any, Any]:
    """The function, and the shapes of its variables and latents."""
    variables = network.abstract_variables(self.autoencoder, 3)
    decode = lambda variables, z: self.autoencoder.apply(
      variables, z, method="decode"
    )
    return decode, variables, self.latents(count)


def whole(config: ConfigDict) -> Pair:
  """The denoiser of the config; raises UserError if there can be none."""
  training = config.training
  return _build(config, training.batch_size, training.model.dtype)


def reduced(config: ConfigDict) -> Pair:
  """The denoiser that is measured, maybe a smaller one, as `whole`."""
  measured = config.measured
  variant = denoisers.resized(
    denoising.variant_of(config.training.model),
    measured.depth,
    measured.hidden,
  )
  pair = _build(config, measured.training_batch, measured.dtype, variant)
  return pair._replace(is_whole=not measured.depth and not measured.hidden)


def _build(
  config: ConfigDict,
  batch_size: int,
  dtype: str,
  variant: denoisers.Variant | None = None,
) -> Pair:
  autoencoder = families.create(config.autoencoder, dtype=dtype)
  compression = autoencoder.spatial_compression
  network.check_side(config.resolution, compression, key="config.resolution")
  training = config.training.copy_and_resolve_references()
  training.batch_size, training.model.dtype = batch_size, dtype
  training.text.cache = "states"  # they are read, not encoded in the step
  training.model.update(
    latent_size=config.resolution // compression,
    latent_channels=autoencoder.latent_channels,
    num_classes=config.classes,
    caption_tokens=config.caption_tokens,
    caption_width=config.caption_width,
  )
  device = jax.local_devices()[:1]
  built = diffusion_training.build(training, device, variant)
  return Pair(built, autoencoder, config.guidance)


def check_memory(pair: Pair, count: int) -> None:
  """Raises UserError if what is measured surely does not fit the device.

  `count` samples are drawn at once, and decoded.
  """
  pair.training.check_machine()
  decode, variables, z = pair.decoder(count)
  images = jax.eval_shape(decode, variables, z)
  sizes = (
    x.size * x.dtype.itemsize for x in jax.tree.leaves((variables, z, images))
  )
  hardware.check_memory(
    {f"config.measured.sampling_batch={count}, decoded": sum(sizes)},
    pair.devices,
    "lower it, or config.resolution",
  )


def counted(pair: Pair) -> dict[str, float]:
  """FLOPs and bytes for one image, as XLA counts them; nothing runs.

  Of samples, those of the guided network, without the solver's arithmetic. With
  Dormand and Prince's method they are an upper bound, as its steps are.
  """
  training, model = pair.training, pair.training.model
  count = training.config.batch_size

  def call(variables, condition, z, t):
    return model.guided(variables, condition, pair.guidance)(z, t)

  step = program_cost.counted(
    training.step(lambda params: params), *training.arguments()
  )
  z, t = pair.latents(count), jax.ShapeDtypeStruct((count,), np.float32)
  drawn = program_cost.counted(call, pair.params, pair.condition(count), z, t)
  calls = model.steps * model.sampler.calls
  sampling = calls * drawn.flops / count / 1e12
  decoding = program_cost.counted(*pair.decoder(1)).flops / 1e12
  area = model.denoiser.patch_size**2
  return {
    "tokens": int(np.prod(model.denoiser.latent_size)) // area,
    "training_gflop": step.flops / count / 1e9,
    "training_gigabytes": step.bytes_accessed / count / 1e9,
    "sampling_tflop": sampling,
    "decoding_tflop": decoding,
    "sampling_with_decoding_tflop": sampling + decoding,
  }


def measured(
  pair: Pair, rounds: int, steps: int, count: int, decoding: bool, seed: int
) -> dict[str, float]:
  """Images per second of one device, and seconds to decode one.

  Args:
    pair: what trains, draws and decodes.
    rounds: the fastest one counts.
    steps: of the training, in a round.
    count: of samples, drawn and decoded at once.
    decoding: whether to measure that.
    seed: of all arrays.

  Samples with decoding are left out for a smaller denoiser than the real one:
  beside the real decoder it would compare nothing.
  """
  trained = steps * pair.training.config.batch_size
  found = {
    "training_images_per_second": trained / _train(pair, steps, rounds, seed),
    "sampling_images_per_second": count / _sample(pair, count, rounds, seed),
  }
  if decoding:
    decode, *shapes = pair.decoder(count)
    arrays = _filled(shapes, seed)
    with compiling.announced("the decoder", arrays, pair.devices):
      program = jax.jit(decode).lower(*arrays).compile()
    seconds = _least(lambda: program(*arrays), rounds) / count
    found["decoding_seconds"] = seconds
    if pair.is_whole:
      drawn = 1 / found["sampling_images_per_second"]
      found["sampling_with_decoding_images_per_second"] = 1 / (drawn + seconds)
  return found


def _train(pair: Pair, steps: int, rounds: int, seed: int) -> float:
  arguments = pair.training.arguments()
  with compiling.announced("the training step", arguments, pair.devices):
    program = pair.training.jitted().lower(*arguments).compile()
  state, *inputs = _filled(arguments, seed)

  def train():
    nonlocal state
    for _ in range(steps):
      state, _ = program(state, *inputs)
    return state

  return _least(train, rounds)


def _sample(pair: Pair, count: int, rounds: int, seed: int) -> float:
  place = sharding.replicated(pair.training.mesh)
  draw = jax.jit(pair.training.model.sample_function(pair.guidance, place))
  variables, condition = _filled((pair.params, pair.condition(count)), seed)
  arguments = variables, jax.random.key(seed), condition
  with compiling.announced("the sampler", arguments, pair.devices):
    program = draw.lower(*arguments).compile()
  return _least(lambda: program(*arguments), rounds)


def _least(work: Callable[[], Any], rounds: int) -> float:
  """Seconds of the fastest round."""
  taken = []
  for _ in range(rounds):
    began = time.perf_counter()
    jax.block_until_ready(work())
    taken.append(time.perf_counter() - began)
  return min(taken)


def _filled(shapes: Any, seed: int) -> Any:
  """Arrays of these shapes: small numbers, not negative; whole ones are 1."""
  count = len(jax.tree.leaves(shapes))
  keys = iter(jax.random.split(jax.random.key(seed), count))

  def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return jnp.ones(x.shape, x.dtype)
    return jax.random.uniform(next(keys), x.shape, x.dtype, maxval=0.05)

  return jax.tree.map(fill, shapes)
