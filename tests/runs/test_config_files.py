import os
import re
import sys
import types

import pytest

from configs import base
from dcae_jax.runs import config_files

_FILE = "import types\n\n\ndef get_config():\n  {}\n"


@pytest.mark.parametrize(
  "body, message",
  [
    ("return {}['steps']", ", line 5: KeyError: 'steps'"),
    ("return 1 / 0", ", line 5: ZeroDivisionError: division by zero"),
    ("return = 3", ", line 5: SyntaxError: invalid syntax"),
    (
      "return open('/nowhere')",
      ", line 5: FileNotFoundError: [Errno 2] No such",
    ),
    ("import nowhere", ", line 5: ModuleNotFoundError: No module named"),
    (
      "def f(): raise KeyError('inner')\n\n  f()",
      ", line 5: KeyError: 'inner'",
    ),
    ("raise ValueError('first\\nsecond')", ", line 5: ValueError: first"),
    ("raise SystemExit(3)", ", line 5: SystemExit: 3"),
    ("pass", ": get_config returns NoneType, and no config with a task"),
    (
      "return {'task': 'plan'}",
      ": get_config returns dict, and no config with",
    ),
  ],
)
def test_an_error_in_a_config_file_has_its_line(body, message, tmp_path):
  path = tmp_path / "run.py"
  path.write_text(_FILE.format(body))
  expected = re.escape(f"config file {path}{message}")
  with pytest.raises(ValueError, match=f"^{expected}") as refused:
    config_files.load(str(path))
  assert "\n" not in str(refused.value)


def test_a_config_file_may_be_told_something(tmp_path):
  path = tmp_path / "run.py"
  path.write_text(
    "import types\n\n\ndef get_config(task):\n"
    "  return types.SimpleNamespace(task=task)\n"
  )
  assert config_files.load(f"{path}:plan").task == "plan"
  with pytest.raises(
    ValueError, match="missing 1 required positional argument"
  ):
    config_files.load(str(path))


def test_only_regular_files_are_configs(tmp_path):
  os.mkfifo(tmp_path / "pipe.py")
  (tmp_path / "other.py").write_text("x = 3")
  for name, message in (
    ("pipe.py", "does not exist"),
    ("absent.py", "does not exist; --help has some"),
    ("", "does not exist"),
    ("other.py", "it has no function get_config"),
  ):
    with pytest.raises(ValueError, match=message):
      config_files.load(str(tmp_path / name))


