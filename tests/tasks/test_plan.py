import json
import math
import re

import jax
import pytest
from conftest import run_main, said_made
from etils import epath

from configs import base
from dcae_jax.tasks import plan
from dcae_jax.training import program_cost

_ROUGHLY = {"exec_time_optimization_effort": -1.0}
_CONFIG = """
from configs import base

def get_config():
  c = base.phase{phase}("tiny-f8")
  c.model.dtype = "float32"
  c.lpips.weight = 0.0
  c.resolution, c.batch_size, c.data.min_size = 32, 16, 0
  c.evaluation.resolutions = (32,)
  return c
"""


@pytest.fixture
def config_file(tmp_path):
  """A function of the phase: the config of a small run."""

  def write(phase):
    path = tmp_path / f"tiny_phase{phase}.py"
    path.write_text(_CONFIG.format(phase=phase))
    return str(path)

  return write


def _measure(path, topology="", changes=None, options=None):
  config = plan.load(path, changes or {})[""]
  training = plan.build(config, plan.devices_of(topology))
  return plan.measure("tiny", topology, training, options or {})


def test_state_of_a_chip_falls_as_one_nth_with_fsdp(config_file):
  """As the compiler has it, with the optimizer and the averages."""
  path = config_file(1)
  found = {
    n: _measure(path, changes={"mesh": {"data": -1, "fsdp": n}}) for n in (1, 8)
  }
  whole = found[1]
  assert whole.state >= whole.parameters + whole.averages + whole.optimizer
  assert whole.optimizer == pytest.approx(2 * whole.parameters, rel=0.01)
  for n, split in found.items():
    for part in ("parameters", "averages", "optimizer", "state"):
      # What is not split: norms, biases, and kernels of few channels.
      assert getattr(split, part) <= (1 / n + 0.03) * getattr(whole, part)


def test_fsdp_moves_parameters_not_activations(config_file):
  """At 64 images of 64 px for each chip, activations are the larger ones."""
  changes = {
    "mesh": {"data": 1, "fsdp": 8}, "batch_size": 64, "resolution": 64
  }  # fmt: skip
  found = _measure(config_file(1), changes=changes)
  whole = 8 * found.parameters  # at most: some of it is not split
  assert "all-to-all" not in found.collectives
  moved = sum(size for _, size in found.collectives.values())
  # Gathered forward, maybe again backward, and the gradients.
  assert 0.8 * whole <= found.collectives["all-gather"][1] <= 2.1 * whole
  assert moved <= 4.2 * whole


def test_a_phase_that_trains_little_holds_little(config_file):
  first, second = (_measure(config_file(phase)) for phase in (1, 2))
  assert second.optimizer < 0.1 * first.optimizer
  assert second.flops < 0.55 * first.flops
  assert second.temporaries < first.temporaries


def test_captions_are_planned_by_the_name_of_an_encoders_size(tmp_path):
  """Its work counts where each step encodes; no weights are here."""
  path = tmp_path / "tiny_pixart.py"
  path.write_text(
    "from configs import base\n"
    "get_config = lambda: base.pixart('PixArt-tiny')\n"
  )

  def build(cache):
    changes = {
      "model": {"latent_size": 4, "latent_channels": 8},
      "text": {"encoder": "t5-v1_1-small", "cache": cache},
    }
    config = plan.load(str(path), changes)[""]
    return plan.build(config, plan.devices_of(""))

  encoding, reading = build(""), build("states")
  assert encoding.config.model.caption_tokens == 120
  assert encoding.config.model.caption_width == 512
  layer = 4 * 512 * 6 * 64 + 3 * 512 * 1024
  work = encoding.flops(remat=True) - reading.flops(remat=True)
  assert work == 2 * encoding.config.batch_size * 120 * 8 * layer


def test_a_slice_that_is_not_here_is_planned(config_file, capsys):
  """Through the task, with the sum and the roofline that the table shows."""
  config = base.plan()
  config.of, config.topology = config_file(2), "v5e:2x2"
  config.batch_size_per_chip = (2,)
  config.compiler_options.update(_ROUGHLY)
  config.compilation_cache = ""
  assert plan.run(config, None)
  text = capsys.readouterr().out
  assert "4 chips (data 4 x fsdp 1 x spatial 1), batch 8" in text
  row = text.strip().splitlines()[-1]
  assert re.match(
    r"\| tiny_phase2 \| v5e:2x2 \| 4 x 1 x 1 \| 8 \| [\d.]+ of 15.75 \| ", row
  )
  assert "all-reduce" in text and "TFLOP" in text


def test_the_roofline_is_the_slowest_of_three():
  cost = program_cost.Cost(819e9, {"all-reduce": (2, 100e9)})
  chip = plan.hardware.chip("TPU v5 lite")
  found = plan._roofline(chip, 2 * 197e12, cost)
  assert found == {"compute": 2.0, "memory": 1.0, "interconnect": 1.0}
  assert plan._roofline(None, 1.0, cost) == {}


