import functools
import importlib
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

import dcae_jax
from configs import base
from dcae_jax import errors, tasks
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.setup import (
  autoencoder_training,
  denoising,
  floor,
  image_sources,
  keys,
  models,
  start,
  study,
)
from dcae_jax.tasks import (
  evaluate_autoencoder,
  plan,
  train_autoencoder,
  train_phases,
)
from dcae_jax.training import freezing

DIRECTORY = pathlib.Path(__file__).parent.parent / "configs"
NAMES = sorted(
  path.stem
  for path in DIRECTORY.glob("*.py")
  if path.stem not in ("__init__", "base")
)
# By the arguments that their configs take.
STUDIES = {
  "residual_autoencoding": [()],
  "resolution_adaptation": [()],
  "local_refinement": [()],
  "tuned_layers": [("2",), ("3",)],
  "compression": [()],
  "throughput": [()],
  "learning": [("1",), ("3",)],
}
DEFAULTS = {
  "prepare": base.prepare,
  "train_autoencoder": base.autoencoder,
  "train_phases": lambda: base.three_phases("f32c32"),
  "report": base.report,
  "reconstruct": base.reconstruct,
  "evaluate_autoencoder": base.evaluate,
  "reference_statistics": base.reference_statistics,
  "export_latents": base.export_latents,
  "inspect_latents": base.inspect_latents,
  "encode_captions": base.encode_captions,
  "train_diffusion": base.latent_diffusion,
  "evaluate_diffusion": base.evaluate_diffusion,
  "export_and_diffuse": base.export_and_diffuse,
  "plan": base.plan,
  "study": base.study,
  "throughput": base.throughput,
}


def _keys(config, prefix=""):
  keys = set()
  for name, value in config.items():
    keys.add(prefix + name)
    if isinstance(value, ConfigDict):
      keys |= _keys(value, f"{prefix}{name}.")
  return keys


@pytest.mark.parametrize("name", NAMES)
def test_config_has_the_keys_of_base_and_builds(name):
  config = importlib.import_module(f"configs.{name}").get_config()
  assert config.task in tasks.TASKS
  assert _keys(config) == _keys(DEFAULTS[config.task]())
  phases = {
    "train_autoencoder": [config],
    "train_phases": [config.get(f"phase{i}") for i in (1, 2, 3)],
  }.get(config.task, [])
  for phase in phases:
    with phase.unlocked():
      phase.init_from = phase.init_from or "a run"
      phase.model.variant = phase.model.variant or "f32c32"
    training = autoencoder_training.build(
      phase, jax.devices()[:1], predecessor_is_pending=True
    )
    assert training.abstract.params


@pytest.mark.parametrize("name", STUDIES)
def test_arms_of_studies_are_configs_of_runs(name):
  create = importlib.import_module(f"configs.studies.{name}").get_config
  for arguments in STUDIES[name]:
    config = create(*arguments)
    assert set(config) == set(base.study())
    assert config.title and config.seeds == (0, 1, 2)
    study.check(config)
    for arm in config.arms:
      run = study.of_arm(config, arm)
      assert run.task in study.TASKS
      keys.check(run)
      if run.task == "train_autoencoder" and run.model.variant:
        autoencoder_training.build(run, predecessor_is_pending=True)
  text = (DIRECTORY / "studies" / f"{name}.py").read_text()
  assert f"--config=configs/studies/{name}.py" in text


def test_the_study_of_the_guide_can_be_run():
  page = (DIRECTORY.parent / "docs" / "studies.md").read_text()
  names = {}
  exec(re.search(r"```python\n(.*?)```", page, re.S)[1], names)
  config = names["get_config"]()
  study.check(config)
  keys.check(study.of_arm(config, "from-1"))


@pytest.mark.parametrize("variant", ["f32", "f64", "f128"])
def test_evaluations_suit_their_variant(variant):
  config = importlib.import_module(f"configs.{variant}_evaluate").get_config()
  phase1 = importlib.import_module(f"configs.{variant}_phase1").get_config()
  config.variant = phase1.model.variant
  evaluate_autoencoder.check(config)
  assert {"rfid", "lpips"} <= set(config.metrics)


@pytest.mark.parametrize("name", NAMES)
def test_config_is_short_and_its_docstring_holds_the_command(name):
  text = (DIRECTORY / f"{name}.py").read_text()
  assert f"--config=configs/{name}.py" in text
  assert "measured" in text or name == "quickstart"
  if not name.startswith("quickstart"):
    assert len(text.splitlines()) <= 25


