"""The evaluation as a user runs it, and its report."""

import csv
import itertools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import html_pages
import jax
import jax.numpy as jnp
import kills
import numpy as np
import pytest
import scipy.linalg
import skimage.metrics
from conftest import (
  REPOSITORY,
  run_main,
  said_made,
  save_tiny_autoencoder,
  smooth_image,
)
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

import dcae_jax
from configs import base
from dcae_jax.data import crops
from dcae_jax.evaluation import fid
from dcae_jax.evaluation.networks import inception, lpips
from dcae_jax.evaluation.report import distributions, evaluation_report
from dcae_jax.runs import work_directory
from dcae_jax.setup import evaluations
from dcae_jax.tasks import (
  evaluate_autoencoder,
  reference_statistics,
  train_autoencoder,
)

RESOLUTION = 32


@pytest.fixture(scope="module")
def weights_folder(tmp_path_factory):
  """A tiny autoencoder whose shortcuts make it reconstruct something."""
  return save_tiny_autoencoder(tmp_path_factory.mktemp("tiny") / "weights")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """Eleven images and two that cannot be read."""
  root = tmp_path_factory.mktemp("pictures")
  for i in range(11):
    name = f"{i:02d}.png" if i < 10 else "9\x1b.png"
    Image.fromarray(smooth_image(i, 40 + 5 * i, 90 - 4 * i)).save(root / name)
  (root / "03_broken.jpg").write_bytes(b"no picture")
  (root / "99_broken.png").write_bytes(b"")
  return root


@pytest.fixture(scope="module")
def config(pictures, weights_folder, compilation_cache):
  """A function: the evaluation of the tiny one, PSNR and SSIM alone."""

  def create(**changes) -> ConfigDict:
    c = base.evaluate()
    c.init_from = str(weights_folder)
    c.source = base.source("folder", str(pictures))
    c.resolutions = (RESOLUTION,)
    c.metrics = ()
    c.batch_size = 8
    c.samples, c.extremes = 3, 1
    c.compilation_cache = compilation_cache
    c.update_from_flattened_dict(changes)
    return c

  return create


def _run(config, workdir):
  workdir = epath.Path(workdir)
  evaluate_autoencoder.run(config, workdir)
  return json.loads((workdir / "result.json").read_text())


@pytest.fixture(scope="module")
def of_two_images(config, tmp_path_factory):
  """A finished evaluation that no test may change."""
  workdir = tmp_path_factory.mktemp("evaluation") / "out"
  _run(config(max_images=2), workdir)
  return workdir


@pytest.fixture(scope="module")
def workdir(
  weights_folder, pictures, inception_weights, compilation_cache,
  tmp_path_factory,
):  # fmt: skip
  """Everything, from the command line."""
  workdir = tmp_path_factory.mktemp("evaluation") / "out"
  found = run_main(
    "configs/f64_evaluate.py",
    f"--config.init_from={weights_folder}",
    f"--config.source.path={pictures}",
    f"--config.resolutions=({RESOLUTION},)",
    f"--config.weights.rfid={inception_weights}",
    "--config.batch_size=5",
    "--config.samples=3",
    "--config.extremes=2",
    f"--config.compilation_cache={compilation_cache}",
    f"--workdir={workdir}",
  )
  assert found.returncode == 0, found.stderr
  assert "11 of 13 images" in found.stderr
  assert "rFID" in found.stderr
  of_images = f"images, {RESOLUTION} px"
  assert said_made(found.stderr) == {"page", "pictures", of_images, "result"}
  assert "fewer than 2048" in found.stderr
  return workdir


def _crops(pictures, side=RESOLUTION):
  for file in sorted(pictures.glob("??.png")):
    with Image.open(file) as image:
      yield np.asarray(crops.dm_crop(image.convert("RGB"), side))


