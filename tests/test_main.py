"""Which processes belong together: SLURM steps are found, others are named."""

import logging
import os
import subprocess
import sys
import types

import pytest
from conftest import REPOSITORY, run_main

from dcae_jax import errors, main


def test_the_processes_of_a_slurm_step_find_each_other():
  """Both get past the start, and then find that the config names nothing."""
  step = {
    "SLURM_JOB_ID": str(os.getpid()),  # jax takes its port from it
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
  }
  code = (
    "import sys; sys.argv = ['main', '--config=configs/plan.py']\n"
    "import atexit, jax\n"
    "initialize = jax.distributed.initialize\n"
    "def told(**given):\n"
    "  initialize(**given)\n"
    "  print('process', jax.process_index(), 'of', jax.process_count(),"
    " flush=True)\n"
    "jax.distributed.initialize = told\n"
    "import runpy; runpy.run_module('dcae_jax.main', run_name='__main__')\n"
  )
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", code],
      cwd=REPOSITORY,
      env=os.environ | step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for i, process in enumerate(processes):
    output, messages = process.communicate(timeout=120)
    assert f"process {i} of 2" in output, messages
    assert process.returncode == 2 and "config.of is empty" in messages


def test_one_task_of_slurm_and_a_laptop_go_alone(monkeypatch):
  monkeypatch.setenv("SLURM_STEP_NODELIST", "localhost")
  monkeypatch.setenv("SLURM_NTASKS", "1")
  found = run_main("configs/plan.py")
  assert found.returncode == 2 and "config.of is empty" in found.stderr


def test_processes_that_jax_cannot_find_are_to_be_named():
  found = run_main("configs/plan.py", "--distributed")
  assert found.returncode == 2
  assert "name them with --coordinator_address" in found.stderr


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("", ()),
    ("a", ("a",)),
    ("[block_pca]", ("block_pca",)),
    ("[a/b, gs://c/d]", ("a/b", "gs://c/d")),
    ("[runs/a,mit-han-lab/dc-ae-f32c32-in-1.0-diffusers]",
     ("runs/a", "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers")),
    ("['a','b',]", ("a", "b")),
    ("(256,512)", (256, 512)),
    ("('lpips',)", ("lpips",)),
    ("()", ()),
  ],
)  # fmt: skip
def test_tuples_on_the_command_line_need_no_quotes(text, expected):
  assert main._TupleParser().parse(text) == expected


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config.runs=PATH"], "error: flag --config.runs=PATH: this is not a "
     "dictionary, such as \"{'name': 'PATH'}\""),
    (["--config.samples=x"],
     "error: flag --config.samples=x: this is not a whole number, such as 8"),
    (["--config.max_megapixels=x"],
     "error: flag --config.max_megapixels=x: this is not a number, such as "
     "1e-4"),
    (["--config.source.captions=x"],
     "error: flag --config.source.captions=x: this is not True or False"),
    (["--config.source=x"], "error: config.source is a group of keys; set one "
     "of captions, classes, columns, held_out, kind, members, name, options, "
     "part, path, split, weight: --config.source.KEY=x"),
    (["--config.batch=3"],
     "error: config.batch is no key; did you mean config.batch_size?"),
    (["--noconfig.source.caption"], "error: config.source.caption is no key; "
     "did you mean config.source.captions?"),
    (["--workdir="], "error: --workdir is empty; name a directory, local or "
     "gs://, for what is written"),
    (["--workdir=a\udcff"],
     "error: --workdir=a\\udcff is not UTF-8; rename what it names"),
    (["--config.reference=a\udcff"],
     "error: --config.reference=a\\udcff is not UTF-8; rename what it names"),
  ],
)  # fmt: skip
def test_what_is_wrong_with_an_argument_is_one_line(arguments, message):
  found = run_main("configs/report.py", *arguments)
  assert (found.returncode, found.stderr) == (2, f"{message}\n")


@pytest.mark.parametrize("module", ["dcae_jax", "dcae_jax.main"])
def test_the_config_comes_first_or_as_a_flag(module, tmp_path):
  """Whichever module is run, in a directory with other configs."""
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "__init__.py").write_text("base = 3\n")
  for config in ("plan", "--config=plan"):
    found = subprocess.run(
      [sys.executable, "-m", module, config, "--config.of=mine", "--help"],
      cwd=tmp_path,
      env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
      capture_output=True,
      text=True,
      check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "\n  of = 'mine'\n" in found.stdout


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "the config is missing; begin with a file, or one of the names that "
     "--help lists"),
    (["--workdir=a", "plan"], "the config is missing; begin with a file, or "
     "one of the names that --help lists"),
    (["plam"], "config file 'plam' does not exist; did you mean plan?"),
    (["plan", "--config=report"], "unexpected arguments ['plan']; there is one "
     "config, and options are --workdir=DIR and --config.KEY=VALUE"),
  ],
)  # fmt: skip
def test_what_is_wrong_with_the_config_that_is_named(arguments, message):
  command = [sys.executable, "-m", "dcae_jax", *arguments]
  found = subprocess.run(
    command, cwd=REPOSITORY, capture_output=True, text=True, check=False
  )
  assert (found.returncode, found.stderr) == (2, f"error: {message}\n")


