import logging

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dcae_jax.runs import compiling


@pytest.fixture
def cache(tmp_path):
  """An empty compilation cache, which keeps all; then the one from before."""
  names = (
    "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
  )  # fmt: skip
  before = [getattr(jax.config, name) for name in names]
  for name, value in zip(names, (str(tmp_path), 0.0), strict=True):
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield tmp_path
  for name, value in zip(names, before, strict=True):
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def _compile(caplog, rows=4):
  """The messages, without the seconds."""
  shape = jax.ShapeDtypeStruct((rows, 3), jnp.float32)
  caplog.clear()
  with compiling.announced("the step", [shape], jax.devices()[:1]):
    jax.jit(lambda x: jnp.sin(x) @ x.T).lower(shape).compile()
  jax.clear_caches()
  return caplog.messages


def test_the_time_of_the_last_time_is_the_estimate(cache, caplog):
  caplog.set_level(logging.INFO)
  said, done = _compile(caplog)
  assert said.startswith("compiling the step; how long is not known here")
  assert done.startswith("compiled in ")
  seconds = done.removeprefix("compiled in ")
  said, done = _compile(caplog)
  assert said == f"compiling the step; it took {seconds} the last time"
  assert done.startswith("loaded from the compilation cache in ")
  assert _compile(caplog)[0] == said
  assert "is not known" in _compile(caplog, rows=5)[0]  # another program


@pytest.mark.parametrize("text", ["[]", "{", "3", '{"compiled": "1"}'])
def test_a_damaged_estimate_is_none(text, cache, caplog):
  caplog.set_level(logging.INFO)
  _compile(caplog)
  (file,) = cache.glob("dcae_jax_seconds_*.json")
  file.write_text(text)
  assert "is not known" in _compile(caplog)[0]


def test_a_cache_that_cannot_be_written_is_no_error(cache, caplog):
  caplog.set_level(logging.INFO)
  jax.config.update("jax_compilation_cache_dir", str(cache / "a file" / "x"))
  (cache / "a file").touch()
  with pytest.warns(UserWarning, match="persistent compilation cache"):
    assert _compile(caplog)[1].startswith("compiled in ")


def test_without_a_cache_there_is_no_estimate(cache, caplog):
  caplog.set_level(logging.INFO)
  jax.config.update("jax_compilation_cache_dir", None)
  for _ in range(2):
    assert "is not known" in _compile(caplog)[0]
  assert not list(cache.iterdir())


@pytest.mark.parametrize("limit", [1e-9, 100.0])
def test_what_other_work_compiles_has_lines_if_it_takes_long(
  limit, cache, caplog, monkeypatch
):
  caplog.set_level(logging.INFO, "dcae_jax")
  monkeypatch.setattr(compiling, "_SECONDS_UNSAID", limit)
  compiling.listen()

  def encode(x):
    return jnp.sort(jnp.sin(x)) + 3

  x = jnp.ones(7)
  caplog.clear()
  jax.jit(encode)(x)
  begun = [x for x in caplog.messages if x.startswith("compiling a program (e")]
  if limit > 1:
    assert not begun
  else:
    assert begun[0] == "compiling a program (encode), for 0.0 s so far"
    assert begun[-1].startswith("compiling a program (encode) took ")


@pytest.mark.parametrize(
  ("seconds", "words"),
  [(2.04, "2.0 s"), (99.9, "99.9 s"), (192, "0:03:12"), (3661, "1:01:01")],
)
def test_seconds_are_said_for_people(seconds, words):
  assert compiling._words(seconds) == words
