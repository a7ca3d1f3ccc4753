"""What `--help` prints: tasks, configs and flags; or the keys of a config.

Nothing is described here. Tasks and configs are as the first lines of their
files say, and keys as the comments of `configs/base.py`: read, not imported.
"""

import ast
import collections
import io
import pathlib
import textwrap
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dcae_jax.runs import config_files

_WIDTH = 80
_USAGE = """\
usage: dcae CONFIG --workdir=DIR [--config.KEY=VALUE ...]

CONFIG is a config file, or the name of one of those below. With --help it shows
its keys: dcae f64_phase2 --help
The same: python -m dcae_jax.main --config=CONFIG --workdir=DIR
dcae --version shows the version."""
_OF_CONFIG = """\
The keys, with the values that they have here; others: --config.KEY=VALUE. What
is said of them is of configs/base.py and its defaults, and is said once."""


def general(tasks: Iterable[str], flags: Mapping[str, str]) -> str:
  """Usage, tasks, configs and flags, the last ones with what they are."""
  folder = pathlib.Path(__file__).parents[1] / "tasks"
  described = {name: _first_line(folder / f"{name}.py") for name in tasks}
  configs, studies = {}, {}
  for name, path in config_files.packaged().items():
    rows = studies if name.startswith("studies/") else configs
    rows[name] = _first_line(path)
  return "\n\n".join(
    [
      _USAGE,
      _table("tasks, of which a config names one", described),
      _table("configs", configs),
      _table("configs of studies", studies),
      _table("flags", {f"--{name}": text for name, text in flags.items()}),
    ]
  )


def _first_line(path: pathlib.Path) -> str:
  text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
  return text.partition("\n")[0]


def _table(title: str, rows: Mapping[str, str]) -> str:
  width = max(map(len, rows)) + 2
  lines = [f"{title}:"]
  for name, text in rows.items():
    start, rest = f"  {name:{width}}", " " * (width + 2)
    lines.append(_wrapped(text, start, rest))
  return "\n".join(lines)


def _wrapped(text: str, start: str, rest: str) -> str:
  return textwrap.fill(
    text,
    _WIDTH,
    initial_indent=start,
    subsequent_indent=rest,
    break_long_words=False,
    break_on_hyphens=False,
  )


def of_config(name: str, config: Mapping[str, Any]) -> str:
  """The keys of a config that is called so, with values and comments."""
  file = config_files.find(name.partition(":")[0])
  title = f"{name}: {_first_line(file)}"
  lines = [_wrapped(title, "", ""), "", _OF_CONFIG, ""]
  described = _Base((config_files.FOLDER / "base.py").read_text("utf-8"))
  said = set()
  for path, value, comment in _keys(config, described, "", {}):
    line = f"  {path}" if value is None else f"  {path} = {value}"
    key = (path.rpartition(".")[2], comment)
    if key in said:
      comment = ""
    said.add(key)
    if comment and len(line) + len(comment) + 4 <= _WIDTH:
      lines.append(f"{line}  # {comment}")
      continue
    lines.append(_wrapped(line.strip(), "  ", "      "))
    if comment:
      lines.append(_wrapped(comment, "      # ", "      # "))
  return "\n".join(lines)


def _keys(
  config: Mapping[str, Any],
  base: "_Base",
  prefix: str,
  comments: Mapping[str, str],
) -> Iterator[tuple[str, str | None, str]]:
  """Path, value and comment, in the order of `configs/base.py`.

  A group that has a comment comes by itself. The comments are of paths from
  where the prefix ends.
  """
  if isinstance(config.get("task"), str):
    yield f"{prefix}task", repr(config["task"]), ""
    comments = base.comments_of_task(config["task"])
  order = {path: i for i, path in enumerate(comments)}
  for name in sorted(config, key=lambda name: order.get(name, len(order))):
    value, comment = config[name], comments.get(name, "")
    if not isinstance(value, Mapping) or not value:
      if name != "task":
        yield f"{prefix}{name}", repr(value), comment
      continue
    if comment:
      yield f"{prefix}{name}", None, comment
    start = f"{name}."
    inner = {
      path.removeprefix(start): text
      for path, text in comments.items()
      if path.startswith(start)
    }
    yield from _keys(value, base, f"{prefix}{name}.", inner)


