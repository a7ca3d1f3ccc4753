import jax
import pytest

from configs import base
from dcae_jax.autoencoder import families, network, phases
from dcae_jax.training import freezing


@pytest.fixture(scope="module")
def parameters():
  model = families.create("tiny-f8")
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")
  return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def _learning(parameters, patterns):
  mask = freezing.trainable_mask(parameters, patterns)
  paths = freezing.parameter_paths(parameters)
  return [p for p, m in zip(paths, jax.tree.leaves(mask), strict=True) if m]


def test_phases_train_what_the_paper_names(parameters):
  everything = freezing.parameter_paths(parameters)
  for config, name, modules in [
    (base.phase1("f32c32"), "low_resolution_full_training", ("",)),
    (
      base.phase2("f32c32"),
      "high_resolution_latent_adaptation",
      ("encoder/project_out/", "decoder/project_in/"),
    ),
    (
      base.phase3("f32c32"),
      "low_resolution_local_refinement",
      ("decoder/project_out/",),
    ),
  ]:
    assert config.phase == name
    phase = phases.create(config.phase, config.trainable)
    expected = [p for p in everything if p.startswith(modules)]
    assert _learning(parameters, phase.trainable) == expected


def test_only_phase_1_moves_statistics_and_only_phase_3_is_adversarial():
  found = {
    name: (phase.moves_batch_statistics, phase.adversarial)
    for name, phase in phases.PHASES.items()
  }
  assert list(found.values()) == [(True, False), (False, False), (False, True)]


def test_patterns_are_modules_or_shell_patterns(parameters):
  assert _learning(parameters, ("decoder/stage_3",)) == _learning(
    parameters, ("decoder/stage_3/*",)
  )
  biases = _learning(parameters, ("*/bias",))
  assert biases and all(path.endswith("/bias") for path in biases)


def test_patterns_that_match_nothing_are_refused(parameters):
  with pytest.raises(ValueError, match=r"'decoder/head'.*decoder/project_out"):
    freezing.trainable_mask(parameters, ("decoder/project_in", "decoder/head"))
  with pytest.raises(ValueError, match="nothing would learn"):
    freezing.trainable_mask(parameters, ())


def test_unknown_phases_are_refused_with_the_known_ones():
  with pytest.raises(ValueError, match="low_resolution_full_training"):
    phases.create("phase2", ("*",))


def test_blocks_of_a_stage_may_learn_differently():
  shapes = network.abstract_variables(families.create("f32c32"), 3)["params"]
  alike = lambda *patterns: phases.blocks_learn_alike(
    freezing.trainable_mask(shapes, patterns)
  )
  assert alike("*") and alike("decoder/project_out")
  assert alike("encoder/stage_2", "decoder/*/norm/scale")
  assert not alike("decoder/stage_1/block_4")
  assert not alike("encoder/*/block_0/conv1/kernel")