def _printed(*arguments):
  """What a process prints that must not import JAX."""
  code = (
    "import runpy, sys\nsys.modules['jax'] = None\n"
    f"sys.argv = ['dcae', *{arguments}]\n"
    "runpy.run_module('dcae_jax', run_name='__main__', alter_sys=True)\n"
  )
  command = [sys.executable, "-c", code]
  found = subprocess.run(
    command, cwd=REPOSITORY, capture_output=True, text=True, check=False
  )
  assert (found.returncode, found.stderr) == (0, "")
  return found.stdout


def test_help_needs_no_config_and_no_jax():
  page = _printed("--help")
  assert page.startswith("usage: dcae CONFIG --workdir=DIR")
  assert "\n  train_phases " in page and "\n  --process_id " in page
  assert "--verbosity" not in page  # of others


def test_help_on_a_config_shows_its_keys_as_the_command_line_has_them():
  page = _printed("quickstart", "--config.phase1.steps=3", "-h")
  assert "\n  phase1.steps = 3  # " in page


def test_help_can_be_read_in_part():
  """As by `head`, which closes the pipe."""
  command = [sys.executable, "-m", "dcae_jax", "--help"]
  reading, writing = os.pipe()
  os.close(reading)
  found = subprocess.run(
    command,
    cwd=REPOSITORY,
    stdout=writing,
    stderr=subprocess.PIPE,
    text=True,
    check=False,
  )
  os.close(writing)
  assert (found.returncode, found.stderr) == (0, "")


def _end(command, **options):
  """The exit code, and what is said of a mistake."""
  found = subprocess.run(
    command, stderr=subprocess.PIPE, text=True, check=False, **options
  )
  return found.returncode, found.stderr


def test_help_that_cannot_be_written_is_one_line():
  command = [sys.executable, "-m", "dcae_jax", "--help"]
  with open("/dev/full", "w") as full:
    ended = _end(command, cwd=REPOSITORY, stdout=full)
  assert ended == (2, "error: [Errno 28] No space left on device\n")


def test_a_current_directory_that_is_gone_is_no_mistake(tmp_path):
  gone = tmp_path / "gone"
  gone.mkdir()
  ended = _end(
    f"rmdir {gone} && exec {sys.executable} -m dcae_jax plam",
    cwd=gone,
    shell=True,
    env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
  )
  message = "error: config file 'plam' does not exist; did you mean plan?\n"
  assert ended == (2, message)


def test_what_is_wrong_with_a_config_file_is_one_line(tmp_path):
  path = tmp_path / "run.py"
  path.write_text("def get_config():\n  return {}['steps']\n")
  found = run_main(str(path), f"--workdir={tmp_path}")
  expected = f"error: config file {path}, line 2: KeyError: 'steps'\n"
  assert (found.returncode, found.stderr) == (2, expected)


def test_dictionaries_are_written_as_python_does():
  parser = main._DictParser()
  assert parser.parse("{'a': 'b'}").to_dict() == {"a": "b"}
  assert parser.parse(parser.parse("{}")).to_dict() == {}
  for text in ("a", "{a}", "3", "['x']", "{'a'"):
    with pytest.raises(ValueError, match="this is not a dictionary, such as"):
      parser.parse(text)


@pytest.mark.parametrize(
  "raised, status",
  [
    (errors.UserError("the side is odd"), 2),
    (OSError(28, "No space left on device"), 2),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2),
    (ValueError("zip() argument 2 is shorter than argument 1"), None),
    (OSError("without a number"), None),
  ],
)
def test_mistakes_of_users_have_a_line_and_bugs_a_traceback(
  raised, status, monkeypatch, capsys
):
  def run(config, workdir):
    raise raised

  monkeypatch.setattr(main, "_run", run)
  values = {"config": None, "workdir": None, "distributed": False}
  values |= {"num_processes": None}
  monkeypatch.setattr(main.flags, "FLAGS", types.SimpleNamespace(**values))
  if status is None:
    with pytest.raises(type(raised)):
      main.main(["main"])
    return
  assert main.main(["main"]) == status
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and str(raised) in line


def test_names_do_nothing_to_the_terminal(capsys):
  assert main._fail("there is no a\x1b]0;title\x07\x9b2J\n b") == 2
  line = r"error: there is no a\x1b]0;title\x07\x9b2J b"
  assert capsys.readouterr().err == f"{line}\n"
  record = logging.LogRecord(
    "dcae_jax", logging.INFO, "", 0, "| a |\n|\t%s |", ("\x1b[8m\r",), None
  )
  assert main._Formatter().format(record) == "| a |\n|\t\\x1b[8m\\r |"
