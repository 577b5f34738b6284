"""Prompts, texts and preference pairs from files, or a line that says why not.

A faulty row is an error that names its file and line; no row is dropped
without being counted. Lines end with LF or CRLF, blank ones are passed over,
and a byte order mark is not text. Texts come back as they stand in the file:
what looks like a special token is plain text here and in the tokenizer.

A prompt may be a conversation (`text.chat`): a list of messages in place of the
text. Left out: compressed files and data sets that are fetched by name. A file
is read whole: this is data for fine-tuning.
"""

from collections.abc import Iterator
import dataclasses
import difflib
import itertools
import json
import os
import pathlib
from typing import Any, NamedTuple, cast

from rlhf_jax.errors import UserError
from rlhf_jax.text import chat

DOCUMENT_SEPARATOR = "<|endoftext|>"  # Alone on a line of a .txt file.
REPLY_MARKER = "\n\nAssistant:"  # Ends the prompt within a transcript.
MAX_UNUSABLE_FRACTION = 0.05  # Of the pairs: more speaks of a broken file.

# Alike enough for a misspelling ("promt"), and not for a relative: "prompt_id"
# is 0.80 alike to "prompt".
_MISSPELLING = 0.82
_JSON_NAMES = {
  dict: "an object",
  list: "a list",
  str: "a string",
  bool: "a boolean",
  int: "a number",
  float: "a number",
  type(None): "null",
}

_GZIP = b"\x1f\x8b"

Path = str | os.PathLike[str]


class PairText(NamedTuple):
  """A prompt with the response that was preferred and the one that was not."""

  prompt: str | chat.Chat
  chosen: str
  rejected: str


@dataclasses.dataclass(frozen=True)
class Counts:
  """What a file held, in rows. `str(counts)` is a line to print.

  `rows` came back, and `duplicates` of them repeat an earlier one. Pairs that
  teach nothing were left out: `identical` (chosen = rejected) and `empty`
  (a transcript whose last reply is white space). `repeated` says that all
  responses began with their prompts, which were cut from them.
  """

  noun: str
  rows: int
  duplicates: int
  identical: int = 0
  empty: int = 0
  repeated: bool = False

  def __str__(self) -> str:
    parts = (
      (self.identical, "identical left out"),
      (self.empty, "with an empty reply left out"),
      (self.duplicates, "duplicates"),
    )
    notes = [f"{count:,} {what}" for count, what in parts if count]
    if self.repeated:
      notes.append("each prompt cut from its responses, which repeat it")
    return "; ".join([f"{self.rows:,} {self.noun}", *notes])


def read_prompts(path: Path) -> tuple[list[str | chat.Chat], Counts]:
  """Reads prompts: `.jsonl` with a field `prompt`, or `.txt`, one a line.

  `prompt` may be a list of messages, as may `messages` or `conversations` in
  its place; the last message is then not an assistant's. A `.json` file is a
  list of such rows.

  Raises:
    UserError: The file or one of its rows cannot be used.
  """
  prompts: list[str | chat.Chat]
  if _suffix(path, ".jsonl", ".json", ".txt") == ".txt":
    prompts = [line.text for line in _lines(path) if line.text.strip()]
  else:
    prompts = [_prompt(where, row) for where, row in _objects(path)]
  return prompts, _count(path, "prompts", prompts)


def read_texts(
  path: Path,
) -> tuple[list[tuple[str | chat.Chat, str]], Counts]:
  """Reads (prompt, response) texts for supervised fine-tuning.

  Of a conversation (`messages`, `conversations`) each message of the assistant
  is a response to those before it.

  A `.jsonl` row has `prompt` and `response`, or `text` alone, which is a
  response to the prompt ''. A `.txt` file holds documents, also with the
  prompt '', between lines `<|endoftext|>`; white space around them is cut.

  Raises:
    UserError: The file or one of its rows cannot be used.
  """
  texts: list[tuple[str | chat.Chat, str]]
  if _suffix(path, ".jsonl", ".json", ".txt") == ".txt":
    texts = [("", document) for document in _documents(path)]
  else:
    rows = _objects(path)
    texts = [text for where, row in rows for text in _texts(where, row)]
  return texts, _count(path, "texts", texts)


