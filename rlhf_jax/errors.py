"""Errors that a person can act on; each carries the exit code of its kind."""


class UserError(ValueError):
  """Something the user gave cannot be used.

  The message is one line: what was found, where, what is wanted, and how to
  mend it. The commands print it without a traceback and exit with `exit_code`.
  """

  exit_code = 2


class NoUsableCheckpoint(UserError):
  """A run asked to resume has checkpoints, and none of them can be trusted."""

  exit_code = 45


class Preempted(UserError):
  """The run was asked to stop, and has saved; `--resume` continues it."""

  exit_code = 42


class NonFinite(UserError):
  """A figure of the run is NaN or infinite; going on would train on it."""

  exit_code = 44
