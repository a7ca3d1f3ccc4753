import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import dcae_jax
from autoencoder.weights.test_conversion import random_tensors
from benchmarks import parity
from dcae_jax.autoencoder import arrays
from dcae_jax.autoencoder.weights import conversion


@pytest.fixture(scope="session")
def load_reduced(tmp_path_factory):
  """A function that loads a variant at reduced width, once."""
  loaded = {}

  def load(name):
    if name not in loaded:
      config = parity.reduced((parity.CONFIGS | parity.SD_VAES)[name])
      config = config | {"scaling_factor": 0.5}
      folder = tmp_path_factory.mktemp("reduced")
      file = folder / conversion.LAYOUTS["diffusers"]
      safetensors.numpy.save_file(random_tensors(config, "diffusers"), file)
      (folder / "config.json").write_text(json.dumps(config))
      loaded[name] = dcae_jax.load(folder)
    return loaded[name]

  return load


@pytest.fixture(scope="module")
def ae(load_reduced):
  return load_reduced("f32c32")


def _images(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (*shape, 3)).astype(np.uint8)


# Attention has its other form in those that have it in other ways.
ALL_SIZES = ("f32c32", "f32c32-sana", "attention in the last stages")


@pytest.mark.parametrize("name", [*parity.CONFIGS, *parity.SD_VAES])
def test_outputs_are_the_stored_ones_of_diffusers(load_reduced, name):
  autoencoder = load_reduced(name)
  sizes = parity.sizes(autoencoder.spatial_compression)
  stored = np.load(parity.STORED)
  for case in sizes if name in ALL_SIZES else ("few positions",):
    shape = sizes[case]
    z, y = (stored[f"{name}/{case}/{part}"] for part in "zy")
    found = autoencoder.encode(parity.random_images(shape))
    assert parity.relative_error(found, z) < 1e-4
    found = autoencoder.decode(z)[:, ::11, ::11]
    assert parity.relative_error(found, y) < 1e-4


def test_attributes_describe_the_model(ae):
  assert ae.variant == "custom"
  assert ae.spatial_compression == 32 and ae.latent_channels == 8
  assert ae.scaling_factor == 0.5 and ae.image_channels == 3
  z = ae.encode(_images(2, 64, 32))
  assert isinstance(z, jax.Array) and z.shape == (2, 2, 1, 8)
  assert ae.decode(z).shape == (2, 64, 32, 3)
  direct = ae.model.apply(ae.variables, ae.decode(z), method="encode")
  assert direct.shape == z.shape


def test_kinds_of_arrays_give_the_same_latents(ae):
  images = _images(1, 32, 32)
  floats = images / np.float32(127.5) - 1
  expected = ae.encode(images)
  for same in (floats, floats.astype("float64"), jnp.asarray(floats)):
    np.testing.assert_array_equal(ae.encode(same), expected)
  np.testing.assert_array_equal(ae.encode(jnp.asarray(images)), expected)


def test_a_size_is_traced_once_whatever_the_variables(ae):
  again = dcae_jax.Autoencoder(ae.architecture, ae.variables)
  images = _images(2, 64, 96)
  z = again.encode(images)
  again.decode(z)
  again.encode(images[::-1])
  again.variables = jax.tree.map(lambda x: x / 2, ae.variables)
  assert np.abs(again.encode(images) - z).max() > 1e-3
  again.reconstruct(np.tile(images, (1, 2, 2, 1)), tile=96)
  assert again._encode._cache_size() == again._decode._cache_size() == 2
  # Parameters are no constants of the program.
  args = again.variables, jnp.zeros((2, 64, 96, 3))
  assert len(again._encode.lower(*args).as_text()) < 1e6


def test_its_text_tells_what_it_is(ae):
  assert repr(ae) == (
    "Autoencoder(custom: 32x spatial compression, 3 image channels, "
    "8 latent channels, 4,045,460 parameters)"
  )


def test_floats_that_look_like_0_to_1_warn_once(ae):
  ae = dcae_jax.Autoencoder(ae.architecture, ae.variables)
  pixels = _images(2, 32, 32)
  wrong = pixels / np.float32(255)
  for fine in (
    pixels,
    wrong * 2 - 1,
    np.stack([wrong[0], -wrong[1]]),  # one of them is dark
    np.zeros((1, 32, 32, 3), "float32"),
    np.ones((1, 32, 32, 3), "float32"),
  ):
    ae.encode(fine)  # a warning would be an error
  with pytest.warns(UserWarning, match=r"expected \[-1, 1\].* images \* 2 - 1"):
    z = ae.encode(wrong)
  np.testing.assert_array_equal(ae.encode(wrong), z)