@pytest.mark.parametrize("variant", ["f32", "f64", "f128"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_recipe_is_the_papers(variant, number):
  module = importlib.import_module(f"configs.{variant}_phase{number}")
  config = module.get_config()
  c = config.optimizer
  rates = {1: 6.4e-5, 2: 1.6e-5, 3: 5.4e-5}
  betas = {1: (0.9, 0.999), 2: (0.9, 0.999), 3: (0.5, 0.9)}
  assert c.learning_rate == rates[number]
  assert (c.beta1, c.beta2) == betas[number]
  if number < 3:
    assert c.weight_decay == {1: 0.1, 2: 0.001}[number]
  assert config.lpips.weight == 0.25 and config.lpips.network == "vgg16"
  assert config.model.variant.startswith(variant + "c")
  low, high = config.resolution, config.evaluation.resolutions
  assert (low == 256) == (number != 2) and (256 in high)


def test_whoever_compresses_the_denoiser_is_the_same():
  """Tokens, parameters and matrix products, at equal size of the latents."""
  config = importlib.import_module("configs.studies.compression").get_config()
  found = set()
  for arm in config.arms:
    run = study.of_arm(config, arm)
    compression = int(re.match(r"f(\d+)-", arm)[1])
    side, c = run.export.resolution // compression, run.training
    shape = (side, side, compression**2 // 32)
    c = denoising.with_numbers(c, "", shape, np.zeros(1, np.int32), ["all"])
    denoiser = denoising.create(c.model, c.objective, c.sampler).denoiser
    params = denoisers.abstract_variables(denoiser)["params"]
    tokens = len(params["positions"]) - 2  # besides the class and the time
    found.add((tokens, freezing.count(params), denoiser.forward_macs))
  ((tokens, _, _),) = found
  assert tokens == 4


def test_unknown_keys_fail_with_a_suggestion():
  config = base.phase1("f32c32").lock()
  with pytest.raises(AttributeError, match='Did you mean "resolution"'):
    config.resolutoin = 3
  with pytest.raises(KeyError, match="Did you mean"):
    config.update_from_flattened_dict({"data.worker": 3})


@pytest.mark.parametrize(
  "path, value, message",
  [
    ("resolutoin", 3, " is no key; did you mean config.resolution?"),
    ("optimizer.lr", 3, " is no key; did you mean config.optimizer.learning_r"),
    ("optimizer.resolution", 3, " is no key; did you mean config.resolution?"),
    (
      "data.source.members.a.paht",
      "",
      " is no key; did you mean config.data.source.members.a.path?",
    ),
    ("trainable", (3,), "=[3] is of the wrong form; write it as ('*',) is"),
    ("evaluation.resolutions", ("a",), "=['a'] is of the wrong form; write"),
    ("optimizer", {"kind": "muon"}, " lacks adam_learning_rate, beta1, beta2,"),
    (
      "optimizer",
      3,
      "=3 is of the wrong form; it is a group of ",
    ),
    ("phase", {"a": 1}, "={'a': 1} is of the wrong form; write it as 'low_"),
    ("steps", {"a": 1}, "={'a': 1} is of the wrong form; write it as 500000"),
    ("batch_size", None, "=None is of the wrong form; write it as 96 is"),
  ],
)
def test_files_have_the_keys_of_their_task_and_values_of_their_form(
  path, value, message
):
  config = base.phase1("tiny-f8")
  config.data.source.members.a = base.source("folder")
  keys.check(config)
  *groups, name = path.split(".")
  group = functools.reduce(lambda group, part: group[part], groups, config)
  with group.ignore_type():
    group[name] = value
  with pytest.raises(ValueError, match=re.escape(f"config.{path}{message}")):
    keys.check(config)


def test_stages_have_the_keys_of_their_tasks():
  config = base.three_phases("tiny-f8")
  keys.check(config)
  config.seed = 3
  with pytest.raises(
    ValueError, match=r"config\.seed is no key; did you mean c"
  ):
    keys.check(config)
  del config["seed"]
  config.phase2.batch_size = 0
  with pytest.raises(
    ValueError, match=r"config\.phase2\.batch_size=0 is below"
  ):
    keys.check(config)


def test_values_have_the_form_of_an_example_where_defaults_are_empty():
  config = base.evaluate()
  config.compare = ("block_pca", "runs/a")
  keys.check(config)
  config.compare = (3,)
  with pytest.raises(ValueError, match=r"write it as \('block_pca',\) is"):
    keys.check(config)


def test_phases_are_chained(tmp_path):
  config = train_phases.chained(
    base.three_phases("tiny-f8"), epath.Path(tmp_path)
  )
  assert config.phase1.init_from == ""
  assert config.phase2.init_from == str(tmp_path / "phase1")
  assert config.phase3.init_from == str(tmp_path / "phase2")
  assert list(config.report.runs) == ["phase1", "phase2", "phase3"]


def test_big_variants_shard_and_step_abstractly():
  """The whole f64 training state is described without being allocated."""
  config = importlib.import_module("configs.f64_phase2").get_config()
  with config.unlocked():
    config.mesh.data, config.mesh.fsdp = 1, 8
  training = autoencoder_training.build(config, predecessor_is_pending=True)
  learning = jax.tree.leaves(training.abstract.optimizer)
  assert sum(x.size for x in learning) < 10_000_000
  kernel = training.shardings.params["decoder"]["project_in"]["conv"]["kernel"]
  assert kernel.spec[-1] == "fsdp"


def test_blocks_are_scanned_unless_some_of_a_stage_are_frozen():
  """Stacked blocks are differentiated together."""
  config = importlib.import_module("configs.f32_phase2").get_config()
  build = lambda: autoencoder_training.build(
    config, predecessor_is_pending=True
  )
  assert build().autoencoder.decoder.options.scan
  with config.unlocked():
    config.trainable = ("decoder/stage_1/block_4",)
  assert not build().autoencoder.decoder.options.scan


def test_a_run_from_before_blocks_were_scanned_goes_on(tmp_path):
  config = base.phase1("tiny-f8")
  before = keys.resolved(config)
  del before["model"]["scan"], before["profile"]["on_signal"]
  (tmp_path / "config.json").write_text(json.dumps(before))
  start.check_work_directory(config, epath.Path(tmp_path))
  before["model"]["rematerialisation"] = False
  (tmp_path / "config.json").write_text(json.dumps(before))
  with pytest.raises(ValueError, match=r"model\.rematerialisation"):
    start.check_work_directory(config, epath.Path(tmp_path))


EARLIER = {
  "autoencoder": lambda: base.phase3("tiny-f8"),
  "diffusion": lambda: base.dit("DiT-tiny"),
}


@pytest.mark.parametrize("name", EARLIER)
def test_runs_from_before_a_key_was_added_go_on_as_they_began(name, tmp_path):
  """The files were written when optimizers had no kind."""
  folder = pathlib.Path(__file__).parent / "earlier_configs"
  shutil.copy(folder / f"{name}.json", tmp_path / "config.json")
  directory = epath.Path(tmp_path)
  start.check_work_directory(EARLIER[name](), directory)
  for key, value, message in (
    ("kind", "muon", "'adamw' there, 'muon' now"),
    ("schedule", "cosine", "'constant' there, 'cosine' now"),
    ("decay_all", True, "False there, True now"),
  ):
    config = EARLIER[name]()
    config.optimizer[key] = value
    with pytest.raises(ValueError, match=rf"optimizer\.{key}: {message}"):
      start.check_work_directory(config, directory)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ([], r"it is \[\], where a mapping is expected"),
    ({"task": 3}, "task is 3, where text is expected"),
    ({"workdir": 3}, "workdir is 3"),
    ({"model": 1}, "model is 1, where a mapping is expected"),
    ({"model": {"variant": "tiny-f8"}}, r"it has no model\.image_channels"),
    ({"model": None}, "it has no model"),
    ({"steps": "a"}, "steps is 'a', where a whole number is expected"),
    ({"steps": True}, "steps is True"),
    ({"data": {"source": []}}, r"data\.source is \[\]"),
    ({"batch_size": "a"}, "batch_size is 'a', where a number is expected"),
  ],
)
def test_a_config_with_other_types_is_named_by_whatever_reads_it(
  changes, message, tmp_path
):
  config = base.phase1("tiny-f8")
  found = keys.resolved(config)
  found = changes if isinstance(changes, list) else found | changes
  (tmp_path / "config.json").write_text(json.dumps(found))
  (tmp_path / "checkpoints/1").mkdir(parents=True)
  directory = epath.Path(tmp_path)
  message = rf"config\.json.* is damaged: {message}"
  run = str(tmp_path)
  with pytest.raises(errors.UserError, match=message):
    floor.of_run(run)
  if found:  # else it is taken for no run
    with pytest.raises(errors.UserError, match=message):
      plan.load(run, {})
  if "data" not in changes and "batch_size" not in changes:
    for read in (
      lambda: dcae_jax.load(run),
      lambda: start.check_work_directory(config, directory),
      lambda: models.identity_of(run),
    ):
      with pytest.raises(errors.UserError):
        read()


def test_keys_that_were_added_later_are_filled_in_for_each_phase(tmp_path):
  config = base.three_phases("tiny-f8")
  before = keys.resolved(config)
  for number in (1, 2, 3):
    del before[f"phase{number}"]["optimizer"]["kind"]
  (tmp_path / "config.json").write_text(json.dumps(before))
  start.check_work_directory(config, epath.Path(tmp_path))
  config.phase2.optimizer.kind = "muon"
  with pytest.raises(ValueError, match=r"phase2\.optimizer\.kind: 'adamw' "):
    start.check_work_directory(config, epath.Path(tmp_path))


def test_a_run_from_before_sources_had_parts_goes_on(tmp_path):
  config = base.phase1("tiny-f8")
  before = keys.resolved(config)
  del before["data"]["source"]["part"], before["on_accelerator"]
  (tmp_path / "config.json").write_text(json.dumps(before))
  start.check_work_directory(config, epath.Path(tmp_path))
  config.data.source.part = "training"
  with pytest.raises(ValueError, match=r"data\.source\.part"):
    start.check_work_directory(config, epath.Path(tmp_path))


def _small(number, path):
  module = importlib.import_module(f"configs.small_phase{number}")
  config = module.get_config().lock()
  config.data.source.path = path
  config.lpips.weight = 0.0
  return config


def _names(source):
  return {source.name(i) for i in range(len(source))}


def test_small_phases_hold_out_the_same_photographs(photographs):
  found = []
  for number in (1, 2, 3):
    config = _small(number, str(photographs))
    config.data.min_size = 0  # the photographs are tiny
    inputs = train_autoencoder.open_inputs(config)
    ((training, _),) = inputs.training
    assert not _names(training) & _names(inputs.held_out)
    assert len(training) + len(inputs.held_out) == 12
    found.append(_names(inputs.held_out))
  assert found[0] and found[0] == found[1] == found[2]


def test_other_images_can_be_held_out_instead(photographs):
  config = _small(1, str(photographs / "animals"))
  config.data.source.part = config.evaluation.source.part = ""
  config.evaluation.source.path = str(photographs / "places")
  inputs = train_autoencoder.open_inputs(config)
  assert len(inputs.training[0][0]) == len(inputs.held_out) == 6
  assert not _names(inputs.training[0][0]) & _names(inputs.held_out)


def test_parts_that_do_not_exist_are_refused(photographs):
  source = base.source("folder", str(photographs), part="rest")
  with pytest.raises(ValueError, match="known are training, held_out"):
    image_sources.single_source(source)
  members = {"a": base.source("folder", str(photographs), part="training")}
  mixture = base.source("mixture", members=members)
  ((found, _),) = image_sources.weighted_sources(mixture)
  assert len(found) < 12
  mixture.part = "training"
  with pytest.raises(ValueError, match="its members have"):
    image_sources.weighted_sources(mixture)


def test_an_accelerator_gets_its_sizes_and_what_was_set_stays(tmp_path):
  config = base.small(base.phase1("tiny-f8"))
  base.on_accelerator(config, {"resolution": 512, "batch_size": 8})
  config.batch_size = 4
  there = keys.for_device(config, "gpu")
  assert (there.resolution, there.batch_size) == (512, 4)
  assert there.model.dtype == "bfloat16"
  here = keys.for_device(config, "cpu")
  assert (here.resolution, here.batch_size) == (256, 4)
  start.write_config(there, epath.Path(tmp_path))
  start.check_work_directory(there, epath.Path(tmp_path))
  with pytest.raises(ValueError, match="resolution: 512 there, 256 now"):
    start.check_work_directory(here, epath.Path(tmp_path))
  config.on_accelerator = (("resolutoin", 1, 2),)
  with pytest.raises(ValueError, match="'resolutoin', which is no key"):
    keys.for_device(config, "gpu")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_small_configs_can_be_run_on_an_accelerator(number):
  config = keys.for_device(_small(number, "/folder"), "gpu")
  config.init_from = config.init_from or "a run"
  config.model.variant = "tiny-f8"
  autoencoder_training.build(config, predecessor_is_pending=True)
  assert config.resolution == {1: 128, 2: 256, 3: 128}[number]
