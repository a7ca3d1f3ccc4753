"""Photographs inside packages of the Python package index."""

import json
import pathlib

from dcae_jax import errors
from dcae_jax.data import captions as image_captions
from dcae_jax.data.sources import files
from dcae_jax.runs import installed

_CAPTIONS = pathlib.Path(__file__).with_name("embedded_captions.json")

# Package, pattern of its files, and what fills it. The two sets share no
# photograph and no scene. (Left out: drawings, renders, paintings, crops of
# others, near-blank pictures.) New ones go last: whoever takes the first ones
# keeps what they had.
_EMBEDDED = {
  "train": (
    (
      "interior_photos",  # MIT; photographs of Pexels
      "images/pexels-{}.jpg",
      "1317558 2416933 2560067 36030587 36179987 36236147 36358763 4389955 "
      "4400637 4543103 5386834 5604956 5853819 6373478 6707631 6830376 6956495 "
      "6963783 6963788 7247504 7303773 7303782 7303800 7303842 7303992 7303994 "
      "7303995 7688357 cup-of-couple-6962851 cup-of-couple-6963787 "
      "cup-of-couple-7303987 maksgelatin-4352247",
    ),
    (
      "skimage",  # public domain, CC0, or no known restrictions
      "data/{}",
      "brick.png grass.png gravel.png hubble_deep_field.jpg ihc.png retina.jpg",
    ),
    (
      "theme_soft_design",  # MIT
      "static/img/{}.jpg",
      "anastasia annie-spratt blog7-1 blog7-2 blog7-3 brooke card-2 card-3 "
      "charles ivana ivancik jordan kal-visuals marie meeting nastuh team-1 "
      "team-2 team-3 team-4 toa-heftiba",
    ),
    (
      "theme_material_kit",  # MIT
      "static/assets/img/{}.jpg",
      "bg bg0 bg10 bg2 bg3 bg5 bg9 bruce-mars city-profile examples/blog-9-4 "
      "examples/blog2 examples/testimonial-6-2 examples/testimonial-6-3 "
      "ivana-square ivana-squares team-1 team-2 team-3 team-4 team-5",
    ),
    # Public domain.
    ("matplotlib", "mpl-data/sample_data/{}.jpg", "grace_hopper"),
    ("skimage", "data/{}.png", "coins"),  # no known restrictions
  ),
  "validation": (
    ("skimage", "data/{}.png", "astronaut chelsea coffee"),
    ("sklearn", "datasets/images/{}.jpg", "china flower"),
    ("skimage", "data/{}", "motorcycle_left.png rocket.jpg camera.png"),
  ),
}


def embedded(split: str, captions: bool = False) -> files.Files:
  """Photographs inside installed packages, for training or for validation.

  With `captions`, two or three of each, which are this package's. Raises
  UserError for an unknown split, or a package that is not installed.
  """
  if split not in _EMBEDDED:
    raise errors.UserError(
      f"embedded photographs have the splits {', '.join(_EMBEDDED)}, "
      f"not {split!r}"
    )
  paths = {}
  for package, pattern, names in _EMBEDDED[split]:
    directory = installed.folder(package)
    for name in names.split():
      file = pattern.format(name)
      key = f"{package}/{file}"
      if directory is None or not (directory / file).is_file():
        raise installed.missing("quickstart", f"the embedded photograph {key}")
      paths[key] = str(directory / file)
  captioned = None
  if captions:
    texts = json.loads(_CAPTIONS.read_text())
    captioned = files.Captions(
      {},
      {
        path: image_captions.of_object({"captions": texts[key]})
        for key, path in paths.items()
      },
    )
  return files.unlabelled(list(paths.values()), list(paths), captioned)
