"""Pictures through an autoencoder, as a user runs it."""

import itertools
import json
import shutil

import kills
import numpy as np
import pytest
from conftest import run_main, save_tiny_autoencoder, smooth_image
from etils import epath
from PIL import Image

import dcae_jax
from configs import base
from dcae_jax.autoencoder import families, tiling
from dcae_jax.tasks import reconstruct


@pytest.fixture(scope="module")
def weights_folder(tmp_path_factory):
  """A tiny autoencoder with initial values, in the diffusers layout."""
  return save_tiny_autoencoder(tmp_path_factory.mktemp("tiny") / "weights")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """An upright and a turned one, one with alpha, one that is damaged."""
  root = tmp_path_factory.mktemp("pictures")
  (root / "more").mkdir()
  upright = Image.fromarray(smooth_image(0, 45, 70))
  upright.save(root / "a.png")
  exif = Image.Exif()
  exif[0x0112] = 6  # to be shown turned right by 90 degrees
  turned = upright.transpose(Image.Transpose.ROTATE_90)
  turned.save(root / "more" / "a.png", exif=exif)
  alpha = Image.fromarray(smooth_image(2, 33, 33)).convert("RGBA")
  alpha.putalpha(Image.new("L", alpha.size, 0))
  alpha.save(root / "b.png")
  (root / "c\x1b[2J|_c.jpg").write_bytes(b"no picture")
  return root


def test_pictures_are_written_side_by_side_with_their_psnr(
  weights_folder, pictures, tmp_path, compilation_cache
):
  found = run_main(
    "configs/reconstruct.py",
    f"--config.init_from={weights_folder}",
    f"--config.input={pictures}",
    f"--config.compilation_cache={compilation_cache}",
    f"--workdir={tmp_path / 'out'}",
  )
  assert found.returncode == 0, found.stderr
  assert "skipped" in found.stderr and r"c\x1b[2J|_c.jpg" in found.stderr
  assert "\x1b" not in found.stderr
  result = json.loads((tmp_path / "out" / "result.json").read_text())
  rows = {row["image"].removeprefix(f"{pictures}/"): row for row in (
    result["pictures"]
  )}  # fmt: skip
  assert list(rows) == ["a.png", "b.png", "more/a.png"]
  assert len(result["skipped"]) == 1
  summary = (tmp_path / "out" / "summary.md").read_text()
  assert r"c\\x1b\[2J\|\_c.jpg" in summary and "\x1b" not in summary
  for row in rows.values():
    assert f"{row['psnr']:.2f} dB" in summary
    assert row["reconstruction"] in summary.replace("\\", "")
    with Image.open(tmp_path / "out" / row["reconstruction"]) as made:
      assert made.size == (row["width"], row["height"])
    assert (tmp_path / "out" / row["file"]).exists()
  # The turned copy is the same picture once it is shown upright.
  assert rows["a.png"]["psnr"] == rows["more/a.png"]["psnr"]
  assert (rows["more/a.png"]["width"], rows["more/a.png"]["height"]) == (70, 45)
  ae = dcae_jax.load(weights_folder)
  original = smooth_image(0, 45, 70)
  y = np.asarray(ae.reconstruct(original[None], pad="reflect"))[0]
  y = np.clip(np.round(y * 127.5 + 127.5), 0, 255)
  psnr = 10 * np.log10(255**2 / np.mean((y - original) ** 2))
  np.testing.assert_allclose(rows["a.png"]["psnr"], psnr, rtol=1e-4)
  np.testing.assert_allclose(
    result["psnr"], np.mean([row["psnr"] for row in rows.values()])
  )
  with Image.open(tmp_path / "out" / rows["a.png"]["file"]) as picture:
    shown = np.asarray(picture)
  np.testing.assert_array_equal(shown[4:49, 4:74], original)
  assert any(
    np.array_equal(shown[4:49, left : left + 70], y)
    for left in range(74, shown.shape[1] - 69)
  )
  with Image.open(tmp_path / "out" / rows["a.png"]["reconstruction"]) as made:
    np.testing.assert_array_equal(np.asarray(made), y)


def _config(weights_folder, pictures, **changes):
  config = base.reconstruct()
  config.init_from, config.input = str(weights_folder), str(pictures)
  config.compilation_cache = ""
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"input": "/nothing/*.png"}, "is no image file, folder of images"),
    ({"input": ""}, "is no image file, folder of images"),
    ({"init_from": ""}, r"config\.init_from is empty"),
    ({"init_from": "/nowhere"}, "'/nowhere' is not the work directory"),
    ({"pad": "zero"}, "unknown pad"),
    ({"tile": 12}, "tile=12 is not a multiple of 8"),
    ({"tile": 8, "stride": 16}, "gaps"),
    ({"dtype": "float16"}, "unknown dtype 'float16'"),
    ({"shorter_side": -5}, "shorter_side=-5 is below 0"),
    ({"max_megapixels": 0.0}, "max_megapixels=0"),
  ],
)
def test_bad_input_is_refused_before_anything_is_written(
  weights_folder, pictures, tmp_path, changes, message
):
  config = _config(weights_folder, pictures, **changes)
  with pytest.raises(ValueError, match=message):
    reconstruct.run(config, epath.Path(tmp_path / "out"))
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["pictures", "reconstructions"])
def test_originals_are_never_written_over(folder, weights_folder, tmp_path):
  (tmp_path / folder).mkdir()
  picture = tmp_path / folder / "a.png"
  Image.fromarray(smooth_image(0, 16, 16)).save(picture)
  before = picture.read_bytes()
  config = _config(weights_folder, tmp_path)
  with pytest.raises(ValueError, match="would be written over"):
    reconstruct.run(config, epath.Path(tmp_path))
  assert not (tmp_path / "config.json").exists()
  assert picture.read_bytes() == before


