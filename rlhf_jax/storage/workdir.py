r"""A run's directory: its config, metrics, samples and summary, and one writer.

Every JSON here is valid JSON in ASCII. Numbers that JSON lacks are the strings
"nan", "inf" and "-inf" (`read_metrics` makes them floats again); terminal
escapes and bidirectional marks in a model's text become `\u` escapes, which
no pager obeys. A file is replaced whole or has lines appended, so that a kill
costs at most an unfinished last line; readers skip such a line, and `rewind`
removes it.

Checkpoints are another room's (`storage.checkpoint`), in a folder beside these.
"""

from collections.abc import Iterator, Mapping
import contextlib
import fcntl
import fnmatch
import json
import math
import os
import pathlib
import re
from typing import Any, SupportsFloat, TextIO

from rlhf_jax import errors

# What a resumed run may change without becoming another run.
HARMLESS = (
  "train.steps",
  "train.samples_every",
  "checkpoint.every",
  "checkpoint.keep",
  "mesh.*",
  "sweep.frontier",
  "sweep.best_of",
)
# `hf_token` is a secret; `tokenizer` and `response_tokens` are not.
_SECRET = re.compile(
  r"secret|password|api[_-]?key|(^|[_-])token$", re.IGNORECASE
)
_LINES = ("metrics.jsonl", "samples.jsonl")


