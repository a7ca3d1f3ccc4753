"""What `--help` says is what the files say, within 80 columns."""

import ast
import pathlib

import pytest
from conftest import REPOSITORY

from configs import base
from dcae_jax import main
from dcae_jax.runs import config_files, help_pages

FIRST = (
  "plan What a training step needs of the chips that it is meant for. ",
  "f64_phase2 DC-AE f64c128, phase 2: high-resolution latent adaptation. ",
  "--workdir Where it is written.",
)


def _of_config(name):
  return help_pages.of_config(name, config_files.load(name).to_dict())


def test_all_tasks_configs_and_flags_have_a_line():
  page = help_pages.general(tasks.TASKS, {"workdir": "Where it is written."})
  for name in (*tasks.TASKS, *config_files.packaged(), "--workdir"):
    (line,) = [x for x in page.splitlines() if x.startswith(f"  {name} ")][:1]
    assert line.removeprefix(f"  {name}").strip(), name
  for line in FIRST:
    assert line in " ".join(page.split())
  assert max(map(len, page.splitlines())) <= 80


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_first_line_of_a_task_is_a_sentence(task):
  source = (REPOSITORY / f"dcae_jax/tasks/{task}.py").read_text()
  text = ast.get_docstring(ast.parse(source))
  assert text.splitlines()[0].endswith("."), text


def _paths(config, prefix=""):
  for name, value in config.items():
    if isinstance(value, dict) and value:
      yield from _paths(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name} = {value!r}"


@pytest.mark.parametrize(
  "name", ["f64_phase2", "quickstart_text", "studies/learning:1"]
)
def test_all_keys_are_shown_once_with_their_values(name):
  page = _of_config(name)
  assert max(map(len, page.splitlines())) <= 80
  shown = page.replace("\n      ", " ")  # what went over the end of a line
  for path in _paths(config_files.load(name).to_dict()):
    assert shown.count(f"\n  {path}") == 1, path


_COMMENTS = """\
def group() -> ConfigDict:
  \"\"\"What a group is.\"\"\"
  c = ConfigDict()
  c.first = Key(1, 0)  # [paper] beside
  # Above, on two
  # lines: # and all.
  c.second = Key(2, 0)
  # --- a heading ----
  c.third = Key((
    3,  # within
  ))
  c.one = c.two = 0  # of both
  return c


def more() -> ConfigDict:
  c = ConfigDict()
  c.update(changed(group()))
  c.first = 5  # of a change
  return c


@_task("mine")
def mine() -> ConfigDict:
  c = group()
  c.zero, c.inner = changed(group()), more()
  # Of the group itself.
  c.named = group()
  c.named.first = 4  # again
  c.named.late = 3
  return c


def parts() -> ConfigDict:
  c = ConfigDict()
  c.task = "parts"
  c.mine = mine()
  return c
"""


def test_comments_are_those_above_and_beside_a_key():
  described = help_pages._Base(_COMMENTS)
  of_group = {
    "first": "[paper] beside",
    "second": "Above, on two lines: # and all.",
    "third": "within",
    "one": "of both",
    "two": "of both",
  }
  below = lambda name: {f"{name}.{x}": text for x, text in of_group.items()}
  expected = of_group | {"zero": "What a group is."} | below("zero")
  expected |= {"inner": ""} | below("inner")
  expected |= {"named": "Of the group itself."} | below("named")
  expected |= {"named.late": ""}
  found = described.comments_of_task("mine")
  assert found == expected and list(found) == list(expected)
  parts = described.comments_of_task("parts")
  assert parts == {"task": "", "mine": ""} | {
    f"mine.{x}": text for x, text in expected.items()
  }
  assert described.comments_of_task("other") == {}


@pytest.mark.parametrize("task", base.KEYS)
def test_keys_of_tasks_are_found_in_the_source(task):
  """However a function makes them: none is left to the end, without a word."""
  source = pathlib.Path(base.__file__).read_text()
  known = help_pages._Base(source).comments_of_task(task)
  keys = base.KEYS[task].keys()
  assert not set(keys) - {"task"} - {x.partition(".")[0] for x in known}


def test_what_is_said_of_keys():
  page = _of_config("f64_phase2")
  for line in (
    "f64_phase2: DC-AE f64c128, phase 2: high-resolution latent adaptation.",
    "  batch_size = 16  # [community] of all devices together: 24 x 4",
    "  data.source.members = {}  # mixture: name to source",
    "  evaluation.source  # held-out images",
    "  evaluation.source.members = {}",
    "  optimizer.beta2 = 0.999  # [paper]",
    "      # Trace `steps` steps after `start` ones (0: never), and `on_signal`"
    " steps",
  ):
    assert f"{line}\n" in f"{page}\n", line
  assert page.index("  seed = 0") < page.index("  batch_size = 16")


def test_the_folder_is_that_of_the_clone():
  assert config_files.FOLDER == REPOSITORY / "configs"