def test_result_holds_the_row_of_the_papers_table(
  workdir, pictures, weights_folder, inception_weights
):
  """Each number again, image by image, by other means."""
  result = json.loads((workdir / "result.json").read_text())
  found = result["resolutions"][str(RESOLUTION)]
  ae = dcae_jax.load(weights_folder)
  expected = {"psnr": [], "ssim": [], "lpips": []}
  perceptual = lpips.load_parameters("alexnet")
  perceptual_distance = jax.jit(
    lambda a, b: lpips.distance(perceptual, a, b, "alexnet")[0]
  )
  latents, pixel_pairs = [], []
  for pixels in _crops(pictures):
    latents.append(np.asarray(ae.encode(pixels[None])))
    y = np.asarray(ae.decode(latents[-1]))[0]
    y = np.clip(np.round(y * 127.5 + 127.5), 0, 255).astype(np.uint8)
    pixel_pairs.append((pixels, y))
    expected["psnr"].append(
      skimage.metrics.peak_signal_noise_ratio(pixels, y, data_range=255)
    )
    expected["ssim"].append(
      skimage.metrics.structural_similarity(
        pixels, y, channel_axis=-1, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, data_range=255,
      )
    )  # fmt: skip
    a, b = (jnp.asarray(x[None] / 127.5 - 1, jnp.float32) for x in (pixels, y))
    expected["lpips"].append(float(perceptual_distance(a, b)))
  assert found["images"] == 11 and found["images_skipped"] == 2
  for name, values in expected.items():
    assert found[name] == pytest.approx(np.mean(values), rel=1e-3), name
  parameters = inception.load(str(inception_weights)).parameters
  pooled = jax.jit(lambda x: inception.features(parameters, x)[0])
  features = [
    np.asarray(pooled(jnp.asarray(x, jnp.float32)))
    for x in map(np.stack, zip(*pixel_pairs, strict=True))
  ]
  covariances = [np.cov(x.astype(float), rowvar=False) for x in features]
  # The square root of their product, in the space that the images span.
  basis = scipy.linalg.orth(np.concatenate(features).T.astype(float))
  inside = [basis.T @ x @ basis for x in covariances]
  trace = np.trace(sum(covariances))
  trace -= 2 * np.trace(scipy.linalg.sqrtm(inside[0] @ inside[1]).real)
  apart = np.sum(np.square(features[0].mean(0) - features[1].mean(0)))
  assert found["rfid"] == pytest.approx(apart + trace, rel=1e-3)
  assert found["frechet_efficientnet_lite0"] > 0
  z = np.concatenate(latents)
  latent = found["latent"]
  assert latent["scaling_factor"] == pytest.approx(1 / latent["rms"])
  assert latent["rms"] == pytest.approx(np.sqrt(np.mean(z**2)), rel=1e-4)
  np.testing.assert_allclose(
    latent["channels"]["std"], z.std((0, 1, 2)), rtol=1e-3
  )
  with (workdir / f"images_{RESOLUTION}px.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [pathlib.Path(row["name"]).name for row in rows] == sorted(
    file.name.replace("\x1b", "\\x1b") for file in pictures.glob("??.png")
  )
  for name, values in expected.items():
    found = [float(row[name]) for row in rows]
    np.testing.assert_allclose(found, values, rtol=1e-2, atol=1e-3)


def test_result_says_how_it_was_measured(workdir, weights_folder):
  result = json.loads((workdir / "result.json").read_text())
  assert list(result["resolutions"]) == [str(RESOLUTION)]
  assert result["autoencoder"]["variant"] == "tiny-f8"
  assert result["autoencoder"]["spatial_compression"] == 8
  assert "dm_crop" in result["crop"] and result["config"]["dtype"] == "float32"
  assert result["files"] == 13 and result["config"]["batch_size"] == 5
  assert result["reference"] == "the originals"
  used = result["metric_weights"]
  assert used["lpips"]["sha256"] == lpips.NETWORKS["alexnet"].sha256
  assert used["lpips"]["is_published"] and not used["rfid"]["is_published"]
  assert len(result["autoencoder"]["weights_sha256"]) == 64
  assert {"jax", "flax", "python"} <= result["versions"].keys()


def _check_page(workdir):
  """Everything it refers to is there, and nothing is on the network."""
  return html_pages.read(workdir / "report" / "index.html").text


def test_report_opens_from_disk(workdir):
  text = _check_page(workdir)
  for words in ("rFID", "Worst PSNR", "Best PSNR", "Latent channels", "<svg"):
    assert words in text
  assert text.count("<figure") == 3 + 2 + 2
  assert "not the published file" in text  # of the random Inception