def test_batches_share_few_compilations(ae):
  images = _images(19, 32, 32)
  together = ae.encode(images)
  before = ae._encode._cache_size()
  for n in (1, 2, 3, 4, 5, 6, 7, 8, 19):
    np.testing.assert_allclose(
      ae.encode(images[:n]), together[:n], rtol=1e-4, atol=1e-5
    )
  assert ae._encode._cache_size() - before <= 4  # 1, 2, 4, 8; 16 and 4 were


def test_padding_fills_sides_and_is_cut_off(ae):
  images = _images(1, 40, 70)
  with pytest.raises(ValueError, match=r'32 or 64, or pad with pad="reflect"'):
    ae.encode(images)
  for pad in ("reflect", "edge"):
    filled = np.pad(images, [(0, 0), (0, 24), (0, 26), (0, 0)], mode=pad)
    z = ae.encode(images, pad=pad)
    np.testing.assert_array_equal(z, ae.encode(filled))
    y = ae.decode(z, size=(40, 70))
    assert y.shape == images.shape
    np.testing.assert_array_equal(ae.reconstruct(images, pad=pad), y)
  assert ae.encode(_images(1, 3, 5), pad="reflect").shape == (1, 1, 1, 8)
  with pytest.raises(ValueError, match="unknown pad='zero'"):
    ae.encode(images, pad="zero")
  for size in ((99, 1), (0, 8)):
    with pytest.raises(ValueError, match="is not a height and a width"):
      ae.decode(z, size=size)


def test_tiles_reconstruct_images_larger_than_one(ae):
  images = _images(2, 96, 160)
  whole = ae.reconstruct(images)
  tiled = ae.reconstruct(images, tile=64, stride=32)
  assert tiled.shape == whole.shape
  np.testing.assert_array_equal(ae.encode(images, tile=160), ae.encode(images))
  # The first tile's corner is that of the tile alone.
  z = ae.encode(images, tile=64, stride=64)
  np.testing.assert_allclose(
    z[:, :1, :2], ae.encode(images[:, :64, :64])[:, :1], rtol=1e-4, atol=1e-5
  )
  assert z.shape == (2, 3, 5, 8)
  for tile in (50, -32):
    with pytest.raises(ValueError, match="multiple of 32"):
      ae.encode(images, tile=tile)
  odd = images[:, :90, :150]
  padded = ae.reconstruct(odd, pad="reflect", tile=64, stride=32)
  assert padded.shape == odd.shape


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (_images(32, 32), r"3 axes \[32, 32, 3\], not 4.*images\[None\]"),
    (np.zeros((1, 3, 32, 32), "float32"), r"transpose\(0, 2, 3, 1\)"),
    (np.zeros((1, 32, 32, 1), "float32"), "1 channels, and this autoencoder 3"),
    (np.zeros((1, 32, 32, 4), "uint8"), "composite the alpha"),
    (np.zeros((0, 32, 32, 3), "float32"), "empty"),
    (np.zeros((1, 0, 32, 3), "uint8"), "empty"),
    (_images(1, 32, 32).astype("float32"), "as uint8, or scale them"),
    (np.full((1, 32, 32, 3), 1.1, "float32"), "clip them"),
    (np.full((1, 32, 32, 3), np.nan, "float32"), "not finite"),
    (np.full((1, 32, 32, 3), np.inf, "float32"), "not finite"),
    (np.zeros((1, 32, 32, 3), "int64"), "int64; uint8, or float in"),
    (np.zeros((1, 32, 32, 3), bool), "bool; uint8, or float in"),
    (_images(1, 32, 32).astype("int32"), r"images\.astype\(np\.uint8\)$"),
    (np.zeros((1, 32, 32, 1), "uint8"), r"np\.repeat\(images, 3, axis=-1\)$"),
    (
      np.zeros((1, 1, 32, 32), "uint8"),
      r"repeat\(images\.transpose\(0, 2, 3, 1\), 3, axis=-1\)$",
    ),
    (np.zeros((1, 32, 32), "uint8"), r"repeat\(images\[\.\.\., None\], 3"),
    (np.zeros((32, 32, 1), "uint8"), r"np\.repeat\(images\[None\], 3, axis"),
    (np.zeros((32, 32), "uint8"), r"repeat\(images\[None, \.\.\., None\], 3"),
    (np.zeros((3, 32, 32), "uint8"), r"images\.transpose\(1, 2, 0\)\[None\]$"),
    (np.zeros((32, 32, 4), "uint8"), "composite the alpha"),
    (np.zeros((1, 1, 32, 32, 3), "uint8"), r"not 4, \[b, h, w, c\]$"),
  ],
)
def test_bad_images_are_refused(ae, images, message):
  with pytest.raises(ValueError, match=message):
    ae.encode(images)


