import json

import numpy as np
import pytest

from dcae_jax.data import captions

RED = captions.Caption("a red bus", 1.0)
BUS = captions.Caption("ein Bus, größer", 0.25)


@pytest.mark.parametrize("these", [(), (RED,), (BUS,), (RED, BUS, RED)])
def test_captions_as_a_string_are_the_same_captions(these):
  assert captions.split(captions.joined(these)) == list(these)


def test_one_caption_of_weight_one_is_its_text():
  assert captions.joined([RED]) == "a red bus"


def test_captions_are_drawn_by_their_weights():
  uniforms = np.random.default_rng(0).random(4000)
  found = [captions.drawn([1.0, 0.0, 3.0], x) for x in uniforms]
  counts = np.bincount(found, minlength=3) / len(found)
  np.testing.assert_allclose(counts, [0.25, 0, 0.75], atol=0.02)
  # Numbers next to 1, where sums are rounded.
  assert captions.drawn([0.1] * 10, np.nextafter(1, 0)) == 9


def test_a_text_file_has_a_caption_a_line():
  found = captions.of_text("\ufeffa red\tbus \n\n  ein Bus\n".encode())
  assert found == (("a red bus", 1.0), ("ein Bus", 1.0))


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    ({"caption": "a", "width": 3}, [("a", 1)]),
    ({"prompt": "a\nb"}, [("a b", 1)]),
    ({"captions": ["a", "", "b"]}, [("a", 1), ("b", 1)]),
    ({"captions": ["a", "b"], "weights": [0, 2]}, [("b", 2)]),
    ({"captions": [], "text": "a"}, [("a", 1)]),
    ({"caption": ""}, []),
    ({"caption": " \n"}, []),
    ({"caption": "a bus \ud83d"}, [("a bus", 1)]),  # half an emoji
    ({"width": 3}, []),
  ],
)
def test_a_json_object_names_captions_as_people_do(values, expected):
  assert list(captions.of_json(json.dumps(values).encode())) == expected


@pytest.mark.parametrize(
  "values",
  [
    [],
    "a",
    {"caption": 3},
    {"caption": "\0"},  # which no store keeps; UTF-16 is full of them
    {"captions": ["a", 3]},
    {"captions": ["a"], "weights": [1, 2]},
    {"captions": ["a"], "weights": [-1]},
    {"captions": ["a"], "weights": [float("nan")]},
    {"captions": ["a"], "weights": [0]},
    {"captions": ["a"], "weights": 1},
  ],
)
def test_other_values_are_no_captions(values):
  with pytest.raises(ValueError):
    captions.of_json(json.dumps(values).encode())
