"""Export and training of a denoiser where latents have several shapes."""

import json
import logging
import pathlib
import shutil

import jax
import numpy as np
import pytest
import sized
from conftest import MITE
from etils import epath
from PIL import Image

import dcae_jax
from configs import base
from dcae_jax import errors
from dcae_jax.data import crops, sources
from dcae_jax.diffusion.denoisers import families
from dcae_jax.latents import aspect_ratios, reader
from dcae_jax.tasks import export_latents, train_diffusion


@pytest.fixture(scope="module")
def patched():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sources.KINDS, "sized", sized.folder)
    patch.setitem(families.DENOISERS["DiT"].sizes, "mite", MITE)
    yield


def _export(photographs, tiny_autoencoder, output, **changes):
  c = base.export_latents()
  c.init_from, c.output = str(tiny_autoencoder), str(output)
  c.source = base.source("sized", str(photographs))
  c.resolution, c.max_aspect_ratio, c.least_images = 32, 4.0, 3
  c.dtype, c.threads, c.compilation_cache = "float32", 2, ""
  c.update_from_flattened_dict(changes)
  return c


@pytest.fixture(scope="module")
def exported(photographs, tiny_autoencoder, patched, tmp_path_factory):
  root = tmp_path_factory.mktemp("shapes")
  config = _export(photographs, tiny_autoencoder, root / "latents")
  assert export_latents.run(config, epath.Path(root / "run"))
  return root / "latents"


def _opened(path):
  return aspect_ratios.opened(
    str(path), lambda path, count: reader.Latents(path), 1
  )