class Workdir:
  """An open workdir; no other process can open it until it is closed."""

  def __init__(
    self, path: pathlib.Path, lock: TextIO, *, is_new: bool, is_made: bool
  ):
    """Private: `open` checks, makes and locks."""
    self.path = path
    self._lock = lock
    self._is_new = is_new
    self._is_made = is_made

  @classmethod
  def open(
    cls, path: str | os.PathLike, config: dict[str, Any], *, resume: bool
  ) -> "Workdir":
    """Begins a run in `path`, or goes on with the one that is there.

    Writes config.json, with the values of secret-looking fields masked. A
    path that is refused is left as it was.

    Args:
      path: Made with its parents.
      config: The resolved config, as `ConfigDict.to_dict` gives it.
      resume: Go on where there is a run; its config may differ from `config`
        in `HARMLESS` fields only.

    Raises:
      UserError: The path is no directory, cannot be written, is open
        elsewhere, or holds a run and `resume` is False or the config differs.
    """
    config = _plain(_masked(config))
    place = pathlib.Path(path)
    if not os.fspath(path) or not str(place).isprintable():
      raise errors.UserError(
        f"--workdir: {os.fspath(path)!r}; a path without control characters "
        "is wanted"
      )
    with _writing(place):
      _check_writable(place)
      is_new = not is_workdir(place)
      if not is_new:
        _check_goes_on(place, config, resume)
      is_made = not place.exists()
      place.mkdir(parents=True, exist_ok=True)
      workdir = cls(place, _lock(place), is_new=is_new, is_made=is_made)
    workdir._replace("config.json", _dump(config))
    return workdir

  def close(self) -> None:
    """Lets others open the workdir."""
    self._lock.close()

  def __enter__(self) -> "Workdir":
    return self

  def __exit__(self, kind: Any, *_: Any) -> None:
    # A run that was refused before it did anything was never begun: a command
    # that mends it need not be told to resume.
    if kind is errors.UserError and self._is_new:
      self._remove_if_bare()
    self.close()

  def _remove_if_bare(self) -> None:
    """Removes what `open` wrote or made, if nothing else is there.

    What a refusal left in sub-workdirs is gone by then.
    """
    ours = {self.path / "config.json", self.path / ".lock"}
    if set(self.path.iterdir()) <= ours:
      for path in ours:
        path.unlink(missing_ok=True)
      if self._is_made:
        self.path.rmdir()

  def sub(
    self, name: str, config: dict[str, Any], *, resume: bool
  ) -> "Workdir":
    """Opens a workdir within this one, such as `sft` or `members/0`.

    Raises:
      UserError: As `open`, or the name does not stay within this workdir.
    """
    odd = lambda part: not part or part[0] in ".-"
    if not name.isprintable() or any(map(odd, name.split("/"))):
      raise errors.UserError(
        f"{self.path}: {name!r} as the name of a run; wanted are names joined "
        "by '/', none of them empty or with a leading '.' or '-'"
      )
    path = self.path / name
    if not path.resolve().is_relative_to(self.path.resolve()):
      raise errors.UserError(
        f"{path}: a link that leads out of {self.path}; remove it"
      )
    return Workdir.open(path, config, resume=resume)

  def append_metrics(
    self, step: int, scalars: Mapping[str, SupportsFloat]
  ) -> None:
    """Adds the line of a step to metrics.jsonl."""
    floats = {name: float(value) for name, value in scalars.items()}
    self._append("metrics.jsonl", [{"step": step} | floats])

  def append_samples(self, records: list[dict[str, Any]]) -> None:
    """Adds records, each with its `step`, to samples.jsonl."""
    self._append("samples.jsonl", records)

  def write_summary(self, summary: dict[str, Any]) -> None:
    """Replaces summary.json."""
    self.write_json("summary.json", summary)

  def write_json(self, name: str, value: dict[str, Any]) -> None:
    """Replaces a JSON file of this workdir."""
    self._replace(name, _dump(_plain(value)))

  def write_bytes(self, name: str, content: bytes) -> None:
    """Replaces a file of this workdir."""
    self._replace(name, content)

  def has_ended(self, steps: int) -> bool:
    """Whether a training did all its steps; a resumed one may want more."""
    file = self.path / "summary.json"
    return file.exists() and json.loads(file.read_text())["steps"] == steps

  def mean_of_last(self, steps: int = 10) -> dict[str, float]:
    """Means over the last `steps` steps, each over the steps that report it."""
    rows = read_metrics(self.path)[-steps:]
    names = dict.fromkeys(name for row in rows for name in row)
    values = {n: [row[n] for row in rows if n in row] for n in names}
    return {n: sum(v) / len(v) for n, v in values.items() if n != "step"}

  def rewind(self, step: int) -> None:
    """Forgets metrics and samples from `step` on, and unfinished lines.

    A resumed run calls this with the step that it does next, so that no step
    is in the files twice.

    Raises:
      UserError: A line is no record of a step.
    """
    for name in _LINES:
      if (self.path / name).exists():
        rows = _rows(self.path / name)
        kept = [line for line, row in rows if row["step"] < step]
        self._replace(name, b"".join(kept))

  def _append(self, name: str, rows: list[dict[str, Any]]):
    text = "".join(f"{json.dumps(_plain(row))}\n" for row in rows)
    with _writing(self.path / name), (self.path / name).open("a") as file:
      file.write(text)

  def _replace(self, name: str, content: bytes):
    """Writes a file so that a kill leaves the old one or the new one."""
    temporary = self.path / f".{name}.writing"
    with _writing(self.path / name):
      with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
      temporary.replace(self.path / name)


def is_workdir(path: str | os.PathLike) -> bool:
  """Whether a run was ever begun in `path`."""
  return (pathlib.Path(path) / "config.json").is_file()


def read_config(path: str | os.PathLike) -> dict[str, Any]:
  """The config of the run in `path`: lists for tuples, secrets masked.

  Raises:
    UserError: There is none, or it is no JSON object.
  """
  file = pathlib.Path(path) / "config.json"
  if not file.is_file():
    raise errors.UserError(
      f"{path}: not a workdir, it has no config.json; give a --workdir that a "
      "run has written"
    )
  try:
    config = json.loads(file.read_bytes())
  except ValueError as error:
    raise errors.UserError(f"{file}: damaged: {error}") from error
  if not isinstance(config, dict):
    raise errors.UserError(f"{file}: no JSON object, as a config is")
  return config