def test_report_has_the_numbers_beside_it_wherever_it_is_moved(
  workdir, pictures, weights_folder, tmp_path
):
  shutil.copytree(workdir / "report", tmp_path / "moved")
  page = html_pages.read(tmp_path / "moved" / "index.html")
  numbers = sorted(x for x in page.links if x.startswith("numbers/"))
  table, result = (tmp_path / "moved" / x for x in numbers)
  assert table.read_bytes() == (workdir / "images_32px.csv").read_bytes()
  assert result.read_bytes() == (workdir / "result.json").read_bytes()
  found = json.loads(result.read_bytes())
  assert f"from {weights_folder}" in page.text and "tiny-f8, " in page.text
  assert f"folder, path {pictures}: 13 files" in page.text
  ours = found["versions"]["dcae_jax"].removeprefix("a clone ")
  assert f"dcae_jax {ours}, jax" in page.text


def test_dots_have_names_where_images_are_few(workdir, tmp_path, monkeypatch):
  runs = evaluation_report.read([epath.Path(workdir)])
  page = (workdir / "report" / "index.html").read_text()
  assert page.count("<circle") == 3 * 11 and "00.png: " in page
  monkeypatch.setattr(distributions, "FEWEST_IN_BINS", 11)
  evaluation_report.write(epath.Path(tmp_path / "report"), runs)
  page = (tmp_path / "report" / "index.html").read_text()
  assert page.count("<polyline") == 3 and "<circle" not in page


def test_several_resolutions_in_one_run(config, tmp_path):
  found = _run(config(resolutions=(RESOLUTION, 64)), tmp_path / "out")
  assert list(found["resolutions"]) == [str(RESOLUTION), "64"]
  low, high = found["resolutions"].values()
  assert low["images"] == high["images"] == 11
  assert low["psnr"] != high["psnr"]
  text = _check_page(tmp_path / "out")
  assert "4 x 4 x 16" in text and "8 x 8 x 16" in text


_ONE_OF_TWO = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from configs import base
from etils import epath
from dcae_jax.tasks import evaluate_autoencoder
c = base.evaluate()
c.init_from, c.source.path, c.resolutions = sys.argv[3], sys.argv[4], (32,)
c.metrics = ("frechet_efficientnet_lite0",)
c.batch_size, c.samples, c.extremes = 4, 3, 1
evaluate_autoencoder.run(c, epath.Path(sys.argv[5]))
"""


def test_two_processes_find_what_one_finds(
  config, weights_folder, pictures, tmp_path
):
  """Each reads its share; 13 files are no multiple of anything."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  flags = os.environ["XLA_FLAGS"].replace("count=8", "count=1")
  logs = [(tmp_path / f"{i}.log").open("w+") for i in range(2)]
  processes = [
    subprocess.Popen(
      [
        sys.executable, "-c", _ONE_OF_TWO, address, str(i),
        str(weights_folder), str(pictures), str(tmp_path / "two"),
      ],
      cwd=REPOSITORY,
      env=os.environ | {"XLA_FLAGS": flags},
      stderr=log,
    )
    for i, log in enumerate(logs)
  ]  # fmt: skip
  try:
    for process, log in zip(processes, logs, strict=True):
      assert process.wait(timeout=300) == 0, pathlib.Path(log.name).read_text()
  finally:
    for process, log in zip(processes, logs, strict=True):
      process.kill()
      process.wait()
      log.close()
  two = json.loads((tmp_path / "two" / "result.json").read_text())
  metrics = ("frechet_efficientnet_lite0",)
  one = _run(config(metrics=metrics), tmp_path / "one")
  one, two = (x["resolutions"][str(RESOLUTION)] for x in (one, two))
  assert two["images"] == one["images"] == 11
  assert two["images_skipped"] == 2
  for name in ("psnr", "ssim", *metrics):
    assert two[name] == pytest.approx(one[name], rel=1e-4)
  tables = [
    (tmp_path / name / "images_32px.csv").read_text().splitlines()
    for name in ("one", "two")
  ]
  names = [[line.split(",")[:2] for line in table] for table in tables]
  assert names[0] == names[1] and len(names[0]) == 1 + 11
  assert two["latent"]["rms"] == pytest.approx(one["latent"]["rms"], rel=1e-5)
  assert two["histograms"] == one["histograms"]
  _check_page(tmp_path / "two")


