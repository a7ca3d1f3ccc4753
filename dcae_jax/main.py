"""The command line: `python -m dcae_jax.main --config=FILE --workdir=DIR`.

`dcae FILE --workdir=DIR` is the same. What `--help` prints is `help_pages`.

Flags, the work directory, and the task that the config names; nothing else.
"""

from dcae_jax.runs import signals  # isort: split

if __name__ == "__main__":
  signals.listen()  # before what takes time: the imports below

import ast
import atexit
import contextlib
import errno
import importlib
import logging
import os
import re
import sys
import threading
import traceback
from typing import NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

import dcae_jax
from dcae_jax import errors, tasks
from dcae_jax.runs import live_line, plain_text

_WITHOUT_WORKDIR = ("plan",)  # they can do without
_SHARING = ("study",)  # several processes work in the directory
_HELP = ("-h", "-help", "--help", "-helpshort", "--helpshort")


def main(argv: list[str]) -> int:
  """Runs the task; 0 when done or stopped and saved, 2 for what went wrong."""
  if argv[1:]:
    return _fail(
      f"unexpected arguments {argv[1:]}; there is one config, and options are "
      "--workdir=DIR and --config.KEY=VALUE"
    )
  try:
    with live_line.on_terminal():
      _run(flags.FLAGS.config, flags.FLAGS.workdir)
  except (errors.UserError, FloatingPointError, OSError) as error:
    if isinstance(error, OSError) and error.errno is None:
      raise
    advice = ""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
      advice = "; make room and run again: it goes on from what is saved"
    return _fail(f"{error}{advice}")
  except RuntimeError as error:
    if str(error).startswith("RESOURCE_EXHAUSTED"):
      return _fail(
        f"too little memory: {errors.first_line(error)}; use smaller batches"
      )
    if not _is_one_of_many():
      raise
    traceback.print_exc()
    return _fail(
      f"{errors.first_line(error)}; if another process has ended, see its log, "
      "and start all of them again: they go on from what is saved"
    )
  return 0


def _main(argv: list[str]) -> int:
  """As `main`; after an error the process ends at once."""
  status = main(argv)
  if status:
    _leave(status)
  return status


def _is_one_of_many() -> bool:
  return bool(
    flags.FLAGS.distributed
    or flags.FLAGS.num_processes
    or _is_slurm_step()
    or _is_tpu_host()
  )


def _leave(status: int) -> NoReturn:
  """At once: jax would wait for other processes for minutes, and so would a
  thread of a checkpoint that cannot be written.
  """
  if _is_one_of_many():
    import jax

    if jax.distributed.is_initialized():
      from dcae_jax.runs import processes

      processes.leave(status)
  else:
    atexit._run_exitfuncs()  # such as removing temporary directories
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _run(config, workdir: str | None) -> None:
  handler = logging.StreamHandler()
  handler.setFormatter(_Formatter())
  logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
  logging.getLogger("dcae_jax").setLevel(logging.INFO)
  # What fails in other packages' threads and callbacks fails the run, too,
  # which says it in one line.
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  threading.excepthook = _say_of_thread
  sys.unraisablehook = lambda _: None
  from dcae_jax.runs import config_files

  config_files.import_plugins(config.to_dict())
  if config.task not in tasks.TASKS:
    raise errors.UserError(
      f"unknown config.task {config.task!r}; known are {', '.join(tasks.TASKS)}"
    )
  if workdir == "":
    raise errors.UserError(
      "--workdir is empty; name a directory, local or gs://, for what is "
      "written"
    )
  if workdir is None and config.task not in _WITHOUT_WORKDIR:
    raise errors.UserError(
      "--workdir is missing; name a directory, local or gs://, for what is "
      "written"
    )
  from etils import epath  # loader workers import this file, and need no more

  from dcae_jax.runs import host_memory

  host_memory.keep_freed()
  _join_processes()
  from dcae_jax.runs import exclusive

  task = importlib.import_module(tasks.TASKS[config.task])
  if workdir is None:
    task.run(config, None)
    return
  workdir = os.path.expanduser(workdir)
  alone = contextlib.nullcontext()
  if config.task not in _SHARING:
    alone = exclusive.held(workdir)
  with alone:
    task.run(config, epath.Path(workdir))


