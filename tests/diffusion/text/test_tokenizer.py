import logging
import pathlib
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import tiny_text_encoders
from conftest import REPOSITORY

from dcae_jax import errors
from dcae_jax.diffusion.text import tokenizer, unigram_file

FILE = tiny_text_encoders.letters()
BERT = tokenizer.Marks("[PAD]", "[CLS]", "[SEP]")
GEMMA = tokenizer.Marks("<pad>", "<bos>")


def _ids(text):
  words = tiny_text_encoders.MARKS + list(tiny_text_encoders.LETTERS)
  return [words.index(x) for x in text]


def test_texts_get_marks_and_padding_on_the_right():
  ids, mask = tokenizer.Tokenizer(FILE, BERT, 6)(["abc", ""])
  pad, begin, end = _ids(BERT)
  assert ids.dtype == np.int32 and mask.dtype == bool
  assert ids.tolist() == [
    [begin, *_ids("abc"), end, pad],
    [begin, end, pad, pad, pad, pad],
  ]
  assert mask.tolist() == [[True] * 5 + [False], [True] * 2 + [False] * 4]


def test_longer_texts_lose_their_end_but_not_its_mark():
  ids, mask = tokenizer.Tokenizer(FILE, BERT, 5)(["abcd"])
  assert ids.tolist() == [_ids(["[CLS]", *"abc", "[SEP]"])]
  assert mask.all()


def test_cut_texts_are_counted_and_said_once(caplog):
  cutter = tokenizer.Tokenizer(FILE, BERT, 5)
  with caplog.at_level(logging.WARNING):
    cutter(["abc", ""])
    assert cutter.cut == 0 and not caplog.records
    cutter(["abc", "abcd", "abcde"])
    cutter(["abcdef"])
  assert cutter.cut == 3
  (record,) = caplog.records
  assert "2 of 5 texts so far have more than 5 tokens" in record.getMessage()


def test_an_instruction_goes_before_each_text_and_makes_rows_longer():
  ours = tokenizer.Tokenizer(FILE, GEMMA, 4, "say ")
  ids, mask = ours(["ab", "abcdefg"])
  # Five tokens before it, of which the first and the last are among the 4.
  assert ids.tolist() == [
    _ids(["<bos>", *"say ab"]),
    _ids(["<bos>", *"say ab"]),
  ]
  assert mask.all() and ids.shape == (2, 5 + 4 - 2)


def test_the_empty_text_has_no_instruction():
  ids, mask = tokenizer.Tokenizer(FILE, GEMMA, 4, "say ")([""])
  assert ids.tolist() == [_ids(["<bos>"] + ["<pad>"] * 6)]
  assert mask.tolist() == [[True] + [False] * 6]


def test_a_pickled_tokenizer_works_where_jax_is_not_imported():
  ours = tokenizer.Tokenizer(FILE, GEMMA, 8, "say ")
  code = (
    "import pickle, sys; t = pickle.load(sys.stdin.buffer); i, m = t(['ab']); "
    "assert not {'jax', 'flax', 'torch'} & sys.modules.keys(); "
    "sys.stdout.buffer.write(pickle.dumps((i, m)))"
  )
  found = subprocess.run(
    [sys.executable, "-c", code],
    cwd=REPOSITORY,
    input=pickle.dumps(ours),
    stdout=subprocess.PIPE,
    check=True,
  )
  for here, there in zip(ours(["ab"]), pickle.loads(found.stdout), strict=True):
    np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize(
  "file, marks, max_tokens, message",
  [
    ("{", BERT, 8, "tokenizer.json is damaged"),
    (FILE, tokenizer.Marks("<nothing>"), 8, "has no token <nothing>"),
    (FILE, BERT, 2, "max_tokens=2 is below 3"),
    (FILE, BERT, -1, "max_tokens=-1 is below 3"),
  ],
)
def test_what_does_not_fit_is_said(file, marks, max_tokens, message):
  with pytest.raises(errors.UserError, match=message):
    tokenizer.Tokenizer(file, marks, max_tokens)


def test_a_file_that_is_no_text_is_refused(tmp_path):
  (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x80")
  with pytest.raises(errors.UserError, match=r"tokenizer.json is damaged"):
    tokenizer.find([tmp_path])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match=r"has no tokenizer.json"):
    tokenizer.find([tmp_path])


def _field(number: int, value: int | float | bytes) -> bytes:
  """A field of a protocol buffer, of a number below 16."""
  if isinstance(value, bytes):
    assert len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value
  if isinstance(value, float):
    return bytes([number << 3 | 5]) + struct.pack("<f", value)
  return bytes([number << 3, value])


def _sentencepiece_file(path: pathlib.Path, model: int = 1) -> pathlib.Path:
  pieces = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2)] + [
    (text, score, 1)
    for text, score in [
      ("▁", -2.0), ("a", -3.0), ("b", -3.0), ("▁ab", -1.0), ("ba", -2.0),
    ]
  ]  # fmt: skip
  data = b"".join(
    _field(1, _field(1, text.encode()) + _field(2, score) + _field(3, kind))
    for text, score, kind in pieces
  )
  path.write_bytes(data + _field(2, _field(3, model)) + _field(3, b""))
  return path


def test_a_sentencepiece_file_is_as_good(tmp_path):
  _sentencepiece_file(tmp_path / "spiece.model")
  marks = tokenizer.Marks("<pad>", end="</s>")
  ours = tokenizer.Tokenizer(tokenizer.find([tmp_path]), marks, 6)
  ids, _ = ours(["ab", "  ab   ba ", "abba", "aXYb", ""])
  assert ids.tolist() == [
    [6, 1, 0, 0, 0, 0],
    [6, 3, 7, 1, 0, 0],  # spaces at the ends do not count, nor do more of them
    [6, 7, 1, 0, 0, 0],
    [3, 4, 2, 5, 1, 0],  # unknown letters side by side are one token
    [1, 0, 0, 0, 0, 0],
  ]


def test_other_sentencepiece_files_are_refused(tmp_path):
  file = _sentencepiece_file(tmp_path / "tokenizer.model", model=2)
  with pytest.raises(errors.UserError, match=r"make a tokenizer.json of it"):
    unigram_file.to_json(file)
  file.write_bytes(file.read_bytes()[:-9])
  with pytest.raises(errors.UserError, match="no sentencepiece file, or dam"):
    unigram_file.to_json(file)