@pytest.mark.parametrize(
  ("z", "message"),
  [
    (np.zeros((1, 1, 8), "float32"), r"z\[None\]"),
    (np.zeros((1, 8, 2, 2), "float32"), r"transpose\(0, 2, 3, 1\)"),
    (np.zeros((1, 2, 2, 4), "float32"), "4 channels, and this autoencoder 8"),
    (np.zeros((8, 2, 2), "float32"), r"z\.transpose\(1, 2, 0\)\[None\]"),
    (np.zeros((1, 2, 2, 8), "uint8"), "latents are uint8; float, as encode"),
    (np.full((1, 2, 2, 8), np.nan, "float32"), "not finite"),
    (np.zeros((0, 2, 2, 8), "float32"), "empty"),
  ],
)
def test_bad_latents_are_refused(ae, z, message):
  with pytest.raises(ValueError, match=message):
    ae.decode(z)


@pytest.mark.parametrize(
  ("images", "message"),
  [
    ("photo.png", r"'photo\.png', no array.*open\(path\)\.convert\(\"RGB"),
    (pathlib.Path("photo.png"), "Path.'photo.png'.*read files first"),
    (["a.png", "b.png"], r"\['a\.png', 'b\.png'\], no array"),
    (
      Image.new("L", (32, 32)),
      r'one PIL image.*np\.asarray\(image\.convert\("RGB"\)\)\[None\]$',
    ),
    ([_images(32, 32), _images(64, 32)], "differ in size.*each size in turn"),
  ],
)
def test_what_is_no_array_is_refused(images, message):
  with pytest.raises(ValueError, match=message):
    arrays.checked_images(images, 3)
  with pytest.raises(ValueError, match=r"'a', no array.*encode returned"):
    arrays.checked_latents("a", 8, None)


def test_what_is_said_of_grey_images_makes_them_fit():
  """Of a network for grey ones, and of one for colours."""
  for channels in (1, 3):
    for shape in ((8, 9), (1, 8, 9), (5, 8, 9), (8, 9, 1), (5, 1, 8, 9)):
      images = np.zeros(shape, "uint8")
      with pytest.raises(ValueError, match="images") as caught:
        arrays.checked_images(images, channels)
      code = re.search(r"(?:np|images)[.\[]\S*(?: \S+)*$", str(caught.value))
      fits = eval(code[0], {"np": np, "images": images})
      assert fits.shape == (5 if 5 in shape else 1, 8, 9, channels)
      arrays.checked_images(fits, channels)


def test_tracers_are_sent_to_the_module(ae):
  with pytest.raises(ValueError, match=r"use ae\.model\.apply"):
    jax.jit(ae.encode)(jnp.zeros((1, 32, 32, 3)))


def test_first_channels_decode_alone(load_reduced, ae):
  ordered = load_reduced("f32c128-1.5")
  images = _images(1, 64, 64)
  z = ordered.encode(images, channels=5)
  np.testing.assert_array_equal(z, ordered.encode(images)[..., :5])
  y = ordered.decode(z, channels=5)
  np.testing.assert_array_equal(
    y, ordered.decode(ordered.encode(images), channels=5)
  )
  # The projection sliced to these channels, as the models were trained.
  kernel = ordered.variables["params"]["decoder"]["project_in"]["conv"]
  sliced = jax.tree.map(lambda x: x, ordered.variables)
  sliced["params"]["decoder"]["project_in"]["conv"] = {
    "kernel": kernel["kernel"][:, :, :5],
    "bias": kernel["bias"],
  }
  expected = ordered.model.apply(sliced, z, method="decode")
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match=r"DC-AE 1\.5"):
    ae.encode(images, channels=5)
  with pytest.raises(ValueError, match="channels=99 is not from 1 to 16"):
    ordered.decode(z, channels=99)
  with pytest.raises(ValueError, match="5 channels, and this autoencoder 16"):
    ordered.decode(z)