class _Base:
  """The source of `configs/base.py`: functions that make groups of keys."""

  def __init__(self, source: str):
    body = ast.parse(source).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    self._functions = {node.name: node for node in functions}
    self._tasks = {task: node for node in functions for task in _named(node)}
    self._above: dict[int, str] = {}  # comments alone on their lines
    self._beside: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
      if token.type == tokenize.COMMENT:
        is_alone = not token.line[: token.start[1]].strip()
        lines = self._above if is_alone else self._beside
        lines[token.start[0]] = token.string.removeprefix("#").strip()
    assigned = {
      ast.unparse(node.targets): node
      for node in body
      if isinstance(node, ast.Assign)
    }
    plugins = assigned.get("PLUGINS")  # a key of every task
    self._of_all_tasks = {"plugins": self._comment(plugins)} if plugins else {}

  def comments_of_task(self, task: str) -> dict[str, str]:
    """By the paths of a task's keys, in their order; maybe ""."""
    function = self._tasks.get(task)
    return self._comments(function) | self._of_all_tasks if function else {}

  def _comments(self, function: ast.FunctionDef) -> dict[str, str]:
    """By paths. What is said first counts: later, a key has another default."""
    found: dict[str, str] = {}

    def add(path: str, text: str) -> None:
      found[path] = found.get(path) or " ".join(text.split())

    for node in function.body:
      if isinstance(node, ast.Assign):
        text = self._comment(node)
        for target, value in _assignments(node):
          path = ".".join(target)
          add(path, text)
          for called in self._groups(value):
            add(path, ast.get_docstring(called) or "")
            for inner, comment in self._comments(called).items():
              add(f"{path}.{inner}".strip("."), comment)
      elif isinstance(node, ast.Expr):  # c.update(group())
        for called in self._groups(node.value):
          for inner, comment in self._comments(called).items():
            add(inner, comment)
    found.pop("", None)
    return found

  def _groups(self, value: ast.expr) -> Iterator[ast.FunctionDef]:
    """Functions of this file that make what is within an expression."""
    for node in ast.walk(value):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        function = self._functions.get(node.func.id)
        is_change = any(
          isinstance(x, ast.Call | ast.Attribute) for x in node.args
        )
        if function and not is_change:
          yield function

  def _comment(self, node: ast.Assign) -> str:
    """What stands above a statement, and at the ends of its lines."""
    lines: collections.deque[str] = collections.deque()
    number = node.lineno - 1
    while not self._above.get(number, "---").startswith("---"):
      lines.appendleft(self._above[number])
      number -= 1
    for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
      lines.append(self._beside.get(number, ""))
    return " ".join(line for line in lines if line and line != "fmt: skip")


def _named(function: ast.FunctionDef) -> Iterator[str]:
  """The task that keys are of: `@task("prepare")`, `c.task = "prepare"`."""
  for decorator in function.decorator_list:
    if isinstance(decorator, ast.Call):
      yield ast.literal_eval(decorator.args[0])
  for node in function.body:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets) == "c.task":
      yield ast.literal_eval(node.value)


def _assignments(
  node: ast.Assign,
) -> Iterator[tuple[list[str], ast.expr]]:
  """What is set, as names below `c`, and to which value."""
  for target in node.targets:
    pairs = [(target, node.value)]
    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
      pairs = list(zip(target.elts, node.value.elts, strict=True))
    for single, value in pairs:
      root, *names = ast.unparse(single).split(".")
      if root == "c":
        yield names, value