@pytest.mark.parametrize(
  "name, task",
  [("f64_phase2", "train_autoencoder"), ("studies/learning:1", "study")],
)
def test_a_name_alone_is_a_config_of_this_package(
  name, task, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  assert config_files.load(name).task == task


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  told = "import types\n\n\ndef get_config():\n  "
  text = told + "return types.SimpleNamespace(task='mine')\n"
  (tmp_path / "f64_phase2").write_text(text)
  assert config_files.load("f64_phase2").task == "mine"


@pytest.mark.parametrize(
  "name, meant",
  [
    ("f64_phas2", "f64_phase2"),
    ("configs/quickstart.py", "quickstart"),
    ("../there/configs/studies/learning.py:1", "studies/learning"),
    ("learnin", "studies/learning"),
    ("mine.py", "--help has some"),
    ("base", "--help has some"),
  ],
)
def test_an_unknown_config_says_which_is_meant(
  name, meant, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="does not exist; ") as refused:
    config_files.load(name)
  path, advice = name.partition(":")[0], str(refused.value).split("; ")[1]
  assert str(refused.value).startswith(f"config file {path!r} does")
  assert meant in advice


@pytest.fixture
def of_a_user(tmp_path, monkeypatch):
  """A current directory with a package `configs` of its own, imported."""
  folder = tmp_path / "configs"
  folder.mkdir()
  (folder / "__init__.py").write_text("")
  for name in ("base", "other", "quickstart"):
    (folder / f"{name}.py").write_text(f"NAME = 'my {name}'\n")
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  mine = types.ModuleType("configs")
  monkeypatch.setitem(sys.modules, "configs", mine)
  monkeypatch.delitem(sys.modules, "configs.base")
  monkeypatch.setattr(config_files, "_base", base)
  return mine


def test_config_files_import_our_base_and_else_their_neighbours(of_a_user):
  path = "configs/run.py"
  with open(path, "w") as file:
    file.write(
      "import types\nfrom configs import base, other, plan, quickstart\n\n\n"
      "def get_config():\n  from configs import base as again\n"
      "  return types.SimpleNamespace(task=3, found=(base, again, other.NAME,"
      " plan.get_config().task, quickstart.NAME))\n"
    )
  expected = (base, base, "my other", "plan", "my quickstart")
  assert config_files.load(path).found == expected
  # Those of this package keep to themselves.
  assert config_files.load("studies/learning:1").base.phase
  assert sys.modules["configs"] is of_a_user
  assert "configs.base" not in sys.modules


def test_a_plugin_of_a_folder_configs_is_imported_once(of_a_user):
  text = "from configs import base\n\n\nclass Source:\n  base = base\n"
  with open("configs/mine.py", "w") as file:
    file.write(text)
  config = {"plugins": ("configs.mine",)}
  config_files.import_plugins(config)
  found = sys.modules.pop("configs.mine")
  try:
    assert found.base is base and found.Source.base is base
    sys.modules["configs.mine"] = found
    config_files.import_plugins(config)
    assert sys.modules["configs.mine"] is found  # loaders are sent its classes
  finally:
    sys.modules.pop("configs.mine", None)


def test_modules_of_plugins_import_the_same(of_a_user):
  with open("my_plugin.py", "w") as file:
    file.write("from configs import base, other")
  config_files.import_plugins({"plugins": ("my_plugin",)})
  plugin = sys.modules.pop("my_plugin")
  assert (plugin.base, plugin.other.NAME) == (base, "my other")
  assert sys.modules["configs"] is of_a_user


def test_our_base_is_read_where_another_one_has_its_name(
  of_a_user, monkeypatch
):
  monkeypatch.setattr(config_files, "_base", None)
  with config_files.importable():
    from configs import base as found
  assert found.__file__ == base.__file__ and "plan" in found.KEYS
  with config_files.importable():
    from configs import base as again
  assert again is found


_CONFIG = {
  "batch_size": 8,
  "discriminator": {"learning_rate": 0.0},
  "optimizer": {"learning_rate": 0.1, "weight_decay": 0.1},
  "data": {"source": {"path": ""}, "flip": True},
  "model": {"architecture": {}},
}


@pytest.mark.parametrize(
  "key, message",
  [
    ("optimizer.lr", "; did you mean config.optimizer.learning_rate?"),
    ("optimizer.wd", "; did you mean config.optimizer.weight_decay?"),
    ("optimiser.weight_decay", "; did you mean config.optimizer.weight_decay?"),
    ("batchsize", "; did you mean config.batch_size?"),
    ("bs", "; did you mean config.batch_size?"),
    ("data.batch_size", "; did you mean config.batch_size?"),
    ("flip", "; did you mean config.data.flip?"),
    ("learning_rate", "; did you mean config.optimizer.learning_rate or config."
     "discriminator.learning_rate?"),
    ("data.zoom", "; config.data has flip, source"),
    ("zoom", "; config has batch_size, data, discriminator, model, optimizer"),
    ("batch_size.x", "; config.batch_size is one, and has no others below it"),
    ("model.architecture.x", "; config.model.architecture is empty; give it as "
     "a whole, --config.model.architecture=\"{'x': 3}\""),
  ],
)  # fmt: skip
def test_an_unknown_key_says_what_is_meant(key, message):
  with pytest.raises(ValueError, match="is no key") as refused:
    config_files.check_key(key, "3", _CONFIG)
  assert str(refused.value) == f"config.{key} is no key{message}"


def test_a_group_takes_no_value_but_a_dictionary():
  config_files.check_key("data.source", "{'path': 'x'}", _CONFIG)
  config_files.check_key("data.source.path", "x", _CONFIG)
  config_files.check_key("data['source'].path", "x", _CONFIG)
  expected = (
    "config.data.source is a group of keys; set one of path: "
    "--config.data.source.KEY=photos"
  )
  with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
    config_files.check_key("data.source", "photos", _CONFIG)


@pytest.mark.parametrize(
  "body, message",
  [
    ("x = {}['steps']", "module broken, line 1: KeyError: 'steps'"),
    (
      "\nimport nowhere",
      "module broken, line 2: ModuleNotFoundError: No module",
    ),
    ("x = = 3", "module broken, line 1: SyntaxError: invalid syntax"),
    ("raise SystemExit(3)", "module broken, line 1: SystemExit: 3"),
  ],
)
def test_an_error_in_a_module_has_its_line(
  body, message, tmp_path, monkeypatch
):
  (tmp_path / "broken.py").write_text(body)
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ValueError, match=re.escape(message)) as refused:
    config_files.import_plugins({"plugins": ("broken",)})
  assert "\n" not in str(refused.value)
  assert str(refused.value).startswith("config.plugins: ")


@pytest.mark.parametrize(
  "name, message",
  [
    ("nowhere", "there is no module 'nowhere' in"),
    ("json.nowhere", "there is no module 'json.nowhere' in"),
    ("nowhere.inside", "there is no module 'nowhere' in"),
    ("my-module", "which is no module; name it as `import` does"),
    ("a/b.py", "which is no module"),
    (".a", "which is no module"),
    ("json.py", "which is no module; name it as `import` does"),
    (3, "config.plugins names 3, which is no module"),
    (True, "config.plugins names True, which is no module"),
  ],
)
def test_modules_that_are_not_there_are_named(name, message, monkeypatch):
  monkeypatch.setattr("sys.path", sys.path[:])
  with pytest.raises(ValueError, match=message) as refused:
    config_files.import_plugins({"plugins": (name,)})
  assert "\n" not in str(refused.value)
