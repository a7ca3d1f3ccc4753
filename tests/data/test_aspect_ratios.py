import numpy as np
import pytest
from PIL import Image
from sized import folder as sized_folder

from data.test_tar import picture, write_tar
from dcae_jax import errors
from dcae_jax.data import aspect_ratios, sources


@pytest.mark.parametrize(
  ("resolution", "multiple", "most", "count"),
  [(1024, 32, 4, 33), (512, 64, 4, 9), (512, 32, 2, 9), (96, 8, 16, 19)],
)
def test_shapes_have_equal_area_and_both_ways_up(
  resolution, multiple, most, count
):
  shapes = aspect_ratios.shapes(resolution, multiple, most)
  assert len(set(shapes)) == len(shapes) == count
  assert (resolution, resolution) in shapes
  assert {shape[::-1] for shape in shapes} == set(shapes)
  for height, width in shapes:
    assert height % multiple == width % multiple == 0
    assert max(height, width) <= most * min(height, width)
    error = abs(height * width / resolution**2 - 1)
    assert error <= multiple / 2 / resolution
  ratios = [width / height for height, width in shapes]
  assert ratios == sorted(ratios)


def test_a_ratio_that_leaves_the_square_alone_is_refused():
  with pytest.raises(errors.UserError, match="leaves no shape but the square"):
    aspect_ratios.shapes(512, 64, 1.1)


def test_images_get_the_nearest_shape_that_does_not_enlarge_them():
  shapes = aspect_ratios.shapes(512, 64, 4)
  of = lambda width, height: shapes[
    int(aspect_ratios.nearest(np.array([[width, height]]), shapes)[0])
  ]
  assert of(4000, 3000) == (448, 576)
  assert of(3000, 4000) == (576, 448)
  assert of(4000, 1000) == of(9000, 1000) == (256, 1024)
  assert of(512, 512) == of(5000, 5000) == (512, 512)
  # 384x704 is a little nearer, and would enlarge the smaller one.
  assert of(8330, 3820) == (384, 704) and of(833, 382) == (320, 832)
  # None is small enough.
  assert of(80, 60) == (448, 576)
  # Who has the square's side as the shorter one is never enlarged.
  shorter = np.full(2000, 512)
  longer = np.arange(512, 2512)
  for sizes in ([longer, shorter], [shorter, longer]):
    sizes = np.stack(sizes, 1)
    chosen = np.array(shapes)[aspect_ratios.nearest(sizes, shapes)]
    assert (sizes[:, ::-1] >= chosen).all()


def _folder(root, sizes):
  root.mkdir()
  for i, size in enumerate(sizes):
    Image.new("RGB", size).save(root / f"{i}.png")
  return sized_folder(str(root))


def test_each_image_has_one_shape_and_rare_ones_go_to_their_neighbours(
  tmp_path,
):
  landscape = _folder(tmp_path / "a", [(90, 60)] * 5 + [(120, 30)])
  others = _folder(tmp_path / "b", [(60, 90)] * 4 + [(90, 60)] * 4)
  shapes = aspect_ratios.shapes(16, 2, 4)
  groups = aspect_ratios.dealt(
    [(landscape, 2.0), (others, 1.0)], shapes, least=3, shorter_side=0
  )
  assert [shape for shape, _ in groups] == [(18, 14), (14, 18)]
  (_, tall), (_, wide) = groups
  assert [len(part) for part, _ in tall] == [0, 4]
  assert [len(part) for part, _ in wide] == [6, 4]
  assert [weight for _, weight in tall] == [0.0, 0.5]
  assert [weight for _, weight in wide] == [2.0, 0.5]
  keys = sorted(part.key(i) for part, _ in wide for i in range(len(part)))
  assert keys == sorted([f"{i}.png" for i in (0, 1, 2, 3, 4, 5, 4, 5, 6, 7)])


def test_fewer_images_than_a_batch_have_one_shape(tmp_path):
  source = _folder(tmp_path / "a", [(90, 60), (90, 60), (30, 90)])
  shapes = aspect_ratios.shapes(16, 2, 4)
  ((_, ((part, _),)),) = aspect_ratios.dealt(
    [(source, 1.0)], shapes, least=8, shorter_side=0
  )
  assert len(part) == 3


def test_a_shape_of_no_images_is_not_drawn(tmp_path, caplog):
  """Nothing would be there to replace them."""
  tall = {f"{i}.jpg": picture(30, 60) for i in range(4)}
  write_tar(tmp_path / "a.tar", tall | {f"x{i}.png": b"none" for i in range(9)})
  source = sources.Tars(str(tmp_path / "a.tar"))
  shapes = aspect_ratios.shapes(16, 2, 4)
  ((shape, ((part, _),)),) = aspect_ratios.dealt(
    [(source, 1.0)], shapes, least=2, shorter_side=0
  )
  assert shape[0] > shape[1] and len(part) == 4
  assert "9 files left out, which are no images" in caplog.text


def test_images_that_are_reduced_first_count_as_they_are_then(tmp_path):
  # Its whole covers 64x256, whose ratio is nearer.
  source = _folder(tmp_path / "a", [(900, 250)])
  shapes = [(64, 256), (40, 100)]
  of = lambda shorter_side: aspect_ratios.dealt(
    [(source, 1.0)], shapes, least=1, shorter_side=shorter_side
  )[0][0]
  assert of(0) == of(300) == (64, 256) and of(50) == (40, 100)


def test_sizes_that_are_not_known_are_refused_in_one_line(photographs):
  folder = sources.folder(str(photographs))
  with pytest.raises(errors.UserError, match=r"needs the sizes .* prepare"):
    aspect_ratios.dealt(
      [(folder, 1.0)], [(16, 16), (8, 32)], least=1, shorter_side=0
    )
