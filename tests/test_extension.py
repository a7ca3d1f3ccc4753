"""Modules outside the package add to its tables: those of docs/extend.md.

The condition with its denoiser is in `diffusion/test_extension.py`, the family
of autoencoders in `autoencoder/test_families.py`, metrics in
`evaluation/test_metrics.py`.
"""

import json
import os
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
import tiny_text_encoders
from conftest import REPOSITORY
from etils import epath
from ml_collections import ConfigDict

import dcae_jax
from configs import base
from dcae_jax.autoencoder import families
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.runs import config_files
from dcae_jax.setup import (
  autoencoder_training,
  denoising,
  image_sources,
  keys,
  metric_networks,
  study,
)
from dcae_jax.tasks import (
  export_and_diffuse,
  plan,
  train_autoencoder,
  train_diffusion,
  train_phases,
)

USED_ELSEWHERE = {"my_condition", "my_family", "my_metrics"}
USED_HERE = {
  "my_architecture", "my_decoder", "my_denoiser", "my_source", "my_task",
  "my_text_encoder", "my_variant",
}  # fmt: skip


@pytest.fixture(scope="module")
def archive(photographs, tmp_path_factory) -> str:
  path = tmp_path_factory.mktemp("archive") / "photos.zip"
  with zipfile.ZipFile(path, "w") as file:
    for image in sorted(photographs.rglob("*.png")):
      file.write(image, image.relative_to(photographs))
  return str(path)


def of_archive(archive, **options):
  return base.source("zip", archive, options=options)


def test_every_example_is_used(examples):
  shown = {path.stem for path in examples.glob("*.py")}
  assert shown == USED_HERE | USED_ELSEWHERE


def test_a_source_has_parameters_of_its_own(plugin, archive):
  plugin("my_source")
  whole = image_sources.single_source(of_archive(archive))
  some = image_sources.single_source(of_archive(archive, within="animals/"))
  assert (len(whole), len(some)) == (12, 6)
  assert {some.key(i)[:8] for i in range(6)} == {"animals/"}
  with pytest.raises(ValueError, match=r"'inside', .* kind 'zip'; it takes w"):
    image_sources.single_source(of_archive(archive, inside="animals/"))
  with pytest.raises(ValueError, match=r"'x', .* kind 'folder'; it takes none"):
    image_sources.single_source(base.source("folder", "/", options={"x": 1}))


def test_a_source_without_a_parameter_that_it_needs_is_refused(monkeypatch):
  kinds = image_sources.sources.KINDS
  monkeypatch.setitem(kinds, "cloud", lambda bucket, path, depth=3: None)
  with pytest.raises(ValueError, match=r"needs bucket, .*\{'bucket': \.\.\.\}"):
    image_sources.whole(base.source("cloud"))


def test_evaluation_follows_the_options_of_training():
  c = base.autoencoder()
  base.hold_out(c)
  c.data.source.options.within = "summer/"
  assert c.evaluation.source.options.to_dict() == {"within": "summer/"}


def test_worker_processes_read_a_source_and_a_phase_of_ones_own_trains(
  plugin, archive, tiny_config, tmp_path
):
  """The decoder learns with the GAN, and its batch statistics move."""
  plugin("my_source")
  trainable = plugin("my_decoder").get_config().trainable
  config = tiny_config(
    3, phase="decoder_refinement", trainable=trainable, steps=1, init_from="",
    plugins=("my_decoder", "my_source"),
  )  # fmt: skip
  config.data.source = of_archive(archive, within="animals/")
  config.evaluation.source, config.data.workers = of_archive(archive), 1
  config.data.threads = 1
  before = tiny_config(1, steps=1)
  assert train_autoencoder.run(before, epath.Path(tmp_path / "before"))
  config.init_from = str(tmp_path / "before")
  run = epath.Path(tmp_path / "run")
  assert train_autoencoder.run(config, run)
  result = json.loads((run / "result.json").read_text())
  assert result["images_skipped"] == 0
  recorded = json.loads((run / "config.json").read_text())
  assert recorded["plugins"] == ["my_decoder", "my_source"]
  assert recorded["data"]["source"]["options"] == {"within": "animals/"}
  ours, theirs = (
    dcae_jax.load(x).variables for x in (run, tmp_path / "before")
  )
  for name, moves in (("encoder", False), ("decoder", True)):
    leaves = [jax.tree.leaves(x["params"][name]) for x in (ours, theirs)]
    same = [np.array_equal(*pair) for pair in zip(*leaves, strict=True)]
    assert all(same) != moves


