"""States of captions in a store, made by an encoder that anybody can follow."""

import ml_dtypes
import numpy as np
import pytest

from dcae_jax.latents import captions

LONGEST, WIDTH = 6, 3
ROWS = np.array(
  [
    "a red bus",
    "two birds\t3\na red bus",
    "a b c d e f g",
    *(f"number {i}" for i in range(40)),
    "two birds",
  ],
  np.dtypes.StringDType(),
)
ENCODER = {"kind": "words", "fingerprint": "a"}


def tokenize(texts):
  """A number for each of the first words."""
  ids = np.zeros((len(texts), LONGEST), np.int32)
  mask = np.zeros(ids.shape, bool)
  for i, text in enumerate(texts):
    words = text.split()[:LONGEST]
    ids[i, : len(words)] = [sum(map(ord, word)) for word in words]
    mask[i, : len(words)] = True
  return ids, mask


def states_of(ids, mask):
  """Numbers that bfloat16 holds, and others where there is padding."""
  assert len(ids) == 4  # of a batch
  words = np.where(mask, ids % 64, -1)
  return (words[..., None] + np.arange(WIDTH)).astype(np.float32)


def encoding(path, states=states_of):
  store = captions.store_of(str(path), retries=2)
  store.check_writable()
  identity = captions.identity(ROWS, ENCODER)
  store.check_identity(identity, begun=False)
  store.write_identity(identity)
  encoder = captions.Encoder(tokenize, states, lambda mask: mask, WIDTH, 4)
  made = captions.Encoding(store, ROWS, encoder)
  made.create_arrays()
  return store, made


def finish(store, made):
  list(made.fill(made.missing(), lambda: False))
  store.finish(made.layout, captions.identity(ROWS, ENCODER))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("states") / "store"
  finish(*encoding(path))
  return str(path)


def expected(text):
  ids, mask = tokenize([text] * 4)
  return states_of(ids, mask)[0][mask[0]]


def test_a_batch_brings_the_states_of_its_captions_and_their_mask(path):
  states = captions.States(path, LONGEST)
  images = np.array([0, 1, 1, 2, 43])
  uniforms = np.array([0.5, 0.7, 0.8, 0.1, 0.1])
  found = states(ROWS[images], images, uniforms)
  texts = ["a red bus", "two birds", "a red bus", "a b c d e f", "two birds"]
  assert found["states"].dtype == ml_dtypes.bfloat16
  assert found["mask"].sum(1).tolist() == [3, 2, 3, 6, 2]
  for text, values, mask in zip(texts, *found.values(), strict=True):
    np.testing.assert_array_equal(values[mask], expected(text))
    assert not values[~mask].any()


def test_only_tokens_of_texts_are_kept_and_each_text_once(path):
  states = captions.States(path, LONGEST)
  # Of three texts of 3, 2 and 6 words, and forty of two.
  assert states.manifest["count"] == 3 + 2 + 6 + 80
  assert states.manifest["dtype"] == "bfloat16"
  assert states.manifest["captions"] == captions.fingerprint(ROWS)


def test_a_store_filled_in_parts_is_the_same(path, tmp_path):
  store, made = encoding(tmp_path)
  assert len(made.missing()) == 6  # of 16 tokens each
  stopped = iter([False, True])
  list(made.fill(made.missing(), lambda: next(stopped)))
  store, made = encoding(tmp_path)  # another start
  assert len(made.missing()) == 5
  # Shards by several processes, in any order.
  list(made.fill(made.missing()[::-2], lambda: False))
  finish(store, made)
  a, b = (captions.States(str(x), LONGEST) for x in (path, tmp_path))
  assert a.manifest["shards"] == b.manifest["shards"]  # with their checksums
  images, uniforms = np.arange(len(ROWS)), np.full(len(ROWS), 0.1)
  np.testing.assert_array_equal(
    a(ROWS, images, uniforms)["states"], b(ROWS, images, uniforms)["states"]
  )


def test_each_shard_is_written_once(tmp_path, monkeypatch):
  store, made = encoding(tmp_path)
  written, write = [], type(store).write_shard
  monkeypatch.setattr(
    type(store),
    "write_shard",
    lambda *args: written.append(args[2]) or write(*args),
  )
  list(made.fill(made.missing()[:4], lambda: False))
  store, made = encoding(tmp_path)
  finish(store, made)
  assert sorted(written) == list(range(6))


def test_states_of_others_are_refused(path):
  states = captions.States(path, LONGEST)
  states.check(ROWS, ENCODER)
  with pytest.raises(ValueError, match=r"other captions, .* \(captions: "):
    states.check(ROWS[:-1], ENCODER)
  other = ENCODER | {"fingerprint": "b"}
  with pytest.raises(ValueError, match=r"another encoder \(encoder.fingerpri"):
    states.check(ROWS, other)
  store = captions.store_of(path, retries=2)
  with pytest.raises(ValueError, match=r"another export \(encoder.fingerprint"):
    store.check_identity(captions.identity(ROWS, other), begun=False)


def test_states_that_are_not_finite_are_not_written(tmp_path):
  bad = lambda ids, mask: np.full_like(states_of(ids, mask), np.nan)
  _, made = encoding(tmp_path, bad)
  with pytest.raises(
    FloatingPointError, match="states of 'a red bus' or later"
  ):
    list(made.fill([0], lambda: False))
  assert len(made.missing()) == 6


def test_tokens_are_those_of_the_caption_that_is_drawn():
  tokens = captions.Tokens(tokenize)
  rows = ROWS[[1] * 1000]
  uniforms = np.random.default_rng(0).random(1000)
  found = tokens(rows, np.ones(1000, int), uniforms)
  is_long = found["mask"].sum(1) == 3
  np.testing.assert_allclose(is_long.mean(), 0.25, atol=0.05)
  np.testing.assert_array_equal(
    found["ids"][is_long], tokenize(["a red bus"] * is_long.sum())[0]
  )


def test_a_store_of_something_else_is_none_of_states(tmp_path):
  with pytest.raises(ValueError, match="is no caption store"):
    captions.States(str(tmp_path), LONGEST)
