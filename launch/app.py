"""What every command shares: its flags, and how it ends when it cannot go on.

    def main(flags):
      ...

    if __name__ == "__main__":
      app.run(main)

Whatever a user can cause ends in one line on stderr and an exit code: 2, or
that of the `UserError`; `--verbose` adds the traceback. What a user cannot
cause keeps its traceback.

ml_collections loads and locks the config, but `--config.FIELD=VALUE` is read
by `configs.defaults.apply_overrides`, as a config's own argument is: the
library answers a misspelt field with one of several exceptions, none of which
names the field in full.

What XLA compiled is kept in the user's cache directory: a step of the toy takes
five to ten times as long to compile as to load. JAX's own variables go before
this: JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE=0. The directory
can be deleted at any time; should a warning say that an entry cannot be read,
because a process died as it wrote it, delete it.
"""

from collections.abc import Callable, Sequence
import os
import pathlib
import platform
import re
import sys
import traceback

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs import defaults
from rlhf_jax import errors
from rlhf_jax.settings import validate

Check = Callable[[ConfigDict], None]
_INTERRUPTED = 130  # 128 + SIGINT, as shells count.


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that all commands have."""
  config_flags.DEFINE_config_file(
    "config",
    help_string="FILE.py or FILE.py:preset,field=value,…; a single field is set"
    " by --config.FIELD=VALUE.",
    flag_values=values,
    lock_config=True,
    sys_argv=[],  # It would read the overrides from there.
  )
  flags.DEFINE_string(
    "workdir", None, "Directory of the run.", flag_values=values
  )
  flags.DEFINE_bool(
    "resume", False, "Continue the run in the workdir.", flag_values=values
  )
  flags.DEFINE_bool(
    "verbose",
    False,
    "Show tracebacks and the libraries' logs.",
    flag_values=values,
  )


define_flags(flags.FLAGS)


def run(
  main: Callable[[flags.FlagValues], None],
  *,
  required: Sequence[str] = ("config", "workdir"),
  check: Check = defaults.check_complete,
) -> None:
  """Parses the command line, calls `main` with the flags, and exits.

  Args:
    main: The command.
    required: Flags that it cannot do without.
    check: What its config must satisfy; raises ValueError.
  """
  for name in ("config", "workdir", "resume", "verbose"):
    # --help shows the flags of the file that is run, which are not these.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

  def parse_or_exit(argv: list[str]) -> flags.FlagValues:
    code = exit_code(
      lambda: parse(argv, flags.FLAGS, required=required, check=check)
    )
    if code:
      sys.exit(code)
    return flags.FLAGS

  def main_or_code(values: flags.FlagValues) -> int:
    if not values.verbose:
      # absl has just turned INFO on, and with it the libraries' chatter.
      logging.set_verbosity(logging.WARNING)
      # transformers advises to install torch, which nothing here needs.
      os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
      os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_compiled())
    return exit_code(lambda: main(values))

  app.run(main_or_code, flags_parser=parse_or_exit)


def exit_code(call: Callable[[], None]) -> int:
  """Calls, says in one line on stderr what went wrong, returns the code."""
  try:
    call()
  except errors.UserError as error:
    # Read off the line: the error may be one of parsing it.
    if any(re.fullmatch("--?verbose(=true)?", word) for word in sys.argv):
      traceback.print_exception(error)
    print(" ".join(str(error).splitlines()), file=sys.stderr)
    return error.exit_code
  except KeyboardInterrupt:
    print(
      "interrupted; --resume goes on from the last checkpoint, if there is one",
      file=sys.stderr,
    )
    return _INTERRUPTED
  return 0


def parse(
  argv: Sequence[str],
  values: flags.FlagValues,
  *,
  required: Sequence[str] = ("config", "workdir"),
  check: Check = defaults.check_complete,
) -> None:
  """Parses a command line, its program first, into `values`.

  Raises:
    UserError: A flag is unknown, missing or of the wrong type; the config
      cannot be loaded or is not complete; a field that is set does not exist
      or is of another type.
  """
  try:
    rest = values(argv, known_only=True)[1:]
  except Exception as error:  # The config file is a program: it raises any.
    raise errors.UserError(_explain(error)) from error
  overrides = _overrides(rest, values)
  for name in required:
    if not values[name].present or values[name].value == "":
      raise errors.UserError(f"--{name}: missing; wanted --{name}=VALUE")
  if values["config"].present:
    _complete(values, overrides, check)
  elif overrides:
    raise errors.UserError(
      f"--config.{overrides[0]}: sets a field of no config; add --config=FILE"
    )


def _compiled() -> pathlib.Path:
  """Of this machine: a home may be shared by machines of several kinds."""
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return pathlib.Path(cache, "rlhf_jax", f"compiled-{platform.node()}")


def _overrides(rest: Sequence[str], values: flags.FlagValues) -> list[str]:
  """`FIELD=VALUE` of what absl did not know, which must be nothing else."""
  overrides = []
  arguments = iter(rest)
  for argument in arguments:
    match = re.fullmatch(r"--?config\.([^=]+)(=.*)?", argument, re.DOTALL)
    if match:
      overrides.append(match[1] + (match[2] or "=" + next(arguments, "")))
      continue
    name = re.split(r"[.=]", argument.lstrip("-"))[0]
    kind = "flag" if argument.startswith("-") else "argument"
    raise errors.UserError(
      f"{argument}: unknown {kind}{validate.suggest(name, values)}"
    )
  return overrides


def _complete(
  values: flags.FlagValues, overrides: Sequence[str], check: Check
) -> None:
  """Sets the overridden fields of a config that has all fields and no other."""
  path = config_flags.get_config_filename(values["config"])
  try:
    # The library keeps the OSError of a file that it could not read, and
    # raises it as soon as an attribute is asked for.
    if not hasattr(values.config, "lock"):
      raise ValueError("get_config() returned no ConfigDict")
    check(values.config)
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f"{path}: {_last_line(error.__cause__ or error)}"
    ) from error
  try:
    defaults.apply_overrides(values.config, overrides)
    check(values.config)  # The field that names a study may be among them.
  except ValueError as error:
    raise errors.UserError(f"--{error}") from error


def _explain(error: Exception) -> str:
  """What was wrong with a flag or in a config file, in one line."""
  if isinstance(error, flags.Error):
    # An error of a config's values comes with its whole traceback.
    first, *others = str(error).strip().splitlines()
    if not others:
      return first
    first = first.removesuffix("Error whilst parsing config file:")
    return first + others[-1].removeprefix("ValueError: ")
  if isinstance(error, SyntaxError):
    return f"{error.filename}:{error.lineno}: {error.msg}"
  if isinstance(error, AttributeError) and error.name == "get_config":
    path = vars(error.obj)["__file__"]
    return f"{path}: no get_config() in it; wanted one that returns a config"
  where = [
    f"{frame.f_code.co_filename}:{line}: "
    for frame, line in traceback.walk_tb(error.__traceback__)
    if frame.f_globals["__name__"] == "config_config"
  ]
  return f"{''.join(where[-1:])}{type(error).__name__}: {_last_line(error)}"


def _last_line(error: BaseException) -> str:
  """Of a message, however wrapped; ml_collections' suggestions stand there."""
  while error.args and isinstance(error.args[0], BaseException):
    error = error.args[0]
  # A KeyError's own text is quoted.
  text = error.args[0] if isinstance(error, KeyError) else error
  return str(text).strip().splitlines()[-1].strip()
