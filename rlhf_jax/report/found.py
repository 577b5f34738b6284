"""What the report reads of workdirs.

What is found is what `launch.train`, `launch.sweep` and `launch.study` leave: a
run, a pipeline and its stages, a sweep and its members, a study, or a folder of
these. A run that has not ended is read as far as it goes; nothing is locked, so
it may still be running. Directories within that were linked are not followed,
and those that are no workdirs (a model that was exported) are passed over.

A study is read for what it found; its own runs have workdirs that can be given.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import datetime
import math
import pathlib
import re
from typing import Any

from rlhf_jax import errors
from rlhf_jax.report import files
from rlhf_jax.storage import workdir as workdir_lib

Config = dict[str, Any]
_LEVELS = 2  # of directories below one that is no workdir, or below a run
_STAGES = ("pipeline", "sft", "reward_model")  # First, in this order.
_LAST = 10  # steps, as the figures of summary.json are means of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What is shown of a workdir.

  Attributes:
    name: Its path, as given.
    kind: study, sweep, or the stage.
    ended: Whether it left a summary, or a study its results.
    written: When it last wrote a file.
    config: What it was run with.
    defaults: What its config file started from; may lack fields.
    seed: Of the run.
    wall_s: Seconds that it took; NaN where it has not ended.
    figure: A PNG: of a study, or a sweep's frontier.
    notes: What else its summary says, such as whom an evaluation was of.
    study: study.json.
    beta: `kl.beta`.
    steps: That it was to run.
    rows: Of metrics.jsonl.
    metrics: Means over the last ten steps, `NAME_se` the error of one step's.
    samples: Records of samples.jsonl.
    members: Of a sweep, by β.
    stages: Runs below it that are no members.
    frontier: frontier.json.
  """

  name: str
  kind: str
  ended: bool
  written: datetime.datetime
  config: dict[str, Any]
  defaults: dict[str, Any]
  seed: int
  wall_s: float
  figure: bytes | None
  notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  study: dict[str, Any] | None = None
  beta: float = 0.0
  steps: int = 0
  rows: Sequence[dict[str, int | float]] = ()
  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
  samples: Sequence[dict[str, Any]] = ()
  members: Sequence["Run"] = ()
  stages: Sequence["Run"] = ()
  frontier: dict[str, Any] | None = None


def read(
  place: pathlib.Path, defaults: Callable[[Config], Config]
) -> list[Run]:
  """The run in a directory, or those below it.

  Raises:
    UserError: There is none, or a file is damaged.
  """
  try:
    runs = list(_found(place, str(place), _LEVELS, defaults))
  except OSError as error:
    raise errors.UserError(
      f"{error.filename}: cannot be read: {error.strerror}; change its mode"
    ) from error
  if not runs:
    raise errors.UserError(
      f"{place}: no run in it or up to {_LEVELS} directories down (no "
      "config.json with a `stage` or a `study`); give a --workdir that a run "
      "has written"
    )
  return runs


def _found(path, name, levels, defaults) -> Iterator[Run]:
  """The run in `path`, or those below it."""
  if workdir_lib.is_workdir(path):
    config = workdir_lib.read_config(path)
    if "study" in config:
      files.field(config, "study", str, path / "config.json")
      yield _study(path, name, config, defaults(config))
      return
    if "stage" in config:
      below = list(_below(path, name, _LEVELS, defaults))
      yield _run(path, name, config, defaults(config), below)
      return
  yield from _below(path, name, levels, defaults)


def _below(path, name, levels, defaults) -> Iterator[Run]:
  """What is in the subdirectories; `beta=2` comes before `beta=10`."""
  if levels == 0:
    return
  natural = lambda p: [
    (float(part), "") if i % 2 else (0.0, part)
    for i, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", p.name))
  ]
  rank = lambda p: _STAGES.index(p.name) if p.name in _STAGES else len(_STAGES)
  folders = [p for p in path.iterdir() if p.is_dir() and not p.is_symlink()]
  for folder in sorted(folders, key=lambda p: (rank(p), natural(p))):
    if not folder.name.startswith("."):
      yield from _found(folder, f"{name}/{folder.name}", levels - 1, defaults)


def _run(path, name, config, defaults, below) -> Run:
  """A run of one stage, a pipeline, or a sweep."""
  field = lambda name, kind: files.field(
    config, name, kind, path / "config.json"
  )
  summary = files.read_json(path / "summary.json")
  rows = workdir_lib.read_metrics(path)
  if summary is not None and "metrics" in summary:
    metrics = files.numbers(summary["metrics"], path / "summary.json")
  else:
    metrics = _means(rows[-_LAST:])
  # Of betas, of seeds, or of both.
  lists = [x for x in field("sweep", dict).values() if isinstance(x, list)]
  is_sweep = field("stage", str) == "ppo" and any(lists)
  is_member = lambda run: is_sweep and run.kind == "ppo"
  members = [run for run in below if is_member(run)]
  return Run(
    name=name,
    kind="sweep" if is_sweep else config["stage"],
    ended=summary is not None,
    written=_written(path),
    config=config,
    defaults=defaults,
    seed=field("seed", int),
    wall_s=_wall_s(summary, path / "summary.json"),
    notes=_notes(summary or {}),
    beta=field("kl.beta", float),
    steps=field("train.steps", int),
    rows=rows,
    metrics=metrics,
    samples=list(files.read_samples(path / "samples.jsonl")),
    members=sorted(members, key=lambda run: (run.beta, run.seed, run.name)),
    stages=[run for run in below if not is_member(run)],
    frontier=files.read_frontier(path / "frontier.json"),
    figure=files.read_png(path / "frontier.png"),
  )


def _study(path, name, config, defaults) -> Run:
  """A study: what it claims, and what it found if it has ended."""
  study = files.read_study(path / "study.json")
  return Run(
    name=name,
    kind="study",
    ended=study is not None,
    written=_written(path),
    config=config,
    defaults=defaults,
    seed=files.field(config, "seed", int, path / "config.json"),
    wall_s=_wall_s(study, path / "study.json"),
    study=study,
    figure=files.read_png(path / "figure.png"),
  )


def _notes(summary: dict[str, Any]) -> dict[str, str]:
  """What is neither shown elsewhere nor another run's."""
  known = {"stage", "seed", "steps", "wall_s"}
  return {
    name: str(value)
    for name, value in summary.items()
    if name not in known and isinstance(value, str | int | float)
  }


def _wall_s(record: dict[str, Any] | None, file: pathlib.Path) -> float:
  if record is None:
    return math.nan
  return files.field(record, "wall_s", float, file)


def _means(rows: Sequence[dict[str, int | float]]) -> dict[str, float]:
  """As `Workdir.mean_of_last`, for a run that may be running."""
  names = dict.fromkeys(name for row in rows for name in row)
  values = {n: [row[n] for row in rows if n in row] for n in names}
  return {n: sum(v) / len(v) for n, v in values.items() if n != "step"}


def _written(path: pathlib.Path) -> datetime.datetime:
  """When a file of the run was last written; the report is not one."""
  kept = [p for p in path.iterdir() if p.suffix in (".json", ".jsonl")]
  latest = max(p.stat().st_mtime for p in kept)
  return datetime.datetime.fromtimestamp(latest).astimezone()