def _join_processes() -> None:
  """Of a pod or a SLURM step, which jax finds; or of those that flags describe.

  Raises UserError for flags that do not fit each other, or if the others are
  not there in time.
  """
  given = {
    name: flags.FLAGS[name].value
    for name in ("coordinator_address", "num_processes", "process_id")
  }
  missing = [name for name, value in given.items() if value is None]
  if 0 < len(missing) < len(given):
    raise errors.UserError(
      f"--{missing[0]} is missing; processes need all of them"
    )
  address = given["coordinator_address"]
  if not missing and not address.rpartition(":")[2].isdigit():
    raise errors.UserError(f"--coordinator_address={address} is not HOST:PORT")
  if not missing and not 0 <= given["process_id"] < given["num_processes"]:
    raise errors.UserError(
      f"--process_id={given['process_id']} is not from 0 to "
      f"{given['num_processes'] - 1}"
    )
  if not _is_one_of_many():
    return
  import jax

  try:
    jax.distributed.initialize(**given)
  except ValueError as error:
    raise errors.UserError(
      f"jax cannot find the other processes of this run ({error}); name them "
      "with --coordinator_address, --num_processes and --process_id"
    ) from error
  except RuntimeError as error:
    raise errors.UserError(
      "the other processes of this run are not there "
      f"({errors.first_line(error)}); start all of them, with the same "
      "--coordinator_address and --num_processes"
    ) from error
  if jax.process_index():
    live_line.end()  # it is the first one's


def _is_slurm_step() -> bool:
  """Whether `srun` started several processes, of which this is one."""
  return (
    "SLURM_STEP_NODELIST" in os.environ
    and int(os.environ.get("SLURM_NTASKS", 1)) > 1
  )


def _is_tpu_host() -> bool:
  """Whether this machine has TPUs, maybe with others of the same slice."""
  if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
    return False
  import jax  # on a Cloud TPU VM it prefers its TPUs

  return (jax.config.jax_platforms or "").split(",")[0] == "tpu"


def _say_of_thread(ended: threading.ExceptHookArgs) -> None:
  """Only of our own threads, which nothing else would tell of."""
  frames = traceback.extract_tb(ended.exc_traceback)
  if any("dcae_jax" in frame.filename for frame in frames):
    threading.__excepthook__(ended)


class _Formatter(logging.Formatter):
  """Messages alone; names in them do nothing to a terminal."""

  def format(self, record: logging.LogRecord) -> str:
    return plain_text.escaped(super().format(record), kept="\n\t")


def _fail(message: str) -> int:
  line = plain_text.escaped(" ".join(message.split()))
  print(f"error: {line}", file=sys.stderr, flush=True)
  return 2


class _ConfigFile(flags.ArgumentParser):
  """The config of a file; what the command line changes must be there."""

  def parse(self, argument):
    from dcae_jax.runs import config_files

    try:
      config = config_files.load(argument)
      for given in sys.argv[1:]:
        if match := re.match(r"--?(?:no)?config\.([^=]*)=?(.*)", given):
          config_files.check_key(*match.groups(), config.to_dict())
    except errors.UserError as error:
      raise flags.Error(str(error)) from error  # else absl adds to it
    return config.lock()


class _Parser(flags.ArgumentParser):
  """Another parser, which says what it expects of a value."""

  def __init__(self, parser, expected):
    self._parser, self._expected = parser, expected

  def parse(self, argument):
    try:
      return self._parser.parse(argument)
    except (SyntaxError, TypeError, ValueError) as error:
      raise ValueError(f"this is not {self._expected}") from error