def test_each_image_is_in_the_store_of_its_shape(
  exported, photographs, tiny_autoencoder
):
  described = json.loads((exported / "aspect_ratios.json").read_text())
  latents = _opened(exported)
  assert len(latents.stores) == len(described["stores"]) >= 2
  assert len(latents) == 12 and latents.shape == (4, 4, 16)
  result = json.loads((exported.parent / "run/result.json").read_text())
  assert result["count"] == 12 and result["latents"] == str(exported)
  folder, seen = sized.folder(str(photographs)), {}
  for store, name in zip(latents.stores, described["stores"], strict=True):
    height, width = map(int, name.split("x"))
    assert store.shape == (height // 8, width // 8, 16)
    seen |= {
      key: (store.read_unscaled([i])[0], (height, width))
      for i, key in enumerate(store.keys())
    }
  assert set(seen) == {folder.key(i) for i in range(12)}
  key = folder.key(11)
  latent, size = seen[key]
  with Image.open(pathlib.Path(photographs) / key) as image:
    pixels = np.asarray(crops.dm_crop(image.convert("RGB"), size))
  ae = dcae_jax.load(tiny_autoencoder)
  expected = ae.encode(pixels[None] / 127.5 - 1.0)[0]
  np.testing.assert_allclose(latent, expected, atol=1e-4)


def test_an_export_that_was_cut_off_goes_on(
  exported, photographs, tiny_autoencoder, tmp_path
):
  """Before its last store was finished, and the list of stores written."""
  copy = tmp_path / "latents"
  shutil.copytree(exported, copy)
  names = json.loads((copy / "aspect_ratios.json").read_text())["stores"]
  (copy / "aspect_ratios.json").unlink()
  shutil.rmtree(copy / names[-1])
  with pytest.raises(errors.UserError, match="no latent store"):
    _opened(copy)
  config = _export(photographs, tiny_autoencoder, copy)
  assert export_latents.run(config, epath.Path(tmp_path / "run"))
  expected = _opened(exported).manifest["shards"]
  assert _opened(copy).manifest["shards"] == expected


def _take(latents, n, start=0, **options):
  batches = latents.batches(seed=1, prepare={}, **options)
  batches.set_state(batches.get_state() | {"next_batch": start})
  found = [next(batches) for _ in range(n)]
  batches.close()
  return found


def test_batches_of_latents_have_one_shape_for_any_number_of_processes(
  exported,
):
  latents = _opened(exported)
  whole = _take(latents, 12, batch_size=2)
  shapes = {x["latents"].shape[1:] for x in whole}
  assert shapes == set(latents.shapes) and len(shapes) > 1
  shares = [
    _take(latents, 12, batch_size=1, process_index=i, process_count=2)
    for i in range(2)
  ]
  later = _take(latents, 5, start=7, batch_size=2, workers=1)
  for key in ("latents", "labels"):
    for i, batch in enumerate(whole):
      both = np.concatenate([share[i][key] for share in shares])
      np.testing.assert_array_equal(both, batch[key])
    for a, b in zip(later, whole[7:], strict=True):
      np.testing.assert_array_equal(a[key], b[key])


def test_conditions_are_those_of_the_images_of_all_stores(exported):
  """What is made of them is told which image of all stores it is."""
  latents = _opened(exported)
  labels = latents.condition("labels")
  assert sorted(labels) == [0] * 6 + [1] * 6
  seen = set()

  def check(rows, images, uniforms):
    seen.update(images.tolist())
    np.testing.assert_array_equal(rows, labels[images])
    return rows

  batches = latents.batches(seed=1, batch_size=2, prepare={"labels": check})
  for _ in range(12):
    next(batches)
  batches.close()
  assert len(seen) > 9


@pytest.fixture
def training(exported, tiny_diffusion, patched):
  """The config of a run on two devices of one, of batches of two."""
  defaults = {
    "latents": str(exported), "model.variant": "DiT-mite", "batch_size": 2,
    "mesh.data": 2, "steps": 6,
  }  # fmt: skip
  with pytest.MonkeyPatch.context() as patch:
    two = jax.devices()[:2]
    patch.setattr(jax, "devices", lambda *args: two)
    yield lambda **changes: tiny_diffusion(**(defaults | changes))


def test_a_denoiser_learns_at_all_shapes_and_goes_on_exactly(
  training, tmp_path, caplog
):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  with caplog.at_level(logging.INFO):
    assert train_diffusion.run(training(), epath.Path(whole))
  lines = [x.getMessage() for x in caplog.records]
  programs = [x for x in lines if x.startswith("compiling the training step")]
  assert 2 <= len(set(programs)) == len(programs) <= 6
  for steps in (3, 6):
    assert train_diffusion.run(training(steps=steps), epath.Path(parts))
  a, b = (
    jax.tree.leaves(dcae_jax.load_denoiser(run).variables)
    for run in (whole, parts)
  )
  for x, y in zip(a, b, strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize(
  ("changes", "message"),
  [({"model.variant": "UViT-mite"}, "learned positions"),
   ({"model.variant": "DiT-mite", "model.patch_size": 2}, "patch size"),
   ({"batch_size": 64}, "use a smaller config.batch_size")],
)  # fmt: skip
def test_what_cannot_learn_at_all_shapes_is_refused(
  training, tmp_path, changes, message
):
  with pytest.raises(errors.UserError, match=message):
    train_diffusion.run(training(**changes), epath.Path(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_stores_of_different_exports_are_refused(exported, tmp_path):
  copy = tmp_path / "latents"
  shutil.copytree(exported, copy)
  first = json.loads((copy / "aspect_ratios.json").read_text())["stores"][0]
  stores = [reader.Latents(path) for path in sorted(copy.glob("*x*"))]
  stores[1].manifest["scaling_factor"] = 7.0
  with pytest.raises(errors.UserError, match="different exports: scaling_fac"):
    aspect_ratios.LatentsOfShapes(copy, stores)
  (copy / "aspect_ratios.json").write_text(json.dumps({"stores": [first]}))
  with pytest.raises(errors.UserError, match=r"aspect_ratios\.json"):
    _opened(copy)


def test_squares_are_not_exported_among_shapes_nor_shapes_among_squares(
  exported, photographs, tiny_autoencoder, tiny_latents, tmp_path
):
  squares = shutil.copytree(tiny_latents, tmp_path / "squares")
  for output, most in ((exported, 1.0), (squares, 4.0)):
    config = _export(
      photographs, tiny_autoencoder, output, max_aspect_ratio=most
    )
    with pytest.raises(errors.UserError, match="holds an export of s"):
      export_latents.run(config, epath.Path(tmp_path / f"{most}"))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"source.kind": "folder"}, r"config\.max_aspect_ratio needs the sizes"),
    ({"max_aspect_ratio": 1.1}, "leaves no shape but the square"),
    ({"class_per_image": True}, "max_aspect_ratio=4.0 needs images"),
  ],
)
def test_exports_that_cannot_have_shapes_are_refused(
  photographs, tiny_autoencoder, patched, tmp_path, changes, message
):
  config = _export(
    photographs, tiny_autoencoder, tmp_path / "latents", **changes
  )
  with pytest.raises(errors.UserError, match=message):
    export_latents.run(config, epath.Path(tmp_path / "run"))
  assert not (tmp_path / "latents").exists()
