"""Samples of a diffusion model: drawn, written, measured, and drawn once."""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import signal

import jax
import kills
import numpy as np
import pytest
from conftest import MITE, fill_store, run_main, save_tiny_autoencoder
from etils import epath
from PIL import Image

import dcae_jax
from configs import base
from dcae_jax.autoencoder import streaming_moments
from dcae_jax.diffusion import conditioning
from dcae_jax.diffusion.denoisers import families as denoisers
from dcae_jax.evaluation import (
  fid,
  metrics,
  sample_metrics,
  samples,
  set_measures,
)
from dcae_jax.evaluation.networks import inception
from dcae_jax.latents import decode, reader
from dcae_jax.runs import metrics_writer, work_directory
from dcae_jax.tasks import evaluate_diffusion, train_diffusion
from dcae_jax.training import loop, sharding

SAMPLES, BATCH, SCALES = 12, 8, (1.0, 2.5)


@pytest.fixture(scope="module")
def trained(tiny_diffusion, tmp_path_factory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("trained") / "run"
  train_diffusion.run(tiny_diffusion(steps=2), epath.Path(workdir))
  return workdir


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> pathlib.Path:
  """Statistics of features such as no image has."""
  file = tmp_path_factory.mktemp("reference") / "random.npz"
  features = np.random.default_rng(1).normal(size=(20, inception.FEATURES))
  covariance = np.cov(features, rowvar=False)
  fid.save_statistics(file, features.mean(0), covariance, features)
  return file


@pytest.fixture(scope="module")
def config(trained, compilation_cache):
  """A function: twelve samples at each of two scales, not measured."""

  def create(**changes):
    c = base.evaluate_diffusion()
    c.init_from = str(trained)
    c.samples, c.batch_size, c.guidance = SAMPLES, BATCH, SCALES
    c.metrics = ()
    c.picture.classes = 0
    c.compilation_cache = compilation_cache
    c.update_from_flattened_dict(changes)
    return c

  return create


def _run(config, workdir) -> dict:
  assert evaluate_diffusion.run(config, epath.Path(workdir))
  return json.loads((pathlib.Path(workdir) / "result.json").read_text())


@pytest.fixture(scope="module")
def drawn(config, tmp_path_factory) -> pathlib.Path:
  """The samples of one scale; no test may change them."""
  workdir = tmp_path_factory.mktemp("drawn") / "out"
  _run(config(guidance=(2.5,)), workdir)
  return workdir


def _images(workdir, scale) -> dict[str, np.ndarray]:
  folder = pathlib.Path(workdir) / "images" / f"guidance_{scale:g}"
  return {
    file.name: np.asarray(Image.open(file))
    for file in sorted(folder.glob("*.png"))
  }


def _bytes(workdir) -> dict[str, bytes]:
  """What was drawn, by path."""
  root = pathlib.Path(workdir)
  files = itertools.chain(
    root.glob("images/*/*.png"), root.glob("parts/*/*.npz")
  )
  return {str(file.relative_to(root)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def measured(
  config, inception_weights, reference, tiny_latents, tmp_path_factory
):
  """All metrics, and a picture."""
  workdir = tmp_path_factory.mktemp("measured") / "out"
  c = config(
    metrics=("gfid", "inception_score", "precision_recall"),
    weights=str(inception_weights),
    reference=str(reference),
    **{"picture.classes": 2, "picture.latents": tiny_latents},
  )
  return workdir, _run(c, workdir)


def test_metrics_are_those_of_the_written_images(
  measured, inception_weights, reference
):
  """The records are the network's of the PNGs, the metrics of the records."""
  workdir, result = measured
  parameters = inception.load(str(inception_weights)).parameters
  described = jax.jit(lambda x: inception.features(parameters, x))
  statistics = fid.load_statistics(reference, inception.FEATURES)
  scale = SCALES[0]
  images = _images(workdir, scale)
  pixels = np.stack(list(images.values())).astype(np.float32)
  assert pixels.shape == (SAMPLES, 16, 16, 3)
  records = samples.read_records(
    epath.Path(workdir),
    samples.parts(scale, SAMPLES, BATCH),
    {k: metrics.METRICS[k] for k in ("gfid", "inception_score")},
  )
  rows = [record.described["inception"] for record in records]
  features = np.concatenate([row["features"] for row in rows])
  logits = np.concatenate([row["logits"] for row in rows])
  for recorded, direct in zip(
    (features, logits), jax.device_get(described(pixels)), strict=True
  ):
    spread = direct.std(axis=0).mean()  # over images
    assert abs(recorded - direct).max() < 0.3 * spread
  found = result["guidance"][f"{scale:g}"]
  moments = streaming_moments.Moments(inception.FEATURES)
  moments.update(features)
  assert found["gfid"] == pytest.approx(
    fid.frechet_distance(
      moments.mean, moments.covariance,
      statistics.mean, statistics.covariance,
    ),
    rel=1e-9,
  )  # fmt: skip
  mean, deviation = sample_metrics.inception_score(logits)
  assert found["inception_score"] == pytest.approx(mean, rel=1e-9)
  assert found["inception_score_deviation"] == pytest.approx(deviation)
  part = sample_metrics.precision_recall(statistics.features, features)
  assert (found["precision"], found["recall"]) == part
  distances = [found["gfid"] for found in result["guidance"].values()]
  assert distances[0] != distances[1]
  assert result["samples"] == SAMPLES and result["step"] == 2
  assert not result["metric_weights"]["gfid"]["is_published"]


def test_the_order_of_classes_does_not_matter_to_the_metrics(tmp_path):
  """Ten classes one after the other, each sure: an Inception Score of ten."""
  c = base.evaluate_diffusion()
  c.samples, c.batch_size = 1000, 300
  rng = np.random.default_rng(0)
  features = rng.normal(size=(2, 1000, inception.FEATURES)).astype(np.float32)
  labels = np.arange(1000) % 10
  logits = 100 * np.eye(inception.CLASSES, dtype=np.float32)[labels]
  for part in samples.parts(1.0, 1000, 300):
    rows = slice(part.first, part.first + part.rows)
    file = part.file(epath.Path(tmp_path), "parts")
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
      file,
      latent_rms=np.full(part.rows, 2.0),
      features=features[0, rows],
      logits=logits[rows],
    )
  mean, covariance = features[1].mean(0), np.cov(features[1], rowvar=False)
  reference = fid.Statistics(mean, covariance, features[1], "")
  sets = set_measures.SetMeasures(
    metrics.chosen(c.metrics, "samples"), {"inception": reference}
  )
  for record in samples.read_records(
    epath.Path(tmp_path),
    samples.parts(1.0, 1000, 300),
    metrics.chosen(c.metrics, "samples"),
  ):
    assert (record.latent_rms == 2.0).all()
    sets.update(len(record.latent_rms), record.described)
  found, absent = sets.compute()
  assert not absent
  assert 9.5 < found["inception_score"] <= 10
  assert found["gfid"] == pytest.approx(
    fid.frechet_distance(
      features[0].mean(0, dtype="f8"), np.cov(features[0], rowvar=False),
      mean, covariance,
    ),
    rel=1e-6,
  )  # fmt: skip
  assert (found["precision"], found["recall"]) == (
    sample_metrics.precision_recall(features[1], features[0])
  )


def test_classes_are_random_and_the_same_at_each_scale(measured):
  workdir, _ = measured
  names = [list(_images(workdir, scale)) for scale in SCALES]
  assert names[0] == names[1]
  labels = [int(name[:-4].rpartition("_")[2]) for name in names[0]]
  expected = [
    np.random.default_rng((0, part)).integers(3, size=BATCH, dtype=np.int32)
    for part in range(2)
  ]
  assert labels == np.concatenate(expected)[:SAMPLES].tolist()
  pixels = [_images(workdir, scale) for scale in SCALES]
  assert any((pixels[0][name] != pixels[1][name]).any() for name in names[0])


def test_there_is_a_picture_and_a_plot(measured):
  workdir, _ = measured
  picture = np.asarray(Image.open(workdir / "samples.png"))
  assert picture.shape[2] == 3
  # Two rows of 16 px; a column of training images, four for each scale.
  assert picture.shape[0] > 2 * 16 and picture.shape[1] > 9 * 16
  with Image.open(workdir / "guidance.png") as plot:
    assert plot.size[0] > 3 * 300  # three panels


def test_a_file_keeps_the_guidance_that_it_was_drawn_with(measured):
  workdir, _ = measured
  for scale in SCALES:
    file = next((workdir / "images" / f"guidance_{scale:g}").glob("*.png"))
    with Image.open(file) as image:
      assert image.text["guidance"] == f"{scale:g}"


def test_rows_of_a_picture_have_the_number_and_the_name_of_their_class():
  labels = conditioning.ClassLabels(3)
  names = ["cats", "dogs/big.jpg", "a"]
  condition = np.array([1, 0])
  assert labels.titles(condition, names) == ["1: big", "0: cats"]
  assert labels.titles(condition, ()) == ["class 1", "class 0"]


def test_the_command_line_draws_the_same_on_one_device(
  measured, config, tmp_path
):
  file = tmp_path / "evaluate.py"
  c = config(guidance=(2.5,), images="npz")
  file.write_text(
    "from configs import base\n"
    "from dcae_jax.diffusion.denoisers import families\n\n\n"
    f"families.DENOISERS['UViT'].sizes['mite'] = {MITE!r}\n\n\n"
    "def get_config():\n"
    "  c = base.evaluate_diffusion()\n"
    f"  c.update({ {k: v for k, v in c.to_dict().items() if k in _PLAIN}!r})\n"
    "  c.picture.classes = 0\n  return c\n"
  )
  found = run_main(str(file), f"--workdir={tmp_path / 'out'}")
  assert found.returncode == 0, found.stderr[-2000:]
  folder = tmp_path / "out" / "images" / "guidance_2.5"
  parts = [np.load(path) for path in sorted(folder.glob("*.npz"))]
  pixels = np.concatenate([part["arr_0"] for part in parts])
  labels = np.concatenate([part["arr_1"] for part in parts])
  images = _images(measured[0], 2.5)
  names = [f"{i:07d}_class_{label}.png" for i, label in enumerate(labels)]
  assert names == list(images)
  difference = pixels.astype(int) - np.stack(list(images.values()))
  assert abs(difference).max() <= 1


_PLAIN = (
  "init_from", "samples", "batch_size", "guidance", "metrics", "images",
  "compilation_cache",
)  # fmt: skip


def test_each_device_draws_its_own_samples(trained):
  """The program of a device has an eighth of the work."""
  c = base.evaluate_diffusion()
  run = work_directory.read_run_config(str(trained), "train_diffusion")
  model = evaluate_diffusion.open_model(c, run)
  mesh = sharding.local_mesh()
  whole, by_row = sharding.replicated(mesh), sharding.by_rows(mesh)
  variables = denoisers.abstract_variables(model.denoiser)
  flops = []
  for placed in (whole, by_row):
    sample = model.sample_function(2.0, placed)
    labels = jax.ShapeDtypeStruct((BATCH,), "int32", sharding=placed)
    arguments = (variables, jax.random.key(0), labels)
    program = jax.jit(sample, out_shardings=placed).lower(*arguments)
    flops.append(program.compile().cost_analysis()["flops"])
  assert flops[1] < 0.2 * flops[0]


class _Killed(BaseException):
  pass


def test_killed_anywhere_it_goes_on_and_ends_equal(
  drawn, config, tmp_path, monkeypatch
):
  """Each start dies at a later write; what is written is not drawn again."""
  written, limit, parts = [], [0], []

  def limited(original):
    def write(*arguments):
      written.append(arguments[0])
      if len(written) > limit[0]:
        raise _Killed
      original(*arguments)

    return write

  for name in ("write_whole", "write_png"):
    original = getattr(metrics_writer, name)
    monkeypatch.setattr(metrics_writer, name, limited(original))
  part = samples.Drawing.part
  monkeypatch.setattr(
    samples.Drawing, "part", lambda *a: parts.append(a[1]) or part(*a)
  )
  workdir, starts = tmp_path / "out", 0
  while not (workdir / "result.json").exists():
    assert starts < 10  # 12 images, two records, and four others
    limit[0], starts = 4 * starts, starts + 1
    written.clear()
    parts.clear()
    there = len(list(workdir.glob("parts/*/*.npz")))
    with contextlib.suppress(_Killed):
      evaluate_diffusion.run(config(guidance=(2.5,)), epath.Path(workdir))
    assert len(parts) <= 2 - there
  assert starts > 3
  assert _bytes(workdir) == _bytes(drawn)


def test_more_samples_and_scales_draw_only_what_is_missing(
  drawn, config, tmp_path, monkeypatch
):
  parts = []
  part = samples.Drawing.part
  monkeypatch.setattr(
    samples.Drawing, "part", lambda *a: parts.append(a[1]) or part(*a)
  )
  shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
  before = _bytes(tmp_path)
  result = _run(config(samples=20), tmp_path)
  assert [(x.scale, x.number, x.rows) for x in parts] == [
    (1.0, 0, 8), (1.0, 1, 8), (1.0, 2, 4), (2.5, 1, 8), (2.5, 2, 4)
  ]  # fmt: skip
  after = _bytes(tmp_path)
  del before["parts/guidance_2.5/000001_4.npz"]  # 000001_8.npz is in its place
  assert {k: after[k] for k in before} == before
  assert len(after) == 2 * (20 + 3)
  assert len(_images(tmp_path, 1.0)) == len(_images(tmp_path, 2.5)) == 20
  assert set(result["guidance"]) == {"1", "2.5"}


@pytest.mark.parametrize("number", [1, 12, -1])
def test_an_evaluation_that_is_killed_has_no_result(
  number, drawn, config, tmp_path
):
  """Nor has one that draws more; the next start finishes it."""
  more = config(guidance=(2.5,), samples=16, **{"picture.classes": 1})
  shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
  if number < 0:  # from the last change of a file
    most = 10**6
    with kills.kill(tmp_path, most) as left:
      _run(more, tmp_path)
    number += most - left()
    shutil.rmtree(tmp_path)
    shutil.copytree(drawn, tmp_path)
  with kills.kill(tmp_path, number) as left:
    _run(more, tmp_path)
  assert not left() and not (tmp_path / "result.json").exists()
  assert _run(more, tmp_path)["samples"] == 16
  assert len(_images(tmp_path, 2.5)) == 16
  assert (tmp_path / "samples.png").exists()
  assert not list(tmp_path.rglob("*.tmp"))


def test_fewer_samples_are_refused(config, tmp_path):
  """An outsider's tool would measure other images than ours."""
  _run(config(guidance=(2.5,), images="npz"), tmp_path)
  with pytest.raises(ValueError, match=r"more than config\.samples=8"):
    _run(config(guidance=(2.5,), images="npz", samples=8), tmp_path)
  _run(config(guidance=(2.5,), images="npz", samples=20), tmp_path)
  files = sorted(tmp_path.glob("images/*/*.npz"))
  assert [len(np.load(file)["arr_0"]) for file in files] == [8, 8, 4]


def test_chosen_classes_come_in_turn(config, tmp_path):
  _run(config(classes=(2, 0, 2), guidance=(1.0,)), tmp_path)
  labels = [int(n[:-4].rpartition("_")[2]) for n in _images(tmp_path, 1.0)]
  assert labels == [2, 0, 2] * 4
  images = list(_images(tmp_path, 1.0).values())
  assert (images[0] != images[BATCH]).any()  # each part has noise of its own


@pytest.mark.parametrize("normalisation", ["factor", "channels"])
def test_latents_are_decoded_as_the_autoencoder_has_them(
  normalisation, tiny_autoencoder, tiny_latents
):
  """With what the store's manifest multiplies and subtracts taken back."""
  store = reader.Latents(tiny_latents, normalisation=normalisation)
  description = decode.description(store) | {"shift_factor": 0.25}
  z = store.read(np.arange(BATCH))["latents"]
  drawing = samples.Drawing(
    {1.0: lambda variables, key, condition, null: z},
    lambda choices: (choices, None),
    {},
    samples.Decoder(dcae_jax.load(tiny_autoencoder), description),
    {},
    {},
    samples.Order(
      conditioning.ClassLabels(3),
      np.zeros(1, np.int32),
      (),
      at_random=False,
      batch_size=BATCH,
      seed=0,
    ),
  )
  found = drawing.part(samples.parts(1.0, BATCH, BATCH)[0])
  unscaled = z / description["scaling_factor"] + 0.25
  if normalisation == "channels":
    unscaled = store.read_unscaled(np.arange(BATCH))
  decoded = dcae_jax.load(tiny_autoencoder).decode(unscaled)
  expected = np.clip(np.round(np.asarray(decoded) * 127.5 + 127.5), 0, 255)
  difference = np.asarray(found["images"]).astype(float) - expected
  assert abs(difference).max() <= 1
  assert np.abs(expected - expected.mean()).max() > 10  # no flat pictures


def test_other_weights_do_not_mix_with_samples_that_are_there(
  config, trained, tiny_diffusion, tmp_path
):
  run = tmp_path / "run"
  shutil.copytree(trained, run)
  c = config(init_from=str(run), guidance=(1.0,))
  _run(c, tmp_path / "out")
  train_diffusion.run(tiny_diffusion(steps=3), epath.Path(run))
  with pytest.raises(ValueError, match=r"drawn otherwise \(weights_sha256"):
    evaluate_diffusion.run(c, epath.Path(tmp_path / "out"))


def test_classes_that_were_not_learned_are_not_drawn(
  tiny_autoencoder, tiny_diffusion, config, tmp_path
):
  labels = np.where(np.arange(48) % 2, 0, 2).astype(np.int32)  # none of 1
  store = fill_store(tmp_path / "store", tiny_autoencoder, labels, classes=3)
  run = tmp_path / "run"
  train_diffusion.run(tiny_diffusion(latents=store, steps=1), epath.Path(run))
  settings = {"init_from": str(run), "guidance": (1.0,), "images": "npz"}
  pictured = {"picture.classes": 3, "picture.latents": store}
  _run(config(**settings, **pictured), tmp_path / "out")
  files = (tmp_path / "out").glob("images/*/*.npz")
  drawn = np.concatenate([np.load(file)["arr_1"] for file in files])
  assert set(drawn.tolist()) == {0, 2}
  with pytest.raises(ValueError, match=r"class 1 in config\.classes had no"):
    _run(config(**settings, classes=(0, 1)), tmp_path / "other")


def test_what_is_gone_or_damaged_is_drawn_anew_or_named(
  drawn, config, tmp_path
):
  c = config(guidance=(2.5,))
  shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
  before = _bytes(tmp_path)
  next(tmp_path.glob("images/*/0000003_*.png")).unlink()
  _run(c, tmp_path)
  assert _bytes(tmp_path) == before
  record = next(tmp_path.glob("parts/*/000000_8.npz"))
  record.write_bytes(record.read_bytes()[:100])
  with pytest.raises(
    ValueError, match=r"000000_8\.npz is damaged .* remove it"
  ):
    _run(c, tmp_path)
  record.unlink()
  _run(c, tmp_path)
  assert _bytes(tmp_path) == before
  identity = tmp_path / "parts" / "identity.json"
  identity.write_text("[1]")
  with pytest.raises(ValueError, match=r"identity\.json is damaged"):
    _run(c, tmp_path)
  identity.unlink()
  with pytest.raises(ValueError, match=r"identity\.json is gone"):
    _run(config(guidance=(2.5,), seed=5), tmp_path)


def test_a_run_that_lacks_what_it_learned_is_named(trained, config, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(trained, run)
  described = json.loads((run / "latents.json").read_text())
  del described["rows_of_classes"]
  (run / "latents.json").write_text(json.dumps(described))
  with pytest.raises(ValueError, match=r"latents\.json .*'rows_of_classes'"):
    evaluate_diffusion.run(
      config(init_from=str(run)), epath.Path(tmp_path / "out")
    )


@pytest.mark.parametrize(
  ("file", "text", "message"),
  [
    (
      "latents.json",
      "[]",
      r"latents\.json is damaged: it is \[\], where",
    ),
    ("latents.json", '{"shape": 1}', r"latents\.json is damaged: it has no"),
    ("latents.json", {"shape": [1, 2]}, "shape has 2 items, not 3; bring it"),
    ("latents.json", {"classes": 3}, "classes is 3, where a list is expected"),
    ("latents.json", {"rows_of_shards": ["a"]}, r"rows_of_shards\[0\] is 'a'"),
    ("latents.json", {"autoencoder": {}}, r"it has no autoencoder\.init_from"),
    ("config.json", {"sampler": 1}, r"config\.json of .*: sampler is 1, where"),
    ("config.json", {"samples": {"count": "a"}}, r"samples\.count is 'a'"),
    (
      "config.json",
      '{"task": "train_diffusion", "model": 1}',
      r"config\.json is damaged: it has no steps",
    ),
  ],
)
def test_a_damaged_run_is_named(file, text, message, trained, config, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(trained, run)
  if isinstance(text, dict):
    text = json.dumps(json.loads((run / file).read_text()) | text)
  (run / file).write_text(text)
  with pytest.raises(ValueError, match=message):
    evaluate_diffusion.run(
      config(init_from=str(run)), epath.Path(tmp_path / "out")
    )


def test_sigterm_stops_between_parts(drawn, config, tmp_path, monkeypatch):
  sigterm = loop.Sigterm(each_alone=True)
  part = samples.Drawing.part

  def interrupted(self, wanted):
    os.kill(os.getpid(), signal.SIGTERM)
    return part(self, wanted)

  monkeypatch.setattr(samples.Drawing, "part", interrupted)
  workdir = epath.Path(tmp_path / "out")
  c = config(guidance=(2.5,))
  assert not evaluate_diffusion.run(c, workdir, sigterm)
  assert len(list(workdir.glob("parts/*/*.npz"))) == 1
  monkeypatch.undo()
  _run(c, workdir)
  assert _bytes(workdir) == _bytes(drawn)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"init_from": ""}, "not the work directory of an earlier run"),
    ({"guidance": (1.0, -0.5)}, "guidance scale -0.5 is negative"),
    ({"guidance": ()}, "config.guidance is empty"),
    ({"guidance": (1.0, 1.0)}, "names a scale twice"),
    ({"classes": (0, 3)}, "class 3 is not from 0 to 2"),
    ({"classes": (-1,)}, "class -1 is not from 0 to 2"),
    ({"samples": 0}, "config.samples=0 is below 1"),
    ({"sampler.steps": 10**6}, "1000000 steps are more than the 1000 of"),
    ({"batch_size": 12}, "config.batch_size=12 is not divisible by 8"),
    (
      {"images": "jpg"},
      "config.images='jpg' is not among 'png', 'npz', 'geneval'",
    ),
    ({"metrics": ("fid",)}, "unknown metric 'fid'.*gfid, inception_score"),
    ({"metrics": ("gfid",)}, "config.reference is empty"),
    (
      {"metrics": ("gfid",), "reference": "no.npz", "weights": "no.npz"},
      "no.npz",
    ),
    (
      {"metrics": ("inception_score",), "samples": 9},
      "config.samples=9 is below 10",
    ),
    ({"sampler.steps": 1}, "1 steps are too few for DPMSolver"),
    ({"sampler.interval": (9.0, 1.0)}, "interval"),
    ({"sampler.interval": (9.0,)}, "config.sampler.interval=.* two numbers"),
    ({"guidance": (float("inf"),)}, "inf is not a finite number"),
    ({"guidance": ("a",)}, r"guidance=\['a'\] is of the wrong form"),
    ({"sampler.kind": "euler"}, "Euler does not sample"),
    ({"autoencoder": "/nowhere"}, "cannot be loaded"),
    ({"compute_dtype": "float8"}, "float8"),
    (
      {"picture.classes": 1, "picture.latents": "/nowhere"},
      "is no latent store",
    ),
    ({"picture.columns": 0}, "config.picture.columns=0"),
  ],
)
def test_bad_input_is_refused_before_anything_is_written(
  changes, message, config, tmp_path
):
  with pytest.raises(ValueError, match=message):
    evaluate_diffusion.run(config(**changes), epath.Path(tmp_path / "out"))
  assert not (tmp_path / "out").exists()


def test_another_autoencoder_is_refused(config, tmp_path):
  other = save_tiny_autoencoder(tmp_path / "other", seed=1)
  with pytest.raises(ValueError, match="does not have the encoder"):
    evaluate_diffusion.run(
      config(autoencoder=str(other)), epath.Path(tmp_path / "out")
    )


def test_precision_needs_features_of_single_images(
  config, inception_weights, reference, tmp_path
):
  statistics = fid.load_statistics(reference, inception.FEATURES)
  file = tmp_path / "moments.npz"
  fid.save_statistics(file, statistics.mean, statistics.covariance)
  c = config(
    metrics=("precision_recall",),
    weights=str(inception_weights),
    reference=str(file),
  )
  with pytest.raises(ValueError, match=r"has features \[0, 2048\]"):
    evaluate_diffusion.run(c, epath.Path(tmp_path / "out"))
