"""The package as others have it: its face, and the wheel, outside the clone."""

import email
import functools
import os
import pydoc
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import REPOSITORY, smooth_image
from PIL import Image

import dcae_jax

FACE = ("Autoencoder", "Denoiser", "TextEncoder", "load", "load_denoiser")


def _python(*arguments, **options):
  return subprocess.run(
    [sys.executable, *arguments],
    capture_output=True,
    text=True,
    check=False,
    **options,
  )


def test_help_shows_the_face():
  page = pydoc.plain(pydoc.render_doc(dcae_jax))
  for name in FACE:
    assert name in dir(dcae_jax)
    assert f"\n    class {name}(" in page or f"\n    {name}" in page, name
    document = getattr(dcae_jax, name).__doc__
    assert document.splitlines()[0] in page, name
  assert f"\nVERSION\n    {dcae_jax.__version__}\n" in page


def test_the_package_alone_imports_no_jax():
  code = (
    "import dcae_jax, sys; dcae_jax.__version__; print('jax' in sys.modules)"
  )
  found = _python("-c", code, cwd=REPOSITORY)
  assert (found.stdout, found.stderr) == ("False\n", "")


def test_an_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'lood'"):
    dcae_jax.lood  # noqa: B018


# --- the wheel: built from what is here, by the backend itself, offline -------
_BUILD = """
import os, sys
os.environ["SETUPTOOLS_SCM_PRETEND_VERSION_FOR_DCAE_JAX"] = "1.2.3"
from setuptools import build_meta
build_meta.build_wheel(sys.argv[1])
"""


def _build(tree, place):
  """The wheel of a tree; the clone itself stays as it is."""
  found = _python("-c", _BUILD, str(place), cwd=tree)
  assert found.returncode == 0, found.stderr
  (wheel,) = place.glob("*.whl")
  return wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
  tree = tmp_path_factory.mktemp("tree")
  for name in ("configs", "dcae_jax"):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / name, tree / name, ignore=ignored)
  for path in REPOSITORY.iterdir():
    if path.is_file():
      shutil.copy(path, tree)
  return _build(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def run_installed(wheel, tmp_path_factory):
  """A function: Python with the wheel unpacked, in a directory of a user's."""
  place = tmp_path_factory.mktemp("installed")
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(place)
  user = tmp_path_factory.mktemp("user")
  (user / "configs").mkdir()
  for name in ("__init__", "base"):
    (user / "configs" / f"{name}.py").write_text("raise KeyError('mine')\n")
  environment = os.environ | {"PYTHONPATH": str(place)}
  return functools.partial(_python, cwd=user, env=environment)


def test_the_wheel_holds_all_files_and_no_others(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  held = {name for name in names if ".dist-info/" not in name}
  here = {
    f"{prefix}{path.relative_to(REPOSITORY)}"
    for folder, prefix in (("dcae_jax", ""), ("configs", "dcae_jax/"))
    for path in (REPOSITORY / folder).rglob("*")
    if path.is_file() and path.suffix in (".py", ".json", ".typed")
  }
  assert held == here
  assert {"dcae_jax/py.typed", "dcae_jax/configs/base.py"} <= held
  assert "dcae_jax/data/sources/embedded_captions.json" in held
  (scripts,) = [name for name in names if name.endswith("/entry_points.txt")]
  text = zipfile.ZipFile(wheel).read(scripts).decode()
  assert "dcae = dcae_jax.__main__:main\n" in text


def test_the_version_is_that_of_the_tag(wheel, run_installed):
  (name,) = [x for x in zipfile.ZipFile(wheel).namelist() if "/METADATA" in x]
  told = email.message_from_bytes(zipfile.ZipFile(wheel).read(name))
  assert told["Version"] == "1.2.3"
  found = run_installed("-c", "import dcae_jax; print(dcae_jax.__version__)")
  assert found.stdout == "1.2.3\n", found.stderr
  found = run_installed("-m", "dcae_jax", "--version")
  assert found.stdout == "dcae_jax 1.2.3\n", found.stderr


def test_packaged_configs_are_found_from_anywhere(run_installed):
  """With whatever is called `configs` there."""
  found = run_installed("-m", "dcae_jax", "f64_phase2", "--help")
  assert found.returncode == 0, found.stderr
  assert "\n  model.variant = 'f64c128'\n" in found.stdout
  code = (
    "import sys; sys.argv = ['dcae', 'f64_phase2', '--help']\n"
    "sys.path[0] = '/usr/bin'  # as for a command\n"
    "from dcae_jax import __main__ as command; command.main()\n"
  )
  assert run_installed("-c", code).stdout == found.stdout


def test_a_task_runs_from_anywhere(
  run_installed, tiny_autoencoder, compilation_cache, tmp_path
):
  Image.fromarray(smooth_image(0, 16, 16)).save(tmp_path / "photo.png")
  found = run_installed(
    "-m", "dcae_jax.main", "reconstruct", f"--workdir={tmp_path / 'run'}",
    f"--config.init_from={tiny_autoencoder}",
    f"--config.input={tmp_path / 'photo.png'}",
    f"--config.compilation_cache={compilation_cache}",
  )  # fmt: skip
  assert found.returncode == 0, found.stderr
  assert (tmp_path / "run" / "result.json").exists()


def test_a_config_file_that_is_its_own_plugin_runs_from_anywhere(
  run_installed, examples, photographs, tmp_path
):
  found = run_installed(
    "-m", "dcae_jax", str(examples / "my_task.py"), f"--workdir={tmp_path}",
    f"--config.source.path={photographs}", cwd=examples,
  )  # fmt: skip
  assert found.returncode == 0, found.stderr
  assert (tmp_path / "result.json").exists()
