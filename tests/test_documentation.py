"""What README, docs and configs say of commands, keys and names is true."""

import ast
import functools
import importlib
import itertools
import pkgutil
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags
from conftest import REPOSITORY
from ml_collections import ConfigDict, config_flags

import dcae_jax
from dcae_jax import main
from dcae_jax.setup import keys

PAGES = sorted(
  str(path.relative_to(REPOSITORY))
  for pages in ("*.md", "docs/*.md")
  for path in REPOSITORY.glob(pages)
)
CONFIGS = sorted(
  str(path.relative_to(REPOSITORY))
  for path in REPOSITORY.glob("configs/*.py")
  if path.stem not in ("__init__", "base")
)
OTHER_FLAGS = re.findall(
  r'DEFINE_\w+\(\s*"(\w+)"', (REPOSITORY / "dcae_jax/main.py").read_text()
)
# Where a file that is mentioned may be, and its name: `f32_phase{1,2,3}.py`.
PLACES = ("", "dcae_jax", "configs", "configs/studies")
FILE = re.compile(
  r"(?<![\w./-])(?:(?:benchmarks|configs|dcae_jax|docs|launch|tests)/"
  r"[\w./{},*-]*\w|[\w./{},*-]+\.(?:py|sh)\b)"
)
# Of ml_collections, which loads config files as Python 3.12 no longer does.
pytestmark = pytest.mark.filterwarnings("ignore:.*load_module")


def _text(page):
  return (REPOSITORY / page).read_text()


def _blocks(text, language):
  return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def _inline(text):
  """Code in sentences and tables; it may go over the end of a line."""
  text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
  return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def _sections(text):
  """What belongs to each heading; `#` within a block is a comment."""
  sections, is_block = [""], False
  for line in text.splitlines(keepends=True):
    is_block ^= line.startswith("```")
    if line.startswith("#") and not is_block:
      sections.append("")
    sections[-1] += line
  return sections


def _commands(lines):
  """The arguments of each run of `dcae_jax.main`, whatever starts it.

  Those of configs that readers write, `my_...`, are left out.
  """
  joined = re.sub(r"\\\n\s*", " ", lines)
  joined = re.sub(r"^dcae (\w+)", r"--config=configs/\1.py", joined, flags=re.M)
  for line in joined.splitlines():
    words = shlex.split(line, comments=True)
    if any(re.match("--config=(?!my_)", word) for word in words):
      yield [word for word in words if re.match("--[a-z]", word)]


@functools.cache
def _defaults(file):
  path, _, argument = file.partition(":")
  name = path.removesuffix(".py").replace("/", ".")
  create = importlib.import_module(name).get_config
  return create(argument) if argument else create()


def _check_tuples(config, defaults):
  """Flags take tuples of anything: the values must be as in the defaults."""
  for key, value in defaults.items():
    if isinstance(value, ConfigDict):
      _check_tuples(config[key], value)
    elif isinstance(value, tuple) and value:
      kinds = {type(x) for x in value}
      if not {type(x) for x in config[key]} <= kinds:
        raise TypeError(f"{key}={config[key]} is not like {value}")


def _parse(monkeypatch, arguments):
  """The config, as `dcae_jax.main` would get it."""
  arguments = [word for word in arguments if word != "--help"]
  ours = [word for word in arguments if word.startswith("--config")]
  for word in arguments:
    name = word.removeprefix("--").partition("=")[0]
    assert word in ours or name in OTHER_FLAGS, f"{word} is no flag"
  monkeypatch.chdir(REPOSITORY)
  monkeypatch.setattr(sys, "argv", ["main", *ours])  # where overrides are from
  config_flags.register_flag_parser_for_type(tuple, main._TupleParser())
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", flag_values=values)
  values(sys.argv)
  config = values.config
  keys.check(config)
  _check_tuples(config, _defaults(values["config"].config_filename))
  for file in config.of.split(",") if config.get("changes") else ():
    changes = config.changes.to_dict()
    _parse(monkeypatch, [f"--config={file}"]).update(changes)
  return config


def _parses(monkeypatch, arguments):
  try:
    _parse(monkeypatch, arguments)
  except (AttributeError, KeyError, TypeError, ValueError, flags.Error):
    return False
  return True


def _keys(config, prefix=""):
  for name, value in config.items():
    yield f"{prefix}{name}"
    if isinstance(value, ConfigDict):
      yield from _keys(value, f"{prefix}{name}.")


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_keys_that_their_config_takes(page, monkeypatch):
  for block in _blocks(_text(page), "bash"):
    for command in _commands(block):
      _parse(monkeypatch, command)