def read_pairs(path: Path) -> tuple[list[PairText], Counts]:
  """Reads preference pairs: `.jsonl` with `prompt`, `chosen`, `rejected`.

  Where all responses of the file begin with their prompts these are cut from
  them: some begin so by chance. Where there is no prompt the two are
  transcripts, and the prompt is what they share up to and including their last
  common `Assistant:` marker. Pairs that teach nothing are left out and counted;
  a white field is an error.

  Of conversations, `chosen` and `rejected` are lists of messages that end with
  the assistant's, and share all others; or the answers alone, beside a prompt.

  Raises:
    UserError: The file or one of its rows cannot be used, or more than
      `MAX_UNUSABLE_FRACTION` of the rows are identical, or have an empty reply.
  """
  _suffix(path, ".jsonl", ".json")
  pairs, identical, empty = [], [], []
  read = [(where, _pair(where, row)) for where, row in _objects(path)]
  repeated = bool(read) and all(_repeats_its_prompt(pair) for _, pair in read)
  for where, pair in read:
    if repeated:
      size = len(cast(str, pair.prompt))
      pair = PairText(pair.prompt, *(text[size:] for text in pair[1:]))
    if not pair.chosen.strip() or not pair.rejected.strip():
      empty.append(where)
    elif pair.chosen == pair.rejected:
      identical.append(where)
    else:
      pairs.append(pair)
  total = len(pairs) + len(identical) + len(empty)
  _refuse_many(identical, total, "chosen: the same as rejected")
  _refuse_many(empty, total, "chosen or rejected: an empty reply")
  counts = _count(path, "pairs", pairs)
  return pairs, dataclasses.replace(
    counts, identical=len(identical), empty=len(empty), repeated=repeated
  )


def _repeats_its_prompt(pair: PairText) -> bool:
  if isinstance(pair.prompt, chat.Chat):
    return False
  return all(text.startswith(pair.prompt) for text in pair[1:])


def _refuse_many(places: list[str], total: int, found: str) -> None:
  """Refuses the file where the rows at `places` are too large a part of it."""
  if len(places) > MAX_UNUSABLE_FRACTION * total:
    raise UserError(
      f"{places[0]}: {found}, here and in all in {len(places)} of {total} rows;"
      f" at most {MAX_UNUSABLE_FRACTION:.0%} may be so (they are left out);"
      " mend or remove them"
    )


def _count(path: Path, noun: str, rows: list[Any]) -> Counts:
  """Counts usable rows; none is an error."""
  if not rows:
    raise UserError(f"{path}: no usable rows; at least one is wanted")
  return Counts(noun, len(rows), duplicates=len(rows) - len(set(rows)))


def _conversation(where: str, row: dict[str, Any]) -> chat.Chat | None:
  """Of a row that is one, and has no prompt besides."""
  for name in ("messages", "conversations"):
    if isinstance(row.get(name), list) and "prompt" not in row:
      return chat.read(where, name, row[name])
  return None


def _prompt(where: str, row: dict[str, Any]) -> str | chat.Chat:
  conversation = _conversation(where, row)
  if conversation is None and isinstance(row.get("prompt"), list):
    conversation = chat.read(where, "prompt", row["prompt"])
  if conversation is None:
    return _field(where, row, "prompt")
  if conversation.answered:
    raise UserError(
      f"{where}: the last message is an assistant's; wanted one to answer"
    )
  return conversation


def _texts(
  where: str, row: dict[str, Any]
) -> Iterator[tuple[str | chat.Chat, str]]:
  conversation = _conversation(where, row)
  if conversation is None:
    yield _text(where, row)
    return
  messages = conversation.messages
  answers = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
  if not answers or answers[0] == 0:
    raise UserError(
      f"{where}: no message of an assistant that answers another; wanted one"
    )
  for i in answers:
    yield chat.Chat(messages[:i]), messages[i][1]