def test_a_denoiser_of_ones_own_is_trained_in_a_size_of_ones_own(
  plugin, tiny_diffusion, tmp_path
):
  plugin("my_denoiser")
  assert "ConvNet-B" in dcae_jax.list_denoisers()
  changes = {"model.variant": "ConvNet-S", "steps": 1}
  c = tiny_diffusion(plugins=("my_denoiser",), **changes)
  c.model.architecture = {"depth": 1, "hidden": 16}
  assert train_diffusion.run(c, epath.Path(tmp_path))
  # It goes on in the same directory, whatever the module is called by now.
  c.plugins, c.steps = ("my_denoiser", "os"), 2
  assert train_diffusion.run(c, epath.Path(tmp_path))
  denoiser = dcae_jax.load_denoiser(tmp_path)
  assert denoiser.variant == "custom"
  assert denoiser.diffusion.denoiser.hidden == 16
  z = np.zeros((1, 2, 2, 16), np.float32)
  assert denoiser.predict(z, [0.0], labels=[0]).shape == z.shape
  with pytest.raises(ValueError, match="no other library has a ConvNet"):
    denoiser.save(tmp_path / "saved")


def test_an_architecture_has_a_name_or_none(plugin, tmp_path):
  plugin("my_variant")
  assert "f16c64" in dcae_jax.list_variants()
  c = plugin("my_architecture").get_config()
  keys.check(c)
  c.mesh.data = 1
  training = autoencoder_training.build(c, jax.devices()[:1])
  assert training.abstract.params
  architecture = c.model.architecture.to_dict()
  model = families.create(families.of_model("custom", architecture))
  assert (model.spatial_compression, model.latent_channels) == (16, 64)
  found = plan.load(
    str(REPOSITORY / "configs/f32_phase1.py"), {"model": {"variant": "f16c64"}}
  )
  named = families.check_variant(found[""].model.variant)
  assert named.spatial_compression == 16
  fields = {"depth": 2, "hidden": 64, "heads": 2}
  changes = {"model": {"variant": "UViT", "architecture": fields}}
  found = plan.load(str(REPOSITORY / "configs/f64_uvit_h.py"), changes)
  assert denoising.variant_of(found[""].model).fields == fields


@pytest.mark.parametrize(
  "architecture",
  [
    {"_class_name": "AutoencoderDC", "latent_channels": 4,
     "encoder_block_out_channels": [16, 24, 32],
     "decoder_block_out_channels": [16, 16, 32],
     "encoder_layers_per_block": [0, 1, 1],
     "decoder_layers_per_block": [0, 2, 1],
     "encoder_qkv_multiscales": [[], [], []],
     "decoder_qkv_multiscales": [[], [], []]},
    {"_class_name": "AutoencoderKL", "block_out_channels": [8, 16, 24],
     "down_block_types": ["DownEncoderBlock2D"] * 3,
     "up_block_types": ["UpDecoderBlock2D"] * 3, "norm_num_groups": 4,
     "latent_channels": 3},
  ],
)  # fmt: skip
def test_widths_and_depths_from_scratch_are_trained_saved_and_loaded(
  architecture, tiny_config, tmp_path
):
  config = tiny_config(1, steps=1, **{"model.variant": "custom"})
  config.model.architecture = architecture
  assert train_autoencoder.run(config, epath.Path(tmp_path / "run"))
  ae = dcae_jax.load(tmp_path / "run", scaling_factor=1.0)
  assert (ae.variant, ae.spatial_compression) == ("custom", 4)
  ae.save(tmp_path / "saved")
  saved = json.loads((tmp_path / "saved/config.json").read_text())
  assert {key: saved[key] for key in architecture} == architecture
  images = np.zeros((1, 8, 8, 3), np.float32)
  loaded = dcae_jax.load(tmp_path / "saved")
  np.testing.assert_array_equal(loaded.encode(images), ae.encode(images))


@pytest.mark.parametrize(
  "variant, fields",
  [
    ("UViT-S", {"depth": 4}),
    ("UViT", {"depth": 4, "hidden": 512, "heads": 8}),
    ("UViT-mine", {"depth": 4, "hidden": 512, "heads": 8}),
  ],
)
def test_a_denoiser_has_depth_and_width_of_ones_own(variant, fields):
  found = denoisers.of_model(variant, fields)
  assert found.family == "UViT" and found.fields.items() >= fields.items()
  assert denoisers.of_model("UViT-S", {}) == denoisers.find("UViT-S")


