import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from dcae_jax.data import crops as image_crops
from dcae_jax.data import decoding


def _encode(image, kind="PNG", **options):
  buffer = io.BytesIO()
  image.save(buffer, format=kind, **options)
  return buffer.getvalue()


def _gradient(height=40, width=60):
  rows, columns = np.mgrid[:height, :width]
  pixels = np.stack([rows * 4, columns * 4, rows + columns], -1)
  return Image.fromarray(pixels.astype(np.uint8))


def _pixels(encoded, **options):
  return np.asarray(decoding.decode(encoded, decoding.Decoding(**options)))


def test_cmyk_palette_and_rgb_look_the_same():
  image = _gradient()
  expected = np.asarray(image).astype(int)
  np.testing.assert_array_equal(_pixels(_encode(image)), expected)
  cmyk = _pixels(_encode(image.convert("CMYK"), "JPEG", quality=98))
  assert cmyk.shape == expected.shape
  assert np.abs(cmyk - expected).mean() < 4
  palette = _pixels(_encode(image.quantize(256)))
  assert np.abs(palette - expected).mean() < 8


def _profile_with_red_and_green_swapped():
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
  for name in (b"sRGB", "sRGB".encode("utf-16-be")):  # it is no longer that
    profile = profile.replace(name, name[:-1] + b"X")
  profile = profile.replace(b"rXYZ", b"tmp ").replace(b"gXYZ", b"rXYZ")
  return profile.replace(b"tmp ", b"gXYZ")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_are_converted_from_the_profile_to_srgb(mode):
  image = _gradient().convert(mode)
  swapped = _profile_with_red_and_green_swapped()
  found = _pixels(_encode(image, icc_profile=swapped)).astype(int)
  expected = _pixels(_encode(image)).astype(int)[..., [1, 0, 2]]
  assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("profile", [b"no profile", b""])
def test_damaged_profiles_are_left_aside(profile):
  image = _gradient()
  found = _pixels(_encode(image, icc_profile=profile))
  np.testing.assert_array_equal(found, np.asarray(image))