def test_originals_anywhere_among_the_pictures_are_kept(
  weights_folder, tmp_path
):
  """What is there is removed at the next start."""
  own = tmp_path / "out/pictures/own"
  own.mkdir(parents=True)
  Image.fromarray(smooth_image(0, 16, 16)).save(own / "a.png")
  with pytest.raises(ValueError, match="would be written over"):
    reconstruct.run(_config(weights_folder, own), epath.Path(tmp_path / "out"))
  assert (own / "a.png").exists()


def test_a_kill_leaves_one_result_or_none(
  weights_folder, pictures, tmp_path, monkeypatch
):
  """At each change of a file in turn; the next start finishes it."""
  ae = dcae_jax.load(weights_folder)  # once, since it compiles
  monkeypatch.setattr(reconstruct.autoencoder, "load", lambda *_, **__: ae)

  def run(name, workdir):
    config = _config(weights_folder, pictures / name)
    reconstruct.run(config, epath.Path(workdir))

  def files(workdir):
    found = sorted(x for x in workdir.rglob("*") if x.is_file())
    return {str(x.relative_to(workdir)): x.read_bytes() for x in found}

  run("a.png", tmp_path / "old")
  run("b.png", tmp_path / "new")
  old, new = files(tmp_path / "old"), files(tmp_path / "new")
  for number in itertools.count():
    workdir = tmp_path / f"{number}"
    shutil.copytree(tmp_path / "old", workdir)
    with kills.kill(workdir, number) as left:
      run("b.png", workdir)
    if left():
      break
    assert (
      files(workdir) in (old, new) or not (workdir / "result.json").exists()
    ), number
    if number % 4 == 0:
      run("b.png", workdir)
      assert files(workdir) == new
  assert number > 8 and files(workdir) == new


def test_files_of_others_are_never_written_over(
  weights_folder, pictures, tmp_path
):
  (tmp_path / "summary.md").write_text("mine")
  with pytest.raises(ValueError, match=r"holds summary\.md of something else"):
    reconstruct.run(_config(weights_folder, pictures), epath.Path(tmp_path))
  assert (tmp_path / "summary.md").read_text() == "mine"


def test_each_picture_has_a_file_of_its_own():
  names = reconstruct._file_names(["a_2.png", "x/a.jpg", "y/a.png", "z/A.png"])
  assert len({name.casefold() for name in names}) == 4
  odd = ["x/a:b\n?.jpg", "My photo, über.v2.jpeg", ".jpg", "猫" * 84 + ".jpg"]
  names = reconstruct._file_names([*odd, "y/" + odd[-1]])
  assert names[:3] == ["a_b_n_.png", "My photo, über.v2.png", "_jpg.png"]
  assert max(len(name.encode()) for name in names) < 210
  assert len(set(names)) == 5


def test_patterns_and_single_files_are_found(
  weights_folder, pictures, tmp_path
):
  workdir = epath.Path(tmp_path / "out")
  for path, count in ((pictures / "b.png", 1), (pictures / "**" / "a.png", 2)):
    reconstruct.run(_config(weights_folder, path), workdir)  # anew each time
    result = json.loads((workdir / "result.json").read_text())
    assert len(result["pictures"]) == count


def test_tiles_are_used(weights_folder, pictures, tmp_path, monkeypatch):
  used = []
  create = tiling.Tiles.create

  def record(tile, stride, factor):
    used.append((tile, stride))
    return create(tile, stride, factor)

  monkeypatch.setattr(tiling.Tiles, "create", record)
  config = _config(weights_folder, pictures / "b.png", tile=32, stride=16)
  reconstruct.run(config, epath.Path(tmp_path / "out"))
  assert set(used) == {(32, 16)}


def test_only_damaged_pictures_are_an_error(weights_folder, pictures, tmp_path):
  config = _config(weights_folder, pictures / "c\x1b[2J|_c.jpg")
  with pytest.raises(ValueError, match="none of the 1 images can be used"):
    reconstruct.run(config, epath.Path(tmp_path / "out"))


def test_a_variant_of_ones_own_is_named_custom(weights_folder, tmp_path):
  ae = dcae_jax.load(weights_folder)
  assert ae.variant == "tiny-f8"
  own = families.to_config(ae.architecture, 3, 1.0)
  own["encoder_layers_per_block"][1] = 2
  assert families.name_of(families.from_config(own)[0]) == "custom"