def read_metrics(path: str | os.PathLike) -> list[dict[str, int | float]]:
  """The rows of metrics.jsonl in the workdir `path`; none before step 0.

  Raises:
    UserError: A line is no record of a step.
  """
  file = pathlib.Path(path) / "metrics.jsonl"
  rows = []
  for number, (_, row) in enumerate(_rows(file), start=1):
    try:
      floats = {name: float(row[name]) for name in row if name != "step"}
    except (TypeError, ValueError) as error:
      raise errors.UserError(f"{file}:{number}: {error}") from error
    rows.append({"step": row["step"]} | floats)
  return rows


def _rows(file: pathlib.Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
  """Lines of a file that has one record of a step a line, and their records."""
  if not file.exists():
    return
  with file.open("rb") as lines:
    for number, line in enumerate(lines, start=1):
      if not line.endswith(b"\n"):
        return  # Its writer was killed, or is writing it.
      try:
        row = json.loads(line)
      except ValueError as error:
        raise errors.UserError(f"{file}:{number}: {error}") from error
      if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise errors.UserError(
          f"{file}:{number}: no JSON object with a whole number as its `step`"
        )
      yield line, row


def _check_writable(path: pathlib.Path):
  """Refuses what `mkdir` and `open` would refuse, before anything is made."""
  nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
  if not nearest.is_dir():
    raise errors.UserError(
      f"{nearest}: a file; a directory, or none yet, is wanted for --workdir"
    )
  if not os.access(nearest, os.W_OK | os.X_OK):
    raise errors.UserError(
      f"{nearest}: not writable; give another --workdir or change its mode"
    )


def _check_goes_on(path: pathlib.Path, config: dict[str, Any], resume: bool):
  """Refuses to overwrite a run, or to go on with it as another run."""
  if not resume:
    raise errors.UserError(
      f"{path}: holds a run; --resume continues it, or give another --workdir"
    )
  old, new = dict(_fields(read_config(path))), dict(_fields(config))
  differ = [
    f"{field}: {old.get(field, 'nothing')} → {new.get(field, 'nothing')}"
    for field in old | new
    if (field not in old or field not in new or old[field] != new[field])
    and not any(fnmatch.fnmatchcase(field, harmless) for harmless in HARMLESS)
  ]
  if differ:
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    raise errors.UserError(
      f"{path}/config.json: another run: {', '.join(differ[:3])}{more}; resume "
      "with the stored values, or give another --workdir"
    )


def _fields(config: dict[str, Any], prefix: str = "") -> Iterator:
  """Dotted names of a nested config's leaves, and their values as JSON."""
  for name, value in config.items():
    if isinstance(value, dict):
      yield from _fields(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", json.dumps(value)


def _lock(path: pathlib.Path) -> TextIO:
  """Opens the lock file; the lock goes when it is closed or we die."""
  lock = (path / ".lock").open("a")
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    lock.close()
    raise errors.UserError(
      f"{path}: another process is writing to it; wait until that has ended, "
      "or give another --workdir"
    ) from None
  return lock


def _masked(value: Any, name: str = "") -> Any:
  """A config without the values of fields that are named like secrets."""
  if value and _SECRET.search(name):
    return "***"
  if isinstance(value, dict):
    return {key: _masked(entry, str(key)) for key, entry in value.items()}
  if isinstance(value, list | tuple):
    return [_masked(entry) for entry in value]
  return value


def _plain(value: Any) -> Any:
  """What JSON holds: lists for tuples, strings for infinities and NaN."""
  if isinstance(value, dict):
    return {str(name): _plain(entry) for name, entry in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(entry) for entry in value]
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def _dump(value: Any) -> bytes:
  return f"{json.dumps(value, indent=2)}\n".encode()


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
  """Turns a full disk, a dead link and their like into one line."""
  try:
    yield
  except OSError as error:
    raise errors.UserError(
      f"{path}: cannot be written: {error.strerror}; free space, change its "
      "mode, or give another --workdir"
    ) from error