@pytest.mark.parametrize("page", PAGES)
def test_options_belong_to_a_config_of_their_section(page, monkeypatch):
  """A table's `--config.KEY=VALUE` goes with a command near it."""
  for section in _sections(_text(page)):
    blocks, inline = _blocks(section, "bash"), _inline(section)
    commands = [x for lines in (*blocks, *inline) for x in _commands(lines)]
    for code in inline:
      options = [w for w in shlex.split(code) if w.startswith("--config.")]
      fits = not options or any(
        _parses(monkeypatch, [*command, *options]) for command in commands
      )
      assert fits, f"{code} fits none of {[x[0] for x in commands]}"


@pytest.mark.parametrize("config", CONFIGS)
def test_docstrings_of_configs_have_keys_that_they_take(config, monkeypatch):
  text = ast.get_docstring(ast.parse(_text(config)))
  commands = list(_commands(re.sub(r"^(?! ).*", "", text, flags=re.M)))
  assert commands and all(f"--config={config}" in x for x in commands)
  for command in commands:
    _parse(monkeypatch, command)
  sentences = re.sub(r"^ .*", "", text, flags=re.M)
  for option in re.findall(r"--config\.\S+", sentences):
    _parse(monkeypatch, [f"--config={config}", option.rstrip(".,;")])


@pytest.mark.parametrize("page", PAGES)
def test_keys_in_sentences_exist(page):
  known = {key for config in CONFIGS for key in _keys(_defaults(config))}
  groups = {key.partition(".")[0] for key in known if "." in key}
  for code in _inline(_text(page)):
    group, _, rest = code.partition(".")
    if group in groups and re.fullmatch(r"[a-z_0-9.]+", rest):
      assert code in known or rest in ("json", "md", "png"), f"{code} is no key"


def _exists(file):
  names = [file]
  while any("{" in name for name in names):  # as a shell would: a{1,2}.py
    names = [
      f"{start}{choice}{end}"
      for start, choices, end in (
        re.fullmatch(r"(.*?)\{([^}]*)\}(.*)", name).groups() for name in names
      )
      for choice in choices.split(",")
    ]
  return all(
    any(list(REPOSITORY.glob(f"{place}/{name}".strip("/"))) for place in PLACES)
    for name in names
  )


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS])
def test_files_and_names_that_are_mentioned_exist(page):
  text = _text(page)
  code = _blocks(text, "bash") + _inline(text)
  if page in CONFIGS:
    code = [ast.get_docstring(ast.parse(text))]
  for file in (file for part in code for file in FILE.findall(part)):
    assert _exists(file) or "my_" in file, f"{file} does not exist"
  for name in re.findall(r"\bdcae_jax(?:\.[A-Za-z]\w*)+", text):
    pkgutil.resolve_name(name)
  for module in re.findall(r"-m\s(benchmarks\.\w+)", text):
    assert _exists(f"{module.replace('.', '/')}.py"), module
  public = dcae_jax.Autoencoder
  for name in re.findall(r"\bae\.(\w+)", text):
    assert hasattr(public, name) or f"  {name}: " in public.__doc__, name


def _tree(block):
  """Of a module; or of one row of a table, `"name": value,`."""
  is_row = re.match(r'(#.*\n)?"\w+":', block)
  return ast.parse(f"{{\n{block}}}" if is_row else block)


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_use_what_exists(page):
  for block in _blocks(_text(page), "python"):
    modules = {}
    for node in ast.walk(_tree(block)):
      if isinstance(node, ast.ImportFrom):
        package = node.module.partition(".")[0]
        for alias in node.names if package in ("configs", "dcae_jax") else ():
          found = pkgutil.resolve_name(f"{node.module}.{alias.name}")
          modules[alias.asname or alias.name] = found
    for node in ast.walk(_tree(block)):
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        owner = modules.get(node.value.id)
        assert owner is None or hasattr(owner, node.attr), ast.unparse(node)


def test_the_readme_is_short():
  assert len(_text("README.md").splitlines()) < 200


@pytest.mark.parametrize("page", PAGES)
def test_rows_of_a_table_have_as_many_cells(page):
  for above, line in itertools.pairwise(_text(page).splitlines()):
    if above.startswith("| ") and line:
      assert line.startswith("| ") and line.count("|") == above.count("|"), line


def test_the_site_builds_without_a_warning(tmp_path):
  """Links, anchors and docstrings included."""
  built = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=False,
  )
  assert built.returncode == 0, built.stderr
  page = (tmp_path / "api/index.html").read_text()
  assert "measure_scaling_factor" in page
