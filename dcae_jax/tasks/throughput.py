"""How fast a denoiser learns and draws on the latents of an autoencoder.

What deep compression saves (tables 3 and 4 of the paper) is the quotient of two
such runs. FLOPs are those of the real denoiser. What is measured may be a
smaller one, where ratios are not the paper's: attention between tokens is a
larger part of its work, which favours few tokens; the optimizer's step, and
what an operation costs besides its arithmetic, favour many.
"""

import logging

import jax
from etils import epath
from ml_collections import ConfigDict

from dcae_jax.runs import metrics_writer, outcome, versions
from dcae_jax.setup import keys, start, throughput
from dcae_jax.training import loop

_LOG = logging.getLogger(__name__)


def run(
  config: ConfigDict, workdir: epath.Path, sigterm: loop.Sigterm | None = None
) -> bool:
  """Counts, measures, and writes `result.json`; it does not stop early.

  Raises UserError for a denoiser that cannot be on such latents.
  """
  del sigterm
  keys.check(config)
  config = keys.for_device(config, jax.default_backend())
  whole, reduced = throughput.whole(config), throughput.reduced(config)
  if config.measured.rounds:
    throughput.check_memory(reduced, config.measured.sampling_batch)
  start.begin(config, workdir)
  start.write_config(config, workdir)
  result = {"versions": versions.versions()}
  result["counted"] = throughput.counted(whole)
  _LOG.info("counted, for an image: %s", _plain(result["counted"]))
  m = config.measured
  if m.rounds:
    _LOG.info("measuring on %s", result["versions"]["devices"])
    result["measured"] = throughput.measured(
      reduced,
      rounds=m.rounds,
      steps=m.training_steps,
      count=m.sampling_batch,
      decoding=m.decoding,
      seed=config.seed,
    )
    _LOG.info("measured: %s", _plain(result["measured"]))
  metrics_writer.write_json(workdir / "result.json", result)
  outcome.say(workdir, {"result": "result.json"})
  return True


def _plain(values: dict[str, float]) -> str:
  return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