def _text(where: str, row: dict[str, Any]) -> tuple[str, str]:
  if "text" not in row:
    if "prompt" not in row:
      _refuse_misspelling(where, row, "text")
    return _field(where, row, "prompt"), _field(where, row, "response")
  for name in ("prompt", "response"):
    if name in row:
      raise UserError(
        f"{where}: text: found beside '{name}'; wanted either 'text' alone or"
        " 'prompt' and 'response'; remove one"
      )
  return "", _field(where, row, "text")


def _pair(where: str, row: dict[str, Any]) -> PairText:
  if isinstance(row.get("chosen"), list):
    return _pair_of_messages(where, row)
  if isinstance(row.get("prompt"), list):
    answers = (_field(where, row, name) for name in ("chosen", "rejected"))
    return PairText(_prompt(where, row), *answers)
  chosen = _field(where, row, "chosen")
  rejected = _field(where, row, "rejected")
  if "prompt" not in row:
    _refuse_misspelling(where, row, "prompt")
    prompt = _shared_prompt(where, chosen, rejected)
    return PairText(prompt, chosen[len(prompt) :], rejected[len(prompt) :])
  return PairText(_field(where, row, "prompt"), chosen, rejected)


def _pair_of_messages(where: str, row: dict[str, Any]) -> PairText:
  before = chat.Chat(())
  if isinstance(row.get("prompt"), list):
    before = chat.read(where, "prompt", row["prompt"])
  elif "prompt" in row:
    before = chat.Chat((("user", _field(where, row, "prompt")),))
  sides = []
  for name in ("chosen", "rejected"):
    if not isinstance(row.get(name), list):
      raise UserError(
        f"{where}: {name}: not a list; wanted messages, as the other"
      )
    side = chat.read(where, name, row[name])
    if side.messages[: len(before.messages)] != before.messages:
      if len(side.messages) > 1:
        raise UserError(
          f"{where}: {name}: its messages do not begin with those of the prompt"
        )
      side = chat.Chat(before.messages + side.messages)
    if not side.answered or len(side.messages) < 2:
      raise UserError(
        f"{where}: {name}: wanted an assistant's answer to a message at the end"
      )
    sides.append(side.messages)
  chosen, rejected = sides
  if chosen[:-1] != rejected[:-1]:
    raise UserError(
      f"{where}: rejected: its messages before the answer are not those of "
      "chosen; wanted two answers to one conversation"
    )
  return PairText(chat.Chat(chosen[:-1]), chosen[-1][1], rejected[-1][1])


def _shared_prompt(where: str, chosen: str, rejected: str) -> str:
  differs = (i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b)
  shared = next(differs, min(len(chosen), len(rejected)))
  marker = chosen.rfind(REPLY_MARKER, 0, shared)
  if marker < 0:
    raise UserError(
      f"{where}: prompt: missing, and chosen and rejected share no beginning"
      f" that ends with {REPLY_MARKER!r}; wanted a prompt, or two transcripts"
      " of one conversation"
    )
  return chosen[: marker + len(REPLY_MARKER)]


def _field(where: str, row: dict[str, Any], name: str) -> str:
  """The text in a row's field."""
  if name not in row:
    _refuse_misspelling(where, row, name)
    fields = ", ".join(map(repr, row)) or "no field"
    raise UserError(f"{where}: {name}: missing; the row has {fields:.200}")
  text = row[name]
  if not isinstance(text, str):
    found = _JSON_NAMES[type(text)]
    raise UserError(f"{where}: {name}: {found}; wanted a string")
  if not text.strip():
    raise UserError(
      f"{where}: {name}: empty or white; wanted some text; mend or remove the"
      " row"
    )
  # JSON can spell half of a surrogate pair, which no tokenizer can encode.
  half = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
  if half:
    raise UserError(f"{where}: {name}: {half!r}, half a character; wanted text")
  return text


def _refuse_misspelling(where: str, row: dict[str, Any], name: str) -> None:
  """Refuses a row with a field that can only be meant for the missing one."""
  for field in row:
    if difflib.get_close_matches(field.lower(), [name], 1, _MISSPELLING):
      raise UserError(
        f"{where}: {field!r}: not a field's name. Did you mean {name!r}?"
      )