@pytest.mark.parametrize(
  "variant, fields, message",
  [
    ("UViT-S", {"dept": 4}, "'dept' is no field of UViT; did you mean 'depth'"),
    ("UViT-S", {"patch_size": 2}, "'patch_size' is no field .* there are d"),
    ("UViT-S", {"depth": -2}, "depth=-2 is below 1"),
    ("UViT-S", {"depth": 3}, "depth=3 of a UViT is odd"),
    ("UViT-S", {"depth": 10**6}, "depth=1000000 is above 1000$"),
    ("UViT-S", {"hidden": 2**63}, f"hidden={2**63} is above 65536$"),
    ("UViT-S", {"depth": 2.5}, r"depth=2.5 is not of the type int"),
    ("UViT-S", {"heads": 7}, "not divisible by heads=7"),
    ("UViT", {"depth": 4, "hidden": 512}, "of UViT: heads is missing"),
    ("SANA-tiny", {"interpolation_scale": ""}, "type float or None or int"),
    ("ViT", {"depth": 4}, "unknown denoiser 'ViT'; known are DiT-"),
  ],
)  # fmt: skip
def test_denoisers_that_cannot_be_are_refused(variant, fields, message):
  with pytest.raises(ValueError, match=message) as refused:
    denoisers.of_model(variant, fields)
  assert "\n" not in str(refused.value)


def test_a_text_encoder_of_ones_own_is_loaded(plugin, tmp_path, monkeypatch):
  plugin("my_text_encoder")
  config = {"model_type": "words", "vocab_size": 40, "hidden_size": 16}
  monkeypatch.setitem(tiny_text_encoders.CONFIGS, "words", config)
  folder = tiny_text_encoders.save(tmp_path / "words", "words")
  encoder = dcae_jax.load_text_encoder(folder, max_tokens=8)
  states, mask = encoder.encode(["a bus", "sub"])
  assert encoder.kind == "words" and states.shape == (2, 8, 16)
  np.testing.assert_array_equal(states[0, 4], states[1, 0])  # both are "s"
  assert mask.sum() == 5 + 3 + 2


def test_a_task_of_ones_own_runs_from_another_directory(
  examples, photographs, tmp_path
):
  """As an installed command does, which does not look where it is called."""
  found = subprocess.run(
    [sys.executable, "-P", "-m", "dcae_jax.main", "--config=my_task.py",
     f"--workdir={tmp_path}", f"--config.source.path={photographs}"],
    cwd=examples,
    env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    capture_output=True,
    text=True,
    check=False,
  )  # fmt: skip
  assert found.returncode == 0, found.stderr
  result = json.loads((tmp_path / "result.json").read_text())
  assert result == {"animals": 6, "places": 6}
  recorded = json.loads((tmp_path / "config.json").read_text())
  assert recorded["plugins"] == ["my_task"] and recorded["max_images"] == 0


def test_keys_of_a_task_of_ones_own_are_checked(plugin):
  c = plugin("my_task").get_config()
  keys.check(c)
  c.max_images = -1
  with pytest.raises(ValueError, match=r"config.max_images=-1 is below 0"):
    keys.check(c)
  c.max_image = 3
  with pytest.raises(ValueError, match=r"did you mean config.max_images\?"):
    keys.check(c)


def test_tasks_of_several_runs_pass_plugins_on(tmp_path):
  """So that the runs that they leave say what they need."""
  mine = ("my_module",)
  phases = base.three_phases("tiny-f8")
  phases.plugins = mine
  workdir = epath.Path(tmp_path)
  chained = train_phases.chained(phases, workdir)
  parts = [chained.phase1, chained.phase2, chained.phase3, chained.report]
  both = base.export_and_diffuse()
  both.plugins = mine
  chained = export_and_diffuse.chained(
    both, workdir, metric_networks.Opened({}, {}, {})
  )
  parts += [x for x in chained.values() if isinstance(x, ConfigDict)]
  arms = base.study()
  arms.plugins, arms.base, arms.arms = mine, base.phase1("tiny-f8"), {"a": {}}
  parts.append(study.of_arm(arms, "a"))
  assert len(parts) == 4 + 5 + 1
  assert all(part.plugins == mine for part in parts)
  for config in (phases, both, arms):
    keys.check(config)
    config.plugins = (3,)
    with pytest.raises(ValueError, match=r"config.plugins=\[3\] is of the wro"):
      keys.check(config)


def test_plugins_of_parts_are_imported_too(plugin, examples):
  plugin("my_variant")
  config = {"phase1": {"plugins": ("my_nothing",)}, "plugins": ("my_variant",)}
  with pytest.raises(ValueError, match="'my_nothing'"):
    config_files.import_plugins(config)


def test_names_of_conditions_come_into_a_config(plugin):
  """Numbers of a condition need no keys of `configs/base.py`."""
  plugin("my_condition")
  c = base.latent_diffusion()
  c.model.variant = "Blend-small"
  rows = np.zeros((3, 5), np.float32)
  filled = denoising.with_numbers(c, "a store", (2, 2, 16), rows, ())
  keys.check(filled)
  assert filled.model.condition.tint_channels == 5
  c = filled.copy_and_resolve_references()
  with pytest.raises(ValueError, match=r"tint_channels=5, but a store has 3"):
    denoising.with_numbers(c, "a store", (2, 2, 16), rows[:, :3], ())