def test_16_bits_become_8():
  values = np.linspace(0, 65535, 30 * 20).reshape(30, 20)
  image = Image.fromarray(values.astype(np.uint16))
  found = _pixels(_encode(image))
  expected = np.round(values / 257).astype(int)[..., None]
  assert np.abs(found.astype(int) - expected).max() <= 1
  assert found.shape == (30, 20, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_over_white(mode):
  image = _gradient().convert(mode)
  image.putalpha(Image.new("L", image.size, 0))
  assert np.all(_pixels(_encode(image)) == 255)


def test_transparent_palette_entries_are_white():
  image = Image.new("P", (8, 8), 0)
  image.putpalette([0, 0, 0, 255, 0, 0])
  assert np.all(_pixels(_encode(image, transparency=0)) == 255)


def test_first_frame_of_an_animation_counts():
  frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
  for kind in ("GIF", "WEBP", "PNG", "TIFF"):
    options = {"save_all": True, "append_images": frames[1:]}
    if kind == "WEBP":
      options["lossless"] = True
    found = _pixels(_encode(frames[0], kind, **options))
    assert np.all(found == (255, 0, 0)), kind


def test_exif_orientation_is_applied():
  image = _gradient()
  exif = Image.Exif()
  exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
  found = _pixels(_encode(image, "PNG", exif=exif))
  np.testing.assert_array_equal(found, np.rot90(np.asarray(image), -1))


def test_grey_channels():
  assert _pixels(_encode(_gradient()), channels=1).shape == (40, 60)
  assert _pixels(_encode(_gradient().convert("1"))).shape == (40, 60, 3)


@pytest.mark.parametrize(
  "encoded",
  [
    b"",
    b"not an image",
    _encode(_gradient(200, 300), "JPEG")[:-200],
    _encode(_gradient(200, 300), "PNG")[:200],
    _encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
  ],
)
def test_what_cannot_be_decoded_is_refused(encoded):
  with pytest.raises(Exception, match=r"\w"):
    decoding.decode(encoded, decoding.Decoding())


def test_decompression_bombs_are_refused_from_their_header():
  bomb = _encode(Image.new("1", (30_000, 30_000)))
  assert len(bomb) < 200_000
  with pytest.raises(ValueError, match="30000x30000 pixels are more than 89"):
    decoding.decode(bomb, decoding.Decoding())


def test_strips_that_would_explode_when_enlarged_are_refused():
  with pytest.raises(ValueError, match="5000x1 pixels are too narrow"):
    decoding.decode(_encode(_gradient(1, 5000)), decoding.Decoding())


def test_small_images_are_told_apart():
  with pytest.raises(decoding.TooSmallError):
    decoding.decode(_encode(_gradient(40, 60)), decoding.Decoding(min_size=41))
  decoding.decode(_encode(_gradient(40, 60)), decoding.Decoding(min_size=40))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_shorter_side_reduces_and_never_enlarges(kind):
  encoded = _encode(_gradient(400, 600), kind)
  for side, size in ((100, (150, 100)), (500, (600, 400))):
    how = decoding.Decoding(shorter_side=side)
    assert decoding.decode(encoded, how).size == size


def _photograph(height, width):
  """Smooth, and another one from each side."""
  rows, columns = np.mgrid[:height, :width] / min(height, width)
  waves = [np.sin(5 * rows + columns), np.cos(4 * columns), rows * columns]
  pixels = np.stack([127 + 100 * wave for wave in waves], -1)
  return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _turned(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return exif


@pytest.mark.parametrize("least", range(1, 40))
def test_a_jpeg_is_halved_as_often_as_the_crop_allows(least):
  rng = np.random.default_rng(least)
  for size in (1, 2, 3, 5, 8, least):
    times = decoding.halved(least, size)
    assert least >= times * size or times == 1  # nothing is enlarged
    assert times == 8 or least < 2 * times * size  # nothing is left to halve
    width, height = least + rng.integers(0, 50, 2)
    encoded = _encode(_gradient(height, width), "JPEG")
    image = decoding.decode(encoded, decoding.Decoding(), lambda _, x=times: x)
    assert image.size == (-(-width // times), -(-height // times))


@pytest.mark.parametrize("shape", [(200, 250), (251, 203)])
def test_shorter_side_decodes_at_the_least_scale(shape, monkeypatch):
  resized = []
  monkeypatch.setattr(
    image_crops,
    "resize_shorter_side",
    lambda image, size: resized.append(image.size) or image,
  )
  encoded = _encode(_gradient(*shape), "JPEG")
  decoding.decode(encoded, decoding.Decoding(shorter_side=99))
  assert resized == [tuple(-(-side // 2) for side in shape[::-1])]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"mode": "CMYK"}, {"mode": "L"}])
def test_reduced_images_are_what_a_viewer_shows(orientation, options):
  image = _photograph(301, 404).convert(options.get("mode", "RGB"))
  encoded = _encode(image, "JPEG", quality=95, exif=_turned(orientation))
  whole = decoding.decode(encoded, decoding.Decoding())
  asked = []
  reduced = decoding.decode(
    encoded, decoding.Decoding(), lambda size: asked.append(size) or 4
  )
  assert asked == [whole.size]
  assert reduced.size == tuple(-(-side // 4) for side in whole.size)
  expected = np.asarray(whole.resize(reduced.size, Image.Resampling.BOX))
  found = np.asarray(reduced)
  assert np.abs(found.astype(int) - expected.astype(int)).mean() < 1.5


def test_pictures_with_previews_are_reduced():
  frames = [_photograph(160, 200), _photograph(16, 20)]
  encoded = _encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
  assert Image.open(io.BytesIO(encoded)).format == "MPO"
  found = decoding.decode(encoded, decoding.Decoding(), lambda _: 2)
  assert found.size == (100, 80)


def test_other_files_are_decoded_whole():
  image = _photograph(160, 200)
  for kind in ("PNG", "TIFF", "WEBP"):
    found = decoding.decode(
      _encode(image, kind, lossless=True), decoding.Decoding(), lambda _: 2
    )
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image))


def test_a_box_is_the_same_part_of_a_reduced_image():
  image, rng = _photograph(301, 404), np.random.default_rng(0)
  for _ in range(20):
    box = image_crops.random_box(image.size, 64, rng, 0.2)
    crops = [
      np.asarray(image_crops.resized_crop(x, box, 32)).astype(int)
      for x in (image, image.reduce(4))
    ]
    assert np.abs(crops[0] - crops[1]).mean() < 1.5
  part = image.resize(
    (32, 32),
    Image.Resampling.BICUBIC,
    (box.left, box.top, box.left + box.width, box.top + box.height),
  )
  np.testing.assert_array_equal(crops[0], part)


def test_dm_crop_halves_then_resizes_then_crops_the_centre():
  image = _gradient(200, 240)
  expected = image.resize((120, 100), Image.Resampling.BOX)
  expected = expected.resize((77, 64), Image.Resampling.BICUBIC)
  expected = np.asarray(expected)[:, 6 : 6 + 64]
  np.testing.assert_array_equal(image_crops.dm_crop(image, 64), expected)
  assert image_crops.dm_crop(_gradient(10, 12), 64).size == (64, 64)


@pytest.mark.parametrize("shape", [(64, 64), (65, 200), (20, 30), (1, 90)])
def test_random_crops_have_the_size_and_differ(shape):
  image = _gradient(*shape)
  rng = np.random.default_rng(0)
  for crop in (
    lambda: image_crops.random_crop(image, 64, rng),
    lambda: image_crops.resized_crop(
      image, image_crops.random_box(image.size, 64, rng, 0.2), 64
    ),
  ):
    crops = [np.asarray(crop()) for _ in range(5)]
    assert {c.shape for c in crops} == {(64, 64, 3)}
  assert any(not np.array_equal(c, crops[0]) for c in crops) or shape[0] == 1


def test_random_crop_takes_the_images_own_pixels():
  image = _gradient(100, 120)
  found = np.asarray(
    image_crops.random_crop(image, 64, np.random.default_rng(1))
  )
  left, top = int(found[0, 0, 1]) // 4, int(found[0, 0, 0]) // 4
  expected = np.asarray(image)[top : top + 64, left : left + 64]
  np.testing.assert_array_equal(found, expected)
