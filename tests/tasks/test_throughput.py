"""What a denoiser costs on latents, as a user counts and measures it."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
from conftest import run_main, said_made
from etils import epath

from configs import base
from dcae_jax.setup import throughput as setup
from dcae_jax.tasks import throughput
from dcae_jax.training import program_cost

_DEPTH, _HIDDEN = 4, 128  # of the tiny denoisers


def _config(denoiser=base.uvit, variant="UViT-tiny", side=64, **changes):
  """On latents [8, 8, 16] of tiny-f8, with two steps of a sampler."""
  c = base.throughput()
  c.training = denoiser(variant)
  c.training.batch_size, c.training.sampler.steps = 16, 2
  c.autoencoder, c.resolution = "tiny-f8", side
  c.classes, c.caption_tokens, c.caption_width = 3, 5, 24
  c.measured.rounds = 0
  c.compilation_cache = ""
  c.update_from_flattened_dict(changes)
  return c


@functools.cache
def _plain():
  return _counted()


def _counted(**arguments):
  return setup.counted(setup.whole(_config(**arguments)))


def _macs(tokens):
  """Of a forward pass of UViT-tiny's blocks, by hand."""
  block = 12 * tokens * _HIDDEN**2 + 2 * tokens**2 * _HIDDEN
  merge = 2 * tokens * _HIDDEN**2
  return (_DEPTH + 1) * block + _DEPTH // 2 * merge


def test_counted_flops_are_those_of_the_matrix_products_by_hand():
  """Of which a token has about as many as all else has."""
  found = _plain()
  assert found["tokens"] == 64
  macs = _macs(64 + 2)
  # Two calls a step, and two operations a multiply-accumulate.
  sampling = found["sampling_tflop"] * 1e12 / (2 * 2 * 2 * macs)
  assert 1 < sampling < 1.2
  # A backward pass is two forward ones.
  assert 1 < found["training_gflop"] * 1e9 / (3 * 2 * macs) < 1.3
  together = found["sampling_tflop"] + found["decoding_tflop"]
  assert found["sampling_with_decoding_tflop"] == together


def test_ratios_of_what_is_counted_are_those_by_hand():
  one = _plain()
  four = _counted(**{"training.model.patch_size": 2})
  assert four["tokens"] == 16
  by_hand = _macs(64 + 2) / _macs(16 + 2)
  ratio = one["sampling_tflop"] / four["sampling_tflop"]
  assert ratio == pytest.approx(by_hand, rel=0.05)
  assert one["training_gigabytes"] > 2 * four["training_gigabytes"]
  assert one["decoding_tflop"] == four["decoding_tflop"]


def test_heun_calls_the_network_twice_as_often_as_euler():
  flops = {}
  for kind in ("euler", "heun"):
    sampler = {"training.sampler.kind": kind, "training.sampler.steps": 4}
    found = _counted(denoiser=base.usit, **sampler)
    flops[kind] = found["sampling_tflop"]
  assert flops["heun"] == 2 * flops["euler"]


def test_samples_without_guidance_cost_half():
  without = _counted(guidance=1.0)
  ratio = _plain()["sampling_tflop"] / without["sampling_tflop"]
  assert ratio == pytest.approx(2, rel=0.01)


def test_flops_and_bytes_of_a_product_are_counted_without_compiling():
  x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
  found = program_cost.counted(lambda x, y: x @ y, x, jnp.ones((16, 4)))
  assert found == (2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4))


def _measuring(**changes):
  small = {
    "rounds": 1, "depth": 2, "hidden": 64, "dtype": "float32",
    "training_batch": 2, "training_steps": 2, "sampling_batch": 2,
  }  # fmt: skip
  return {f"measured.{key}": x for key, x in (small | changes).items()}


def _run(config, workdir):
  assert throughput.run(config, epath.Path(workdir))
  return json.loads((workdir / "result.json").read_text())


def test_a_smaller_denoiser_is_measured_and_the_real_one_counted(
  tmp_path, caplog
):
  config = _config(**_measuring())
  caplog.set_level("INFO")
  found = _run(config, tmp_path)
  assert said_made(caplog.text) == {"result"}
  assert found["counted"] == _plain()
  assert set(found["measured"]) == {
    "training_images_per_second",
    "sampling_images_per_second",
    "decoding_seconds",
  }
  assert all(value > 0 for value in found["measured"].values())
  assert found["versions"]["devices"].endswith(" cores)")
  denoiser = setup.reduced(config).training.model.denoiser
  assert (denoiser.depth, denoiser.hidden, denoiser.heads) == (2, 64, 2)


def _measured(*arguments, decoding, **changes):
  pair = setup.reduced(_config(*arguments, **_measuring(**changes)))
  return setup.measured(pair, 1, 1, 2, decoding, seed=0)


def test_the_real_denoiser_draws_and_decodes_slower_than_it_draws():
  found = _measured(depth=0, hidden=0, decoding=True)
  together = 1 / found["sampling_with_decoding_images_per_second"]
  drawn = 1 / found["sampling_images_per_second"]
  assert together == pytest.approx(drawn + found["decoding_seconds"])


def test_a_denoiser_of_captions_reads_states_of_them():
  """Without an encoder, of which there is none here."""
  pixart = base.pixart, "PixArt-tiny"
  states = setup.whole(_config(*pixart)).condition(2)["states"]
  assert states.shape == (2, 5, 24)
  found = _measured(*pixart, decoding=False)
  assert set(found) == {
    "training_images_per_second",
    "sampling_images_per_second",
  }


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"autoencoder": "f9"}, "unknown variant 'f9'; known are "),
    ({"training.model.variant": "UViT-Q"}, "unknown denoiser 'UViT-Q'; known"),
    ({"training.model.patch_size": 3}, "patch_size=3 is not one of"),
    ({"training.sampler.kind": "ode"}, "unknown config.sampler.kind='ode'"),
    ({"measured.hidden": 50}, "hidden=50 is not a multiple of 32, the width"),
    ({"measured.depth": 3}, "depth=3 of a UViT is odd"),
    (
      {
        "measured.sampling_batch": 2**20,
        "measured.rounds": 1,
        "resolution": 2**13,
      },
      "too little memory: config.measured.sampling_batch=1048576, decoded",
    ),
    ({"measured.depth": 10**9}, "config.measured.depth=1000000000 is above"),
    ({"measured.rounds": -1}, "config.measured.rounds=-1 is below 0"),
    (
      {"resolution": 60},
      "image side 60 in config.resolution is not divisible by 8",
    ),
  ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
  changes, message, tmp_path
):
  with pytest.raises(ValueError, match=message) as refused:
    throughput.run(_config(**changes), epath.Path(tmp_path / "run"))
  assert "\n" not in str(refused.value)
  assert not (tmp_path / "run").exists()


def test_the_command_line_says_in_one_line_what_is_wrong(tmp_path):
  found = run_main(
    "configs/throughput.py",
    f"--workdir={tmp_path}",
    "--config.autoencoder=f9",
  )
  assert found.returncode == 2
  assert found.stderr.startswith("error: unknown variant 'f9'")
