"""A metric that is added to the table is everywhere where metrics are."""

import csv
import dataclasses
import functools
import json

import html_pages
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_clip
from etils import epath

from configs import base
from dcae_jax.evaluation import fid, metrics, set_measures
from dcae_jax.setup import metric_networks
from dcae_jax.tasks import (
  evaluate_autoencoder,
  evaluate_diffusion,
  reference_statistics,
  train_autoencoder,
  train_diffusion,
)


@pytest.fixture(scope="module")
def toys(plugin):
  """Those of docs/extend.md."""
  plugin("my_metrics")
  return ("largest_error", "colours")


@pytest.fixture
def evaluation(toys, tiny_autoencoder, photographs, compilation_cache):
  c = base.evaluate()
  c.init_from = str(tiny_autoencoder)
  c.source = base.source("folder", str(photographs))
  c.resolutions, c.metrics, c.batch_size = (32,), toys, 8
  c.samples, c.extremes = 2, 0
  c.compilation_cache = compilation_cache
  return c


def test_training_evaluates_it(toys, tiny_config, tmp_path):
  config = tiny_config(1, steps=1, **{"evaluation.metrics": toys})
  train_autoencoder.run(config, epath.Path(tmp_path))
  result = json.loads((tmp_path / "result.json").read_text())
  for key in toys:
    assert result[f"eval/{key}"] > 0 and result[f"floor/{key}"] > 0


def test_evaluations_have_it_in_result_table_and_page(
  evaluation, tmp_path, caplog
):
  caplog.set_level("INFO", "dcae_jax")
  evaluate_autoencoder.run(evaluation, epath.Path(tmp_path))
  result = json.loads((tmp_path / "result.json").read_text())
  found = result["resolutions"]["32"]
  assert found["largest_error"] > 0 and found["colours"] > 0
  assert sum(found["histograms"]["largest_error"]) == found["images"] == 12
  assert result["metric_weights"]["colours"]["sha256"] == "0"
  with (tmp_path / "images_32px.csv").open() as file:
    rows = list(csv.DictReader(file))
  mean = sum(float(row["largest_error"]) for row in rows) / len(rows)
  assert mean == pytest.approx(found["largest_error"])
  page = html_pages.read(tmp_path / "report" / "index.html")
  assert {"largest error ↓", "distance of colours ↓"} <= set(page.tables[0][0])
  assert "largest error ↓ | distance of colours ↓" in caplog.text
  for text in (caplog.text, page.text):
    assert f"{found['largest_error']:.1f}" in text
    assert f"{found['colours']:.3f}" in text
  assert "<b>largest error ↓ at 32 px</b>" in page.text  # its dots
  caption = found["pictures"]["samples"][0]["largest_error"]
  assert f"largest error {caption:.1f}" in page.text


def test_samples_are_measured_with_it(
  toys, evaluation, tiny_diffusion, compilation_cache, tmp_path
):
  """Those of sets; and it has reference statistics of its network."""
  c = base.reference_statistics()
  c.source, c.resolutions = evaluation.source, (32,)
  c.networks, c.batch_size = ("mean_colours", "efficientnet_lite0"), 8
  c.compilation_cache = compilation_cache
  reference_statistics.run(c, epath.Path(tmp_path / "reference"))
  run = tmp_path / "run"
  train_diffusion.run(tiny_diffusion(steps=1), epath.Path(run))
  c = base.evaluate_diffusion()
  c.init_from = str(run)
  c.samples, c.batch_size, c.guidance = 12, 8, (1.0,)
  c.metrics = ("frechet_efficientnet_lite0", "colours")
  c.reference = str(tmp_path / "reference" / "mean_colours_32px.npz")
  c.picture.classes = 0
  c.compilation_cache = compilation_cache
  with pytest.raises(ValueError, match=r"put \{network\} into it"):
    evaluate_diffusion.run(c, epath.Path(tmp_path / "samples"))
  c.reference = c.reference.replace("mean_colours", "{network}")
  evaluate_diffusion.run(c, epath.Path(tmp_path / "samples"))
  result = json.loads((tmp_path / "samples" / "result.json").read_text())
  assert result["absent"] == {}
  assert set(result["metric_weights"]) == set(c.metrics)
  found = result["guidance"]["1"]
  assert found["colours"] > 0 and found["frechet_efficientnet_lite0"] > 0
  c.metrics = ("largest_error",)
  with pytest.raises(ValueError, match="unknown metric 'largest_error'"):
    evaluate_diffusion.check(c)


