"""Names that hold anything are shown as what they are, and do nothing."""

import re

import pytest

from dcae_jax.runs import plain_text

_HOSTILE = "a\x1b[31m\r\n\x9b2J\u202egnp.exe\udc80\x00\x7f\u2028é 中.png"


def test_what_moves_a_cursor_becomes_escapes():
  found = plain_text.escaped(_HOSTILE)
  assert found == (
    r"a\x1b[31m\r\n\x9b2J\u202egnp.exe\udc80\x00\x7f\u2028é 中.png"
  )
  assert plain_text.escaped("a|\tb\n\x1b", kept="\n\t") == "a|\tb\n\\x1b"
  assert plain_text.escaped("größer | 100 %") == "größer | 100 %"


@pytest.mark.parametrize(
  "name",
  [
    "a|b", "<script>", "**a**", "_a_", "__init__", "a `b`", "[a](b)", "a\\|b",
    "~~a~~", "&lt;", "![a](b)", "a_b_c", "f64_phase1 (1)",
  ],
)  # fmt: skip
def test_markdown_shows_a_name_as_it_is(name):
  found = plain_text.markdown(name)
  assert not re.search(r"(?<!\\)(\\\\)*[|<>*`\[\]~&]", found)
  assert re.sub(r"\\(.)", r"\1", found) == name
  assert plain_text.markdown("f64_phase1 (1)") == "f64_phase1 (1)"


def test_markdown_keeps_a_name_in_its_line():
  assert plain_text.markdown("a\n# b") == r"a\\n# b"