def _plan(**changes):
  values = {
    "config": "a", "topology": "v5e:4x4", "chips": 16,
    "mesh": {"data": 16, "fsdp": 1, "spatial": 1}, "batch_size": 128,
    "parameters": 4, "averages": 4, "optimizer": 8, "state": 10 * 2**30,
    "temporaries": 20.0 * 2**30, "program": 0, "needed": 30.0 * 2**30,
    "available": 15.75 * 2**30, "fits": False, "flops": 1e12,
    "bytes_accessed": 1e9, "collectives": {},
    "seconds": {"compute": 0.5, "memory": 0.25},
    "compile_seconds": 1.0, "advice": "",
  }  # fmt: skip
  return plan.Plan(**values | changes)


def test_what_does_not_fit_comes_with_what_to_change():
  found = _plan()
  advice = plan._advice(found, True)
  for change in ("mesh.fsdp=-1", "accumulation=8", "rematerialisation"):
    assert change in advice
  assert "mesh.spatial=2" in advice
  assert "accumulation" not in plan._advice(_plan(batch_size=16), True)
  assert "spatial" not in plan._advice(found, False)
  split = _plan(mesh={"data": 1, "fsdp": 16, "spatial": 1})
  assert "fsdp" not in plan._advice(split, True)
  shown = found._replace(advice=advice)
  assert f"does not fit: {advice}" in plan.details(shown)
  assert "does not fit" in plan.table([shown])


def test_the_compilers_own_message_gives_the_size():
  message = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
    "memory space hbm. Used 24.50G of 15.75G hbm. Exceeded hbm by 8.75G"
  )
  assert plan._used(message, 1.0) == (24.5 * 2**30, 15.75 * 2**30)
  other = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
    "for HLO temporaries (20.13G) exceeds available HBM (15.75G)."
  )
  assert plan._used(other, 1.0) == (20.13 * 2**30, 15.75 * 2**30)
  assert plan._used("RESOURCE_EXHAUSTED: something", 1.0) == (math.inf, 1.0)


def test_what_a_tpu_has_no_room_for_is_a_row_not_an_error(config_file):
  found = _measure(
    config_file(3), "v5e:1x1", {"resolution": 8192, "batch_size": 16},
    _ROUGHLY,
  )  # fmt: skip
  assert not found.fits and found.needed > found.available == 15.75 * 2**30
  assert "accumulation=16" in found.advice and found.seconds == {}


def test_images_per_second_are_of_the_roofline():
  found = _plan()
  assert found.step_seconds == 0.5 and found.images_per_second == 256


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"of": ""}, "config.of is empty"),
    ({"of": "configs/none.py"}, "is neither a config file"),
    ({"of": "configs/f64_export.py"}, "is of the task 'export_latents'"),
    ({"of": "configs/f64_uvit_h.py"}, "config.model.latent_size=0"),
    ({"of": "configs/finetune_phase2.py"}, "config.model.variant is empty"),
    ({"topology": "v9:2x2"}, "unknown topology 'v9:2x2'"),
    ({"batch_size_per_chip": (0.01,)}, "is 0.08 images on 8 chips"),
    ({"batch_size_per_chip": (0.3,)}, "choose one that makes a whole"),
    (
      {"changes.resolutoin": 3},
      "of the run; did you mean 'resolution'?",
    ),
    ({"changes.resolution": 100}, "not divisible by 64"),
    ({"changes.mesh.fsdp": 3}, "config.mesh"),
  ],
)
def test_bad_input_is_named_before_anything_is_compiled(
  changes, message, monkeypatch
):
  def never(*_):
    raise AssertionError("compiled")

  monkeypatch.setattr(plan, "measure", never)
  config = base.plan()
  config.of, config.compilation_cache = "configs/f64_phase2.py", ""
  with config.unlocked():
    config.update_from_flattened_dict(
      {k: v for k, v in changes.items() if "." not in k}
    )
    nested = {k: v for k, v in changes.items() if "." in k}
    for key, value in nested.items():
      *path, last = key.split(".")
      value = {last: value}
      for part in reversed(path[1:]):
        value = {part: value}
      config.changes.update(value)
  with pytest.raises(ValueError, match=re.escape(message)):
    plan.run(config, None)


def test_a_config_of_the_package_is_named_without_its_path(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  config = plan.load("f64_phase2", {"mesh": {"spatial": 2}})[""]
  assert config.model.variant == "f64c128" and config.mesh.spatial == 2


def test_the_command_needs_no_work_directory(config_file, tmp_path, caplog):
  changes = "--config.changes={'batch_size': 2, 'mesh': {'data': 1}}"
  arguments = [f"--config.of={config_file(3)}", changes]
  arguments += ["--config.compilation_cache="]
  found = run_main("configs/plan.py", *arguments)
  assert found.returncode == 0, found.stderr
  assert "| tiny_phase3 | 1 x cpu | 1 x 1 x 1 | 2 |" in found.stdout
  assert "roofline" not in found.stdout  # of a CPU no rates are published
  assert "made:" not in found.stderr
  workdir = epath.Path(tmp_path / "out")
  config = base.plan()
  config.of = config_file(3)
  config.changes.update({"batch_size": 8})
  config.compilation_cache = ""
  caplog.set_level("INFO")
  plan.run(config, workdir)
  assert said_made(caplog.text) == {"result"}
  row = json.loads((workdir / "result.json").read_text())["plans"][0]
  assert row["fits"] and row["chips"] == len(jax.devices())
  other = run_main("configs/f64_phase1.py")
  assert other.returncode == 2 and "--workdir is missing" in other.stderr