def test_metrics_without_weights_are_absent_by_name(
  config, tmp_path, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
  metrics = ("rfid", "frechet_efficientnet_lite0")
  result = _run(config(metrics=metrics, max_images=5), tmp_path / "out")
  found = result["resolutions"][str(RESOLUTION)]
  assert found["rfid"] is None
  assert "curl" in found["absent"]["rfid"]
  assert found["frechet_efficientnet_lite0"] > 0
  assert found["images"] == 4  # one of the first five cannot be read
  text = _check_page(tmp_path / "out")
  assert "absent" in text and "curl" in text


def test_one_image_has_no_distance_but_all_the_rest(config, tmp_path):
  metrics = ("frechet_efficientnet_lite0",)
  result = _run(config(metrics=metrics, max_images=1), tmp_path / "out")
  found = result["resolutions"][str(RESOLUTION)]
  assert found["images"] == 1 and found["psnr"] > 0
  assert found["frechet_efficientnet_lite0"] is None
  reason = found["absent"]["frechet_efficientnet_lite0"]
  assert "at least 2 images, not 1" in reason


def test_reconstructions_stand_beside_their_own_originals(
  config, pictures, tmp_path
):
  """The second of three images is another one."""
  others = tmp_path / "others"
  others.mkdir()
  for i, name in enumerate(("00.png", "05.png", "02.png")):
    (others / f"{i}.png").write_bytes((pictures / name).read_bytes())
  settings = {"extremes": 0, "max_images": 3}
  first, second = tmp_path / "first", tmp_path / "second"
  _run(config(**settings), first)
  _run(
    config(
      **settings, **{"source.path": str(others), "compare": (str(first),)}
    ),
    second,
  )
  text = _check_page(second)
  assert text.count("<figure") == 2 + 2  # 0 and 2 together, 1 and 1 apart
  errors = [
    np.asarray(Image.open(file)).mean()
    for file in (second / "report" / "pictures").glob("*_error.png")
  ]
  assert len(errors) == 6 and max(errors) < 2 * min(errors)
  assert "<b>images</b>" in text and "do not compare" in text
  page = html_pages.read(second / "report" / "index.html")
  assert len(page.tables[0]) == 3 and not page.bold[0]


def test_runs_are_compared_whether_measured_before_or_not(
  config, tmp_path, weights_folder
):
  """Space to channel is of one's own run; others stay what they are."""
  first = tmp_path / "first"
  before = _run(config(space_to_channel=2, name="<f16>"), first)
  assert before["autoencoder"]["spatial_compression"] == 16
  second = tmp_path / "second"
  compare = (str(first), str(weights_folder))
  changes = {"variant": "tiny-f8", "seed": 1, "space_to_channel": 4}
  result = _run(config(init_from="", compare=compare, **changes), second)
  other = json.loads((second / "compared" / "1" / "result.json").read_text())
  size = str(RESOLUTION)
  # Space to channel changes latents, not pictures.
  assert other["resolutions"][size]["psnr"] == pytest.approx(
    before["resolutions"][size]["psnr"], rel=1e-4
  )
  assert result["resolutions"][size]["psnr"] != pytest.approx(
    before["resolutions"][size]["psnr"], rel=1e-4
  )
  text = _check_page(second)
  assert "&lt;f16&gt;" in text and "<f16>" not in text
  names = ("tiny-f8, initial values", "&lt;f16&gt;", "weights")
  assert all(name in text for name in names)
  assert "1 x 1 x 256" in text
  assert "2 x 2 x 64" in text and "4 x 4 x 16" in text
  assert "do not compare" not in text
  assert text.count("<figure") == 3 + 3 * 2  # together; extremes of each
  # Alone, finished evaluations need neither images nor weights.
  third = tmp_path / "third"
  evaluate_autoencoder.run(
    config(init_from="", compare=(str(first), str(second))), epath.Path(third)
  )
  assert "initial values" in _check_page(third)


@pytest.mark.parametrize("trained", [False, True])
def test_the_floor_stands_beside_what_is_measured(
  trained, config, photographs, tiny_config, tmp_path
):
  """Fitted on what the run was trained on, or else on the measured images."""
  changes = {"compare": ("block_pca",), "space_to_channel": 2}
  name = "floor: block PCA (fitted on these images)"
  if trained:
    train_autoencoder.run(tiny_config(1, steps=1), epath.Path(tmp_path / "run"))
    changes["init_from"] = str(tmp_path / "run")
    name = "floor: block PCA"
  result = _run(config(**changes), tmp_path / "out")
  found = json.loads((tmp_path / "out/compared/0/result.json").read_text())
  assert found["name"] == name
  compression, channels = (4, 16) if trained else (16, 64)
  for described in (found["autoencoder"], result["autoencoder"]):
    assert described["spatial_compression"] == compression
    assert described["latent_channels"] == channels
  ours, theirs = (x["resolutions"][str(RESOLUTION)] for x in (result, found))
  assert theirs["psnr"] > ours["psnr"] + 3 and theirs["images"] == 11
  assert theirs["ssim"] > ours["ssim"]
  side = RESOLUTION // compression
  page = html_pages.read(tmp_path / "out" / "report" / "index.html")
  assert f"{side} x {side} x {channels}" in page.text
  heads, *_ = page.tables[0]
  best = [heads.index(x) for x in ("PSNR, dB ↑", "SSIM ↑")]
  assert page.bold[0] == [(2, column) for column in best]
  # As any finished evaluation, it can stand beside others.
  again = config(init_from="", compare=(str(tmp_path / "out/compared/0"),))
  evaluate_autoencoder.run(again, epath.Path(tmp_path / "again"))
  assert name in _check_page(tmp_path / "again")


def test_the_floor_can_be_fitted_on_other_images(config, photographs, tmp_path):
  changes = {"compare": ("block_pca",), "max_images": 3}
  distances = []
  for i, source in enumerate(("", str(photographs))):
    changes["fit_source.path"] = source
    changes["fit_source.kind"] = "folder" if source else ""
    _run(config(**changes), tmp_path / f"{i}")
    found = json.loads((tmp_path / f"{i}/compared/0/result.json").read_text())
    assert found["name"].endswith("block PCA") == bool(source)
    distances.append(found["resolutions"][str(RESOLUTION)]["psnr"])
  assert distances[0] > distances[1]


def test_reference_statistics_are_computed_saved_and_read(
  config, workdir, pictures, inception_weights, tmp_path, compilation_cache,
  caplog,
):  # fmt: skip
  c = base.reference_statistics()
  c.source = base.source("folder", str(pictures))
  c.resolutions = (RESOLUTION,)
  c.batch_size = 8
  c.weights = str(inception_weights)
  c.compilation_cache = compilation_cache
  caplog.set_level("INFO")
  reference_statistics.run(c, epath.Path(tmp_path / "reference"))
  assert said_made(caplog.text) == {f"inception, {RESOLUTION} px", "result"}
  file = tmp_path / "reference" / f"inception_{RESOLUTION}px.npz"
  mean, covariance, features, _ = fid.load_statistics(file, 2048)
  assert features.shape == (11, 2048)
  np.testing.assert_allclose(features.mean(0), mean, rtol=1e-5)
  assert mean.shape == (2048,)
  # The rank of 2048 columns is that of a few mixtures of them.
  mixtures = np.random.default_rng(0).normal(size=(2048, 20))
  assert np.linalg.matrix_rank(covariance @ mixtures) == 10  # 11 images
  record = json.loads((tmp_path / "reference/result.json").read_text())
  assert record["images"] == {str(RESOLUTION): 11}
  c.features = 3  # of the first, the middle and the last image of 13 files
  reference_statistics.run(c, epath.Path(tmp_path / "few"))
  few = fid.load_statistics(tmp_path / "few" / file.name, 2048).features
  np.testing.assert_allclose(few[0], features[0], rtol=1e-5)
  assert 1 <= len(few) < 3  # some of the three cannot be read
  settings = {"metrics": ("rfid",), "weights.rfid": str(inception_weights)}
  path = str(file).replace(str(RESOLUTION), "{resolution}")
  with_reference = _run(config(**settings, reference=path), tmp_path / "a")
  with_originals = json.loads((workdir / "result.json").read_text())
  distances = [
    result["resolutions"][str(RESOLUTION)]["rfid"]
    for result in (with_originals, with_reference)
  ]
  assert distances[0] == pytest.approx(distances[1], rel=1e-4)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"init_from": ""}, "init_from is empty"),
    ({"variant": "f32c32"}, "exclude each other"),
    ({"init_from": "", "variant": "f33"}, "unknown variant 'f33'"),
    ({"init_from": "nowhere/at/all"}, "nowhere"),
    ({"resolutions": ()}, "resolutions is empty"),
    ({"resolutions": (36,)}, "side 36 in config.* not divisible by 8"),
    ({"resolutions": (32,), "space_to_channel": 3}, "not divisible by 24"),
    ({"resolutions": (8,)}, "below 11"),
    ({"resolutions": (24,), "metrics": ("lpips",)}, "below 31"),
    ({"metrics": ("fid",)}, "unknown metric 'fid'.*rfid, psnr"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"samples": 0}, "samples=0"),
    ({"seed": 2**70}, "seed=1180591620717411303424"),
    ({"resolutions": ("32",)}, r"resolutions=\['32'\] is of the wrong form"),
    ({"resolutions": (2**40,)}, "image side 1099511627776"),
    ({"source.weight": float("inf")}, "config.source.weight=inf"),
    ({"dtype": "float16"}, "unknown dtype"),
    ({"compare": ("nowhere/else",)}, "nowhere/else"),
    ({"init_from": "", "compare": ("block_pca",)}, "set one of them"),
    (
      {"compare": ("block_pca",), "fit_source.kind": "folder"},
      "config.fit_source.path is empty",
    ),
    ({"weights.rfid": "no.pth", "metrics": ("rfid",)}, "no.pth"),
    ({"reference": "x.npz"}, "rfid, which is not among"),
    ({"source.path": "/nowhere"}, "/nowhere cannot be listed"),
    ({"source.kind": "mixture"}, "not from a mixture"),
    ({"mesh.data": 3}, "mesh"),
    ({"mesh.data": 1, "mesh.spatial": 8, "resolutions": (36,)}, "divisible"),
  ],
)
def test_bad_configs_are_refused_before_anything_is_written(
  changes, message, config, tmp_path
):
  with pytest.raises(ValueError, match=message):
    _run(config(**changes), tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_a_reference_for_several_resolutions_names_them(
  config, inception_weights, tmp_path
):
  changes = {
    "metrics": ("rfid",),
    "weights.rfid": str(inception_weights),
    "resolutions": (32, 64),
    "reference": "one.npz",
  }
  with pytest.raises(ValueError, match="one file for several"):
    _run(config(**changes), tmp_path / "out")
  assert not (tmp_path / "out").exists()
  changes["resolutions"] = (32,)
  with pytest.raises(ValueError, match=r"no file one\.npz"):
    _run(config(**changes), tmp_path / "out")


def test_a_directory_of_something_else_is_left_alone(config, tmp_path):
  (tmp_path / "report").mkdir()
  (tmp_path / "report" / "mine.txt").write_text("mine")
  with pytest.raises(ValueError, match="holds report of something else"):
    _run(config(), tmp_path)
  assert (tmp_path / "report" / "mine.txt").exists()


@pytest.mark.parametrize("damage", ["result", "row", "picture", "latents"])
def test_damaged_evaluations_are_refused_before_anything_is_measured(
  damage, of_two_images, config, tmp_path
):
  first, second = tmp_path / "first", tmp_path / "second"
  shutil.copytree(of_two_images, first)
  result = json.loads((first / "result.json").read_text())
  pictures = first / "pictures" / f"{RESOLUTION}px"
  if damage == "result":
    (first / "result.json").write_text("{")
  elif damage == "row":
    del result["resolutions"][str(RESOLUTION)]["latent"]
    (first / "result.json").write_text(json.dumps(result))
  elif damage == "picture":
    (pictures / "0000000_reconstruction.png").unlink()
  else:
    (pictures / "latents.png").write_bytes(b"")
  with pytest.raises(ValueError, match="not a whole evaluation"):
    _run(config(compare=(str(first),)), second)
  assert not second.exists()


def test_a_failing_run_leaves_the_evaluation_before_it(
  config, of_two_images, tmp_path, monkeypatch
):
  files = lambda: {
    file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()
  }
  shutil.copytree(of_two_images, tmp_path, dirs_exist_ok=True)
  before = files()
  decode = dcae_jax.Autoencoder.apply
  broken = lambda *args, method: jnp.nan * decode(*args, method=method)
  monkeypatch.setattr(dcae_jax.Autoencoder, "apply", broken)
  with pytest.raises(FloatingPointError, match="not finite"):
    _run(config(), tmp_path)
  assert files() == before
  monkeypatch.undo()
  (tmp_path / "images_48px.csv").write_text("of a resolution before")
  after = _run(config(max_images=3, samples=1), tmp_path)
  assert after["resolutions"][str(RESOLUTION)]["images"] == 3
  assert [file.name for file in tmp_path.glob("*.csv")] == [
    f"images_{RESOLUTION}px.csv"
  ]
  shown = {file.name[:7] for file in (tmp_path / "pictures").rglob("0*.png")}
  assert len(shown) <= 3  # the first, the worst, the best: none of before
  _check_page(tmp_path)


def test_an_evaluation_is_not_compared_with_what_it_replaces(
  config, of_two_images
):
  for replaced in (of_two_images, of_two_images / "compared" / "0"):
    with pytest.raises(ValueError, match="written anew"):
      _run(config(compare=(str(replaced),)), of_two_images)


def _files(folder):
  return {
    str(file.relative_to(folder)): file.read_bytes()
    for file in sorted(pathlib.Path(folder).rglob("*"))
    if file.is_file()
  }


def test_a_kill_at_any_moment_leaves_one_evaluation_or_none(
  config, of_two_images, weights_folder, tmp_path, monkeypatch
):
  """At each change of a file in turn: old, new, or without its result."""
  made = []
  publish = evaluations.publish

  def keep(part, workdir, names):
    made.append(names)
    shutil.copytree(part, tmp_path / "made")
    publish(part, workdir, names)

  monkeypatch.setattr(evaluations, "publish", keep)
  compare = (str(weights_folder),)
  _run(config(compare=compare, max_images=1, extremes=0), tmp_path / "new")
  monkeypatch.undo()
  (names,) = made
  new, workdir = _files(tmp_path / "new"), epath.Path(tmp_path / "out")
  for begun, step in ((True, 1), (False, 5)):
    for number in itertools.count(step=step):
      shutil.rmtree(workdir, ignore_errors=True)
      workdir.mkdir()
      if begun:
        shutil.copytree(of_two_images, workdir, dirs_exist_ok=True)
        (workdir / ".result.json.1.tmp").write_text("half")
      old = _files(workdir)
      with kills.kill(workdir, number) as left:
        publish(epath.Path(tmp_path / "made"), workdir, names)
      found = _files(workdir)
      if left():
        assert found == new
        break
      whole = found in (old, new)
      assert whole or "result.json" not in found, number
      if "report/index.html" in found and begun:
        page = found["report/index.html"]
        assert page in (old["report/index.html"], new["report/index.html"])
      work_directory.check_nothing_foreign(
        workdir, ("pictures", "report", "compared")
      )
      publish(epath.Path(tmp_path / "made"), workdir, names)
      assert _files(workdir) == new
    assert number > 20


@pytest.mark.parametrize("number", [1, 40])
def test_a_killed_evaluation_is_finished_by_the_next_start(
  number, config, of_two_images, tmp_path
):
  shutil.copytree(of_two_images, tmp_path, dirs_exist_ok=True)
  changes = config(max_images=1, samples=1, extremes=0)
  with kills.kill(tmp_path, number) as left:
    _run(changes, tmp_path)
  assert not left() and not (tmp_path / "result.json").exists()
  result = _run(changes, tmp_path)
  assert result["resolutions"][str(RESOLUTION)]["images"] == 1
  assert len(list((tmp_path / "pictures").rglob("*.png"))) == 3
  assert not list(tmp_path.rglob("*.tmp"))
  _check_page(tmp_path)