class _Line(NamedTuple):
  where: str
  text: str
  start: int  # Bytes before the line.
  end: int  # Bytes up to the line's end.
  terminated: bool


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """The rows of a `.jsonl` or `.json` file, each with its place."""
  if pathlib.Path(path).suffix == ".json":
    yield from _rows_of_list(path)
    return
  for line in _lines(path):
    if not line.text.strip():
      continue
    try:
      row = json.loads(
        line.text, object_pairs_hook=_once_each, parse_constant=_no_number
      )
    except json.JSONDecodeError as error:
      if not line.terminated:
        raise _truncated(line.where, line.start, line.end) from None
      found = f"{error.msg}, column {error.colno}"
      raise UserError(
        f"{line.where}: not JSON ({found}); wanted one object a line"
      ) from None
    except (RecursionError, ValueError) as error:  # Depth, or digits.
      raise UserError(f"{line.where}: not usable JSON ({error})") from None
    if not isinstance(row, dict):
      raise UserError(
        f"{line.where}: {_JSON_NAMES[type(row)]}; wanted one object a line,"
        ' such as {"prompt": "…"}'
      )
    yield line.where, row


def _rows_of_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
  text = "\n".join(line.text for line in _lines(path))
  try:
    rows = json.loads(
      text, object_pairs_hook=_once_each, parse_constant=_no_number
    )
  except (RecursionError, ValueError) as error:
    raise UserError(f"{path}: not usable JSON ({error})") from None
  if not isinstance(rows, list):
    raise UserError(f"{path}: {_JSON_NAMES[type(rows)]}; wanted a list of rows")
  for number, row in enumerate(rows, start=1):
    where = f"{path}: row {number}"
    if not isinstance(row, dict):
      raise UserError(f"{where}: {_JSON_NAMES[type(row)]}; wanted an object")
    yield where, row


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An object; JSON's reader would keep the last of two values in silence."""
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"{twice!r} stands twice in one object")
  return found


def _no_number(name: str) -> None:
  raise ValueError(f"{name} is no number of JSON's")


def _documents(path: Path) -> Iterator[str]:
  """The documents of a `.txt` file."""
  separates = lambda line: line.text.strip() == DOCUMENT_SEPARATOR
  for is_separator, lines in itertools.groupby(_lines(path), separates):
    document = "\n".join(line.text for line in lines).strip()
    if document and not is_separator:
      yield document


def _suffix(path: Path, *wanted: str) -> str:
  """A path's suffix; on a file, one that is not wanted is an error."""
  path = pathlib.Path(path)
  if path.is_file() and path.suffix not in wanted:
    raise UserError(
      f"{path}: a file named {path.suffix!r}; wanted {' or '.join(wanted)}"
    )
  return path.suffix


def _lines(path: Path) -> Iterator[_Line]:
  """The lines of a file, without their ends; blank ones too."""
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise UserError(
      f"{path}: {error.strerror}; wanted a readable file"
    ) from None
  if data.startswith(_GZIP):
    raise UserError(f"{path}: compressed by gzip; unpack it with gunzip first")
  end = -1
  # Not splitlines: U+2028 and its like are text within a row.
  for number, raw in enumerate(data.split(b"\n"), start=1):
    start, end = end + 1, end + 1 + len(raw)
    where, terminated = f"{path}:{number}", end < len(data)
    try:
      text = raw.decode("utf-8-sig").removesuffix("\r")
    except UnicodeDecodeError as error:
      if not terminated and error.reason == "unexpected end of data":
        raise _truncated(where, start, end) from None
      column = len(error.object[: error.start].decode()) + 1
      raise UserError(
        f"{where}: byte 0x{error.object[error.start]:02x} at column {column} is"
        " not UTF-8; convert the file to UTF-8"
      ) from None
    yield _Line(where, text, start, end, terminated)


def _truncated(where: str, start: int, end: int) -> UserError:
  return UserError(
    f"{where}: the last line begins at byte {start} and is cut short at byte"
    f" {end}, where the file ends; copy the file anew, or remove the line"
  )