def test_samples_are_measured_without_the_inception(
  toys, evaluation, tmp_path, monkeypatch
):
  """What lacks its weights is left out by name; all of them are an error."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
  c = base.evaluate_diffusion()
  fid.save_statistics(tmp_path / "mean_colours.npz", np.zeros(3), np.eye(3))
  c.reference = str(tmp_path / "{network}.npz")
  c.metrics = ("gfid", "colours")
  opened = evaluate_diffusion.open_metrics(c)
  references = evaluate_diffusion.open_references(c, opened)
  assert list(opened.metrics) == ["colours"]
  assert list(references) == ["mean_colours"]
  assert "curl" in opened.absent["gfid"]
  c.metrics = ("gfid",)
  with pytest.raises(ValueError, match="curl"):
    evaluate_diffusion.open_metrics(c)


@pytest.fixture
def tiny_network(monkeypatch, tmp_path):
  """CLIP's line in the table, with a small network."""
  network = dataclasses.replace(
    metrics.CLIP,
    load=lambda path: tiny_clip.weights(tmp_path),
    features=tiny_clip.SIZE.features,
  )
  metric = dataclasses.replace(metrics.METRICS["clip_score"], network=network)
  monkeypatch.setitem(metrics.METRICS, "clip_score", metric)


def test_the_clip_score_compares_each_image_with_its_prompt(tiny_network):
  opened = metric_networks.open_all(("clip_score",), subject="samples")
  images = np.random.default_rng(0).integers(0, 256, (5, 40, 30, 3))
  images = jnp.asarray(images, jnp.float32)
  prompts = np.array(["a cat", "no cat", "a dog"])
  texts = set_measures.describe_prompts(opened.metrics, opened.weights, prompts)
  describe = jax.jit(
    functools.partial(set_measures.describe, opened.metrics, opened.parameters)
  )
  scores = []
  for of_image in ([0, 1, 2, 0, 1], [1, 1, 0, 2, 0]):
    sets = set_measures.SetMeasures(opened.metrics, {})
    rows = jax.tree.map(lambda x, at=of_image: x[np.array(at)], texts)
    for part in (slice(0, 3), slice(3, 5)):
      seen = jax.device_get(describe(images[part]))
      of_part = jax.tree.map(lambda x, part=part: x[part], rows)
      sets.update(len(images[part]), seen, prompts=of_part)
    found, absent = sets.compute()
    assert not absent
    image = np.asarray(describe(images)["clip"]["features"], np.float64)
    text = texts["clip"]["prompts"][of_image].astype(np.float64)
    cosines = [
      a @ b / np.linalg.norm(a) / np.linalg.norm(b)
      for a, b in zip(image, text, strict=True)
    ]
    expected = np.mean([max(100 * cosine, 0) for cosine in cosines])
    assert found == {"clip_score": pytest.approx(expected, rel=1e-4)}
    scores.append(expected)
  assert abs(scores[0] - scores[1]) > 0.01


def test_the_clip_score_is_of_samples_with_prompts():
  metric_networks.check_known(("clip_score",), "samples", "config.metrics")
  with pytest.raises(ValueError, match="unknown metric 'clip_score'"):
    metric_networks.check_known(("clip_score",), "reconstructions", "key")
  message = "clip_score in config.metrics .* learned classes, not captions"
  asked = ("gfid", "clip_score")
  with pytest.raises(ValueError, match=message):
    metric_networks.check_without_prompts(asked, "config.metrics")
  metric_networks.check_without_prompts(asked[:1], "config.metrics")


def test_the_clip_score_without_weights_says_how_to_get_them(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  opened = metric_networks.open_all(("clip_score",), subject="samples")
  assert not opened.metrics
  assert "run: hf download" in opened.absent["clip_score"]
