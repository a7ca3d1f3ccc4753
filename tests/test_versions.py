"""The locked versions: those that pyproject.toml asks for, with hashes."""

import pathlib
import re
import tomllib

import pytest
from packaging import requirements, utils

REPOSITORY = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
EXTRAS = {
  "": ["all"],
  "-quickstart": ["all", "quickstart"],
  "-cuda12": ["all", "cuda12"],
  "-tpu": ["all", "tpu"],
  "-dev": ["dev"],
}


def _asked(*extras: str) -> list[requirements.Requirement]:
  """What the project and its extras require, and what builds it."""
  asked = [
    *PROJECT["project"]["dependencies"],
    *PROJECT["dependency-groups"]["build"],
  ]
  left = list(extras)
  while left:
    for text in PROJECT["project"]["optional-dependencies"][left.pop()]:
      requirement = requirements.Requirement(text)
      if requirement.name == "dcae_jax":
        left += requirement.extras
      else:
        asked.append(text)
  return [requirements.Requirement(text) for text in asked]


def _locked(name: str, python: str) -> dict[str, str]:
  """Versions by name, on Linux; each has a hash."""
  text = (REPOSITORY / f"requirements{name}.txt").read_text()
  environment = {
    "python_full_version": f"{python}.1",
    "python_version": python,
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "implementation_name": "cpython",
  }
  versions = {}
  for entry in re.sub(r"#.*|\\\n", "", text).strip().splitlines():
    pin, *hashes = re.split(r"\s+--hash=", entry)
    requirement = requirements.Requirement(pin)
    assert hashes and all(
      re.fullmatch(r"sha256:[0-9a-f]{64}\s*", x) for x in hashes
    )
    if requirement.marker and not requirement.marker.evaluate(environment):
      continue
    package = utils.canonicalize_name(requirement.name)
    assert package not in versions
    (version,) = requirement.specifier
    assert version.operator == "=="
    versions[package] = version.version
  return versions


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("name", EXTRAS)
def test_locked_versions_are_those_that_the_project_asks_for(name, python):
  locked = _locked(name, python)
  for asked in _asked(*EXTRAS[name]):
    assert locked[utils.canonicalize_name(asked.name)] in asked.specifier


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_what_was_tested_is_what_is_installed(python):
  tested = _locked("-dev", python)
  for name in EXTRAS:
    for package, version in _locked(name, python).items():
      # What moves the work to GPUs is not installed where it is tested.
      if not package.startswith(("jax-cuda12", "nvidia-")):
        assert tested[package] == version, package


def test_hooks_before_a_commit_have_the_versions_of_the_tests():
  text = (REPOSITORY / ".pre-commit-config.yaml").read_text()
  hooks = re.findall(r"additional_dependencies: \[(\S+)==(\S+)\]", text)
  locked = _locked("-dev", "3.11")
  assert hooks == [(name, locked[name]) for name, _ in hooks] and hooks
