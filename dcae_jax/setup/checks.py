"""What can be wrong with the config of a training run, found before it starts.

Nothing is written or compiled, no device asked. Of what the run starts from,
the description is read.
"""

from typing import Any

from ml_collections import ConfigDict

from dcae_jax.autoencoder import network, patchgan, phases, train_step
from dcae_jax.data import images
from dcae_jax.evaluation.networks import lpips
from dcae_jax.runs import differences
from dcae_jax.setup import metric_networks, wiring
from dcae_jax.training import freezing, optimizer

_LARGEST = 2**31 - 1  # counts are int32
_BELOW_1 = 1 - 1e-12
_FIRST_PHASE = phases.low_resolution_full_training.__name__


def check_autoencoder(
  config: ConfigDict, predecessor_is_pending: bool = False
) -> None:
  """Raises ValueError for a config that cannot be run; writes nothing.

  Args:
    config: of the run.
    predecessor_is_pending: `init_from` names a run that is still to come.
  """
  _check_numbers(config)
  optimizer.create(optimizer.Settings(**config.optimizer), config.steps)
  phase = phases.create(config.phase, config.trainable)
  wiring.check_resolutions(
    (config.resolution, *config.evaluation.resolutions),
    config.model,
  )
  variables = network.abstract_variables(
    wiring.model(config.model), config.model.image_channels
  )
  mask = freezing.trainable_mask(variables["params"], phase.trainable)
  if not config.evaluation.resolutions:
    raise ValueError(
      "config.evaluation.resolutions is empty; name at least one"
    )
  metric_networks.check(config.evaluation, "config.evaluation")
  images.Cropping(config.data.crop, config.resolution)
  _check_lpips(config)
  if phase.adversarial:
    _check_discriminator(config, mask)
  if config.phase != _FIRST_PHASE and not config.init_from:
    raise ValueError(
      f"phase {config.phase!r} starts from a trained autoencoder; set "
      "--config.init_from to the work directory of the phase before it"
    )
  if config.init_from and not predecessor_is_pending:
    _check_predecessor(config)


# Smallest and largest value of each number; None: any finite one above.
_BOUNDS = {
  "seed": (0, None),
  "resolution": (1, None),
  "batch_size": (1, None),
  "accumulation": (1, None),
  "steps": (1, None),
  "initial_branch_scale": (0, None),
  "log_every": (1, None),
  "log_seconds": (0, None),
  "model.image_channels": (1, None),
  "optimizer.learning_rate": (0, None),
  "optimizer.adam_learning_rate": (0, None),
  "optimizer.beta1": (0, _BELOW_1),
  "optimizer.beta2": (0, _BELOW_1),
  "optimizer.weight_decay": (0, None),
  "optimizer.warmup_steps": (0, None),
  "optimizer.decay_steps": (0, None),
  "optimizer.final_rate": (0, 1),
  "optimizer.clip_norm": (0, None),
  "ema.decay": (0, _BELOW_1),
  "ema.ramp_steps": (0, None),
  "lpips.weight": (0, None),
  "kl.weight": (0, None),
  "discriminator.weight": (0, None),
  "discriminator.learning_rate": (0, None),
  "discriminator.start_step": (0, None),
  "discriminator.width": (1, None),
  "discriminator.layers": (1, 8),
  "data.min_area": (0.001, 1),
  "data.min_size": (0, None),
  "data.max_megapixels": (0.001, None),
  "data.shorter_side": (0, None),
  "data.cache_megabytes": (0, None),
  "data.workers": (0, 1000),
  "data.threads": (1, 1000),
  "data.prefetch": (1, 100),
  "evaluation.every": (0, None),
  "evaluation.batch_size": (1, None),
  "evaluation.max_images": (0, None),
  "evaluation.samples": (1, None),
  "checkpoint.every": (0, None),
  "checkpoint.keep": (1, None),
  "profile.start": (0, None),
  "profile.steps": (0, None),
  "profile.on_signal": (1, None),
}


def _check_numbers(config: ConfigDict) -> None:
  for key, (least, most) in _BOUNDS.items():
    value = config
    for part in key.split("."):
      value = value[part]
    if not value >= least:  # also for NaN
      raise ValueError(f"config.{key}={value} is below {least}")
    if most == _BELOW_1 and value >= 1:
      raise ValueError(f"config.{key}={value} is not below 1")
    if value > (_LARGEST if most is None else most):
      limit = _LARGEST if most is None else most
      raise ValueError(f"config.{key}={value} is above {limit:g}")
  for key in ("min_size", "shorter_side"):
    if 0 < config.data[key] < config.resolution:
      raise ValueError(
        f"config.data.{key}={config.data[key]} is below config.resolution="
        f"{config.resolution}, so that images would be enlarged; set it to "
        f"{config.resolution}, or to 0 to allow that"
      )


def _check_lpips(config: ConfigDict) -> None:
  network = config.lpips.network
  lpips.parameter_shapes(network)
  if config.lpips.weight and config.resolution < lpips.SMALLEST_SIDE[network]:
    raise ValueError(
      f"config.resolution={config.resolution} is too small for LPIPS with "
      f"{network}; use at least {lpips.SMALLEST_SIDE[network]}"
    )


def _check_predecessor(config: ConfigDict) -> None:
  before = wiring.model_of(config.init_from)
  check_same_model(
    before, config.model, f"config.init_from={config.init_from!r}"
  )


def check_same_model(
  before: dict[str, Any], now: ConfigDict, name: str
) -> None:
  """Raises ValueError unless parameters of one fit the other."""
  there, here = (
    differences.flat(wiring.described(model))
    for model in (before, wiring.resolved(now))
  )
  for key in here:
    if there.get(key) != here[key]:
      raise ValueError(
        f"{name} has config.model.{key}={there.get(key)!r}, and this config "
        f"{here[key]!r}; use weights of the same autoencoder, or take its "
        "model with config.model.variant=''"
      )


def _check_discriminator(config: ConfigDict, mask: Any) -> None:
  c = config.discriminator
  if c.adaptive and not train_step.last_layer(mask):
    raise ValueError(
      "config.discriminator.adaptive needs decoder/project_out/conv among "
      "the trainable parameters; set it to False, or add the pattern"
    )
  smallest = patchgan.smallest_side(c.layers)
  if config.resolution < smallest:
    raise ValueError(
      f"config.resolution={config.resolution} is too small for a "
      f"discriminator with {c.layers} layers; use at least {smallest}, or "
      "fewer layers"
    )
