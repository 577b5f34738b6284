"""Files of a workdir that the report reads, each checked as it is read.

Errors name the file, its line where it has lines, and the field.
"""

from collections.abc import Iterator, Sequence
import json
import math
import pathlib
from typing import Any

from rlhf_jax import errors

_STUDY = {
  "study": str,
  "claim": str,
  "source": str,
  "verdict": str,
  "paragraph": str,
  "tables": dict,
  "wall_s": float,
}
_TABLE = {"caption": str, "columns": list, "rows": list, "shown": bool}
_FRONTIER_LISTS = {"members", "by_beta", "best_of_n"}
_SAMPLE = {"step": int, "prompt": str, "response": str}
_PER_TOKEN = ("logprobs", "reference_logprobs", "reverse_kl")


def read_study(file: pathlib.Path) -> dict[str, Any] | None:
  """study.json; None before the study has ended.

  Raises:
    UserError: It is damaged.
  """
  study = read_json(file)
  if study is not None:
    check(study, _STUDY, file)
    for table in study["tables"].values():
      check(table, _TABLE, file)
      if not all(isinstance(row, list) for row in table["rows"]):
        raise errors.UserError(f"{file}: rows: a list of lists is wanted")
  return study


def read_frontier(file: pathlib.Path) -> dict[str, Any] | None:
  """frontier.json, of which any part may be missing; None where it is.

  Raises:
    UserError: It is damaged.
  """
  frontier = read_json(file)
  if frontier is not None:
    for name in _FRONTIER_LISTS & frontier.keys():
      check(frontier, {name: list}, file)
      for row in frontier[name]:
        check(row, {}, f"{file}: {name}")
    if isinstance(frontier.get("recommendation"), dict):
      check(frontier["recommendation"], {"text": str}, file)
  return frontier


def read_samples(file: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Records of samples.jsonl, without a last line that is unfinished.

  Raises:
    UserError: A line is no record of a sample.
  """
  if not file.exists():
    return
  for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
    where = f"{file}:{number}"
    record = _parse(line, where)
    check(record, _SAMPLE, where)
    try:
      lists = {name: [float(x) for x in record[name]] for name in _PER_TOKEN}
      score = float(record["score"])
    except (KeyError, TypeError, ValueError) as error:
      raise errors.UserError(
        f"{where}: {error}; a score and the lists {', '.join(_PER_TOKEN)} are "
        "wanted"
      ) from error
    lengths = {len(numbers) for numbers in lists.values()}
    if "tokens" in record:
      check(record, {"tokens": list}, where)
      lengths.add(len(record["tokens"]))
    if len(lengths) > 1:
      raise errors.UserError(
        f"{where}: lists of {sorted(lengths)} tokens; one length is wanted"
      )
    yield record | lists | {"score": score}


def numbers(metrics: Any, where: object) -> dict[str, float]:
  """A summary's metrics; null is what some write for NaN.

  Raises:
    UserError: They are no numbers by name.
  """
  try:
    return {n: math.nan if x is None else float(x) for n, x in metrics.items()}
  except (AttributeError, TypeError, ValueError) as error:
    raise errors.UserError(f"{where}: metrics: {error}") from error


def read_json(file: pathlib.Path) -> dict[str, Any] | None:
  """A JSON object; None where there is no such file.

  Raises:
    UserError: It is no JSON object.
  """
  return _parse(file.read_bytes(), file) if file.exists() else None


def read_png(file: pathlib.Path) -> bytes | None:
  """A picture's bytes; None where there is no such file.

  Raises:
    UserError: It is no PNG.
  """
  if not file.exists():
    return None
  content = file.read_bytes()
  if not content.startswith(b"\x89PNG\r\n\x1a\n"):
    raise errors.UserError(f"{file}: damaged: no PNG; remove it")
  return content


def check(record: Any, wanted: dict[str, type], where: object) -> None:
  """Requires an object with fields of these types."""
  if not isinstance(record, dict):
    raise errors.UserError(f"{where}: {record!r}; a JSON object is wanted")
  for name, kind in wanted.items():
    field(record, name, kind, where)


def field(record: Any, name: str, kind: type, where: object) -> Any:
  """The value at a dotted name; a whole number is a float, too.

  Raises:
    UserError: It is missing, or of another type.
  """
  value = record
  for part in name.split("."):
    if not isinstance(value, dict) or part not in value:
      raise errors.UserError(
        f"{where}: {name}: missing; a file as our commands write it is wanted"
      )
    value = value[part]
  kinds: Sequence[type] = (int, float) if kind is float else (kind,)
  if type(value) not in kinds:
    raise errors.UserError(
      f"{where}: {name}: {value!r}; wanted {kind.__name__}"
    )
  return value


def _parse(text: bytes, where: object) -> dict[str, Any]:
  try:
    value = json.loads(text)
  except ValueError as error:
    raise errors.UserError(f"{where}: damaged: {error}") from error
  check(value, {}, where)
  return value