class _DictParser(flags.ArgumentParser):
  """Dictionaries as Python writes them."""

  def parse(self, argument):
    if isinstance(argument, ConfigDict):  # the default
      return argument
    try:
      return ConfigDict(dict(ast.literal_eval(argument)))
    except (SyntaxError, TypeError, ValueError) as error:
      raise ValueError(
        "this is not a dictionary, such as \"{'name': "
        f'{argument.strip("{}")!r}}}"'
      ) from error


class _TupleParser(config_flags.tuple_parser.TupleParser):
  """Tuples as Python writes them, or names and paths without quotes: [a,b]."""

  def parse(self, argument):
    try:
      ast.literal_eval(argument)
    except (SyntaxError, ValueError):  # also for what is no text
      if isinstance(argument, str):
        names = argument.strip().removeprefix("[").removesuffix("]").split(",")
        names = [name.strip().strip("'\"") for name in names]
        return tuple(name for name in names if name)
    return super().parse(argument)


def _parse(argv: list[str]) -> list[str]:
  """Flags, with one line for what is wrong with them; or the end, with help."""
  for argument in argv:
    text = argument.encode("utf-8", "backslashreplace").decode()
    if text != argument:
      sys.exit(_fail(f"{text} is not UTF-8; rename what it names"))
  if argv[1:] == ["--version"]:
    _show(f"dcae_jax {dcae_jax.__version__}")
  program, *given = (x for x in argv if x not in _HELP)
  asks = len(given) < len(argv) - 1
  is_named = any(re.match("--?config(=|$)", x) for x in given)
  if given and not is_named and not given[0].startswith("-"):
    given[0], is_named = f"--config={given[0]}", True
  from dcae_jax.runs import help_pages

  if asks and not is_named:
    ours = flags.FLAGS.get_key_flags_for_module(__name__)
    _show(help_pages.general(tasks.TASKS, {x.name: x.help for x in ours}))
  try:
    rest = flags.FLAGS([program, *given])
  except (flags.Error, OSError, TypeError) as error:
    sys.exit(_fail(str(error)))
  if flags.FLAGS.config is None:
    sys.exit(
      _fail(
        "the config is missing; begin with a file, or one of the names that "
        "--help lists"
      )
    )
  if asks:
    name = flags.FLAGS["config"].config_filename
    _show(help_pages.of_config(name, flags.FLAGS.config.to_dict()))
  return rest


def _show(text: str) -> NoReturn:
  try:
    print(text, flush=True)
  except BrokenPipeError:  # `| head` has seen enough
    os._exit(0)
  except OSError as error:
    os._exit(_fail(str(error)))
  sys.exit()


def start() -> None:
  """Defines the flags, and does what they say; ends the process."""
  # `python -m` finds modules of the current directory, a command does not.
  with contextlib.suppress(FileNotFoundError):  # it may have been removed
    sys.path.append(os.getcwd())
  for kind, parser in {
    tuple: _TupleParser(),
    ConfigDict: _DictParser(),
    int: _Parser(flags.IntegerParser(), "a whole number, such as 8"),
    float: _Parser(flags.FloatParser(), "a number, such as 1e-4"),
    bool: _Parser(flags.BooleanParser(), "True or False"),
  }.items():
    config_flags.register_flag_parser_for_type(kind, parser)
  config_flags.DEFINE_config_file(
    "config", None, "The run: a config file, or the name of one of ours."
  )
  flags.FLAGS["config"].parser = _ConfigFile()
  flags.DEFINE_string("workdir", None, "Where it is written; local or gs://.")
  flags.DEFINE_bool(
    "distributed",
    False,
    "One of many processes that jax can find. Cloud TPUs and SLURM steps need "
    "not say so; Open MPI and Kubernetes do.",
  )
  flags.DEFINE_string(
    "coordinator_address", None, "Elsewhere: HOST:PORT of the first process."
  )
  flags.DEFINE_integer("num_processes", None, "Elsewhere: how many there are.")
  flags.DEFINE_integer("process_id", None, "Elsewhere: which one this is.")
  app.run(_main, flags_parser=_parse)


if __name__ == "__main__":
  start()