def test_scaling_factor_is_one_over_the_rms(load_reduced, tmp_path):
  autoencoder = load_reduced("f32c32-lite")
  for i in range(11):
    Image.fromarray(_images(64, 64, seed=i)).save(tmp_path / f"{i:02d}.png")
  (tmp_path / "broken.png").write_bytes(b"no image")
  found = autoencoder.measure_scaling_factor(tmp_path, resolution=64)
  images = np.stack([_images(64, 64, seed=i) for i in range(11)])
  rms = np.sqrt(np.mean(np.square(autoencoder.encode(images), dtype="f8")))
  np.testing.assert_allclose(found, 1 / rms, rtol=1e-5)
  batches = (images[i : i + 4] for i in range(0, 11, 4))
  again = autoencoder.measure_scaling_factor(batches)
  np.testing.assert_allclose(again, found, rtol=1e-5)
  assert autoencoder.scaling_factor == again
  with pytest.raises(ValueError, match="no images"):
    autoencoder.measure_scaling_factor([])
  with pytest.raises(ValueError, match="not divisible by 32"):
    autoencoder.measure_scaling_factor(tmp_path, resolution=50)


def test_saved_folder_has_a_card_and_loads_again(load_reduced, tmp_path):
  autoencoder = load_reduced("f64c128-1.5")
  for layout in conversion.LAYOUTS:
    autoencoder.save(tmp_path / layout, layout=layout)
    card = (tmp_path / layout / "README.md").read_text()
    assert "Scaling factor: 0.5 (of " in card and "64 times" in card
    again = dcae_jax.load(tmp_path / layout)
    assert again.scaling_factor == 0.5
    images = _images(1, 64, 64)
    np.testing.assert_array_equal(
      again.encode(images), autoencoder.encode(images)
    )
    assert sorted(p.name for p in (tmp_path / layout).iterdir()) == sorted(
      [conversion.LAYOUTS[layout], "README.md", "config.json"]
    )
  autoencoder.save(tmp_path / "original", layout="original")  # once more
  (tmp_path / "project").mkdir()
  (tmp_path / "project" / "README.md").write_text("of something else")
  with pytest.raises(ValueError, match=r"README\.md of something else"):
    autoencoder.save(tmp_path / "project")
  with pytest.raises(ValueError, match=r"already holds model\.safetensors"):
    autoencoder.save(tmp_path / "original", layout="diffusers")
  with pytest.raises(ValueError, match="unknown layout 'torch'"):
    autoencoder.save(tmp_path / "new", layout="torch")
  with pytest.raises(ValueError, match="not a local folder"):
    autoencoder.save("gs://bucket/new")
  assert not (tmp_path / "new").exists()


def test_unknown_scaling_factor_must_be_measured_before_saving(ae, tmp_path):
  unknown = dcae_jax.Autoencoder(ae.architecture, ae.variables)
  with pytest.raises(ValueError, match="measure it first"):
    unknown.save(tmp_path / "x")
  for bad in (0.0, -1, 1j, float("nan")):
    with pytest.raises(ValueError, match="not a positive number"):
      unknown.scaling_factor = bad
  unknown.scaling_factor = 1 / jnp.float32(4)
  unknown.save(tmp_path / "set")
  card = (tmp_path / "set" / "README.md").read_text()
  assert "Scaling factor: 0.25 (given)" in card
  without = dcae_jax.Autoencoder(
    ae.architecture,
    ae.variables,
    scaling_factor=1.0,
    residual_autoencoding=False,
  )
  with pytest.raises(ValueError, match="without residual shortcuts"):
    without.save(tmp_path / "x")
  assert not (tmp_path / "x").exists()


def test_other_numbers_are_not_computed_with(ae):
  for dtype in ("float16", "int8", "abc"):
    with pytest.raises(ValueError, match=f"unknown dtype '{dtype}'"):
      dcae_jax.Autoencoder(ae.architecture, ae.variables, dtype=dtype)


def test_bfloat16_computes_close_to_float32(ae):
  half = dcae_jax.Autoencoder(ae.architecture, ae.variables, dtype="bfloat16")
  images = _images(1, 32, 32)
  found, expected = half.encode(images), np.asarray(ae.encode(images))
  assert found.dtype == jnp.float32
  assert 1e-5 < parity.relative_error(found, expected) < 0.05
