"""All studies one after the other, and a table of what they found."""

from collections.abc import Mapping, Sequence
import json
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import errors
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.studies import study

TABLE = "table.md"


def run(
  configs: Mapping[str, ConfigDict], workdir: str, *, resume: bool
) -> None:
  """Runs the studies, each in a sub-directory, and writes `table.md`.

  Raises:
    UserError: A config makes no sense, or a study's directory holds a run and
      `resume` is False: found before the first study begins.
  """
  directories = {name: pathlib.Path(workdir) / name for name in configs}
  for name, config in configs.items():
    study.check(config)
    if not resume and workdir_lib.is_workdir(directories[name]):
      raise errors.UserError(
        f"{directories[name]}: holds a run; --resume continues it, or give"
        " another --workdir"
      )
  console = rich_console.Console(highlight=False)
  for number, (name, config) in enumerate(configs.items(), start=1):
    console.rule(f"{name} ({number} of {len(configs)})")
    study.run(config, str(directories[name]), resume=resume)
  records = [study.read(directory) for directory in directories.values()]
  text = table(records)
  file = pathlib.Path(workdir) / TABLE
  file.write_text(text)
  console.rule()
  console.print(text, markup=False, soft_wrap=True)
  console.print(f"Table: {file}", markup=False, soft_wrap=True)


def table(records: Sequence[Mapping[str, Any]]) -> str:
  """The records of studies as a table in Markdown.

  The outcome is the verdict, and the first sentence of the paragraph.
  """
  rows = [
    (
      f"`{record['study']}`",
      _cell(record["claim"]),
      f"**{_cell(record['verdict'])}**. {_cell(_first(record['paragraph']))}",
      f"{record['wall_s']:.0f} s",
    )
    for record in records
  ]
  head = ("study", "claim", "outcome", "time")
  lines = [head, ("---", "---", "---", "--:"), *rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read_records(directory: pathlib.Path) -> list[dict[str, Any]]:
  """The records `NAME.json` of a directory, in the order of their names."""
  return [
    json.loads(file.read_text()) for file in sorted(directory.glob("*.json"))
  ]


def _first(paragraph: str) -> str:
  """The first sentence; a full stop within a number ends none."""
  return re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph, maxsplit=1)[0]


def _cell(text: str) -> str:
  return text.replace("|", "\\|").replace("\n", " ")
