"""Readers: every refusal with its place, and what is accepted and counted."""

import gzip
import json
import pathlib

import pytest

from rlhf_jax.data import readers
from rlhf_jax.errors import UserError
from rlhf_jax.text import chat

DATA = pathlib.Path(__file__).parents[2].parent / "shared/data"
GOOD = b'{"prompt": "a"}\n'
READERS = (readers.read_prompts, readers.read_texts, readers.read_pairs)


@pytest.fixture
def write(tmp_path):
  """Writes a file of bytes, text or JSON rows, and gives its path."""

  def write(content, name="rows.jsonl"):
    if isinstance(content, list):
      content = "".join(json.dumps(row) + "\n" for row in content)
    if isinstance(content, str):
      content = content.encode()
    path = tmp_path / name
    path.write_bytes(content)
    return path

  return write


def refusal(reader, path):
  """The error's one line, without the folder."""
  with pytest.raises(UserError) as error:
    reader(path)
  message = str(error.value)
  assert "\n" not in message
  assert message.startswith(str(path))
  return message.removeprefix(str(path.parent) + "/")


def pair(prompt="p", chosen="c", rejected="r"):
  return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# Accepted.


def test_prompts_other_fields_blank_lines_crlf_and_byte_order_mark(write):
  path = write(
    b'\xef\xbb\xbf{"prompt": " a ", "id": 1}\r\n\r\n   \n{"prompt": "b"}'
  )
  assert readers.read_prompts(path)[0] == [" a ", "b"]


def test_prompts_of_a_text_file(write):
  path = write(b"one\r\n\r\n two \n \none", "prompts.txt")
  prompts, counts = readers.read_prompts(path)
  assert prompts == ["one", " two ", "one"]
  assert str(counts) == "3 prompts; 1 duplicates"


def test_unicode_line_separators_do_not_end_a_line(write):
  """U+2028, U+0085 and form feeds are text, within JSON and in .txt."""
  text = "a\u2028b\u0085c\u000bd"
  path = write(json.dumps({"prompt": text}, ensure_ascii=False))
  assert readers.read_prompts(path)[0] == [text]
  assert readers.read_prompts(write(text, "prompts.txt"))[0] == [text]


def test_special_token_text_is_plain_text(write):
  path = write([{"prompt": "<|endoftext|><s>[INST]"}])
  assert readers.read_prompts(path)[0] == ["<|endoftext|><s>[INST]"]


def test_texts_with_and_without_a_prompt(write):
  path = write([{"prompt": "p ", "response": " r"}, {"text": " t "}])
  assert readers.read_texts(path)[0] == [("p ", " r"), ("", " t ")]


def test_documents_between_separator_lines(write):
  path = write(
    "\n a\n\nb <|endoftext|> b\r\n<|endoftext|>\r\n \n<|endoftext|>\nc\n",
    "texts.txt",
  )
  texts, counts = readers.read_texts(path)
  assert texts == [("", "a\n\nb <|endoftext|> b"), ("", "c")]
  assert counts == readers.Counts("texts", rows=2, duplicates=0)


def test_prompts_are_cut_off_where_all_responses_repeat_them(write):
  """By the file, and said: a row may begin with its prompt by chance."""
  repeating = [pair("a", "a b", "a c"), pair("Hi", "Hi you", "Hi!")]
  pairs, counts = readers.read_pairs(write(repeating))
  assert pairs == [("a", " b", " c"), ("Hi", " you", "!")]
  assert "each prompt cut from its responses" in str(counts)
  by_chance = [
    pair("p", "c", "r"),
    pair("Hi", "Hi you", "Hi!"),
    pair("So", "So it is", "No"),
  ]
  pairs, counts = readers.read_pairs(write(by_chance))
  assert pairs == [tuple(row.values()) for row in by_chance]
  assert isinstance(pairs[0], readers.PairText) and "cut" not in str(counts)


def test_the_prompt_of_transcripts_ends_with_the_last_shared_marker(write):
  start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
  row = {"chosen": start + " Yes", "rejected": start + " You\n\nAssistant: d"}
  pairs, _ = readers.read_pairs(write([row]))
  # " Y" is shared too, and belongs to the reply.
  assert pairs == [(start, " Yes", " You\n\nAssistant: d")]


def test_transcripts_where_one_ends_with_the_marker(write):
  """A reply may be a beginning of the other; the marker is theirs still."""
  start = "\n\nHuman: a\n\nAssistant:"
  row = {"chosen": start + " Yes", "rejected": start + " Yes.\n\nAssistant:"}
  pairs, _ = readers.read_pairs(write([row]))
  assert pairs == [(start, " Yes", " Yes.\n\nAssistant:")]


# Counted.


def test_counts_are_a_line(write):
  empty = {"chosen": "\n\nAssistant: \n", "rejected": "\n\nAssistant: b"}
  rows = [pair(str(i)) for i in range(57)] + [pair("0")]
  rows += [pair(chosen="r"), empty]
  pairs, counts = readers.read_pairs(write(rows))
  assert len(pairs) == 58
  assert counts == readers.Counts("pairs", 58, 1, identical=1, empty=1)
  assert str(counts) == (
    "58 pairs; 1 identical left out; 1 with an empty reply left out;"
    " 1 duplicates"
  )
  assert str(readers.Counts("pairs", 1500, 0)) == "1,500 pairs"


@pytest.mark.parametrize("good, refused", [(19, False), (18, True)])
def test_identical_pairs_are_left_out_up_to_a_twentieth(write, good, refused):
  path = write([pair(str(i)) for i in range(good)] + [pair(chosen="r")])
  if refused:
    assert refusal(readers.read_pairs, path).startswith(
      "rows.jsonl:19: chosen: the same as rejected, here and in all in 1 of 19"
    )
  else:
    assert readers.read_pairs(path)[1].identical == 1


def test_too_many_empty_replies_are_refused(write):
  row = {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: "}
  message = refusal(readers.read_pairs, write([pair(), row]))
  assert message.startswith("rows.jsonl:2: chosen or rejected: an empty reply")


# Refused: the file.


@pytest.mark.parametrize("reader", READERS)
def test_refuses_what_is_no_file_of_a_known_kind(reader, write, tmp_path):
  absent = refusal(reader, tmp_path / "absent.jsonl")
  assert absent.startswith("absent.jsonl: No such file")
  folder = tmp_path / "folder.jsonl"
  folder.mkdir()
  assert refusal(reader, folder).startswith("folder.jsonl: Is a directory")
  message = refusal(reader, write(GOOD, "rows.csv"))
  assert message.startswith(
    "rows.csv: a file named '.csv'; wanted .jsonl or .json"
  )
  assert ".txt" in message or reader is readers.read_pairs


def test_pairs_are_not_read_from_text(write):
  message = refusal(readers.read_pairs, write("a", "pairs.txt"))
  assert message == "pairs.txt: a file named '.txt'; wanted .jsonl or .json"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", [b"", b"\n \r\n"])
def test_refuses_no_usable_rows(reader, content, write):
  assert refusal(reader, write(content)).startswith(
    "rows.jsonl: no usable rows"
  )


def test_refuses_a_text_file_of_separators_alone(write):
  path = write("<|endoftext|>\n\n<|endoftext|>", "texts.txt")
  assert "no usable rows" in refusal(readers.read_texts, path)


# Refused: a line.


@pytest.mark.parametrize(
  "last", [b'{"prompt": "b', b'{"prompt"', b"{", "{'prompt: \"é".encode()[:-1]]
)
def test_a_truncated_last_line_has_its_byte_offsets(last, write):
  path = write(GOOD + '{"prompt": "é"}\r\n'.encode() + last)
  start = 16 + 18  # GOOD, and 17 characters of which é takes two bytes.
  assert refusal(readers.read_prompts, path).startswith(
    f"rows.jsonl:3: the last line begins at byte {start} and is cut short at"
    f" byte {start + len(last)},"
  )


def test_a_bad_line_in_the_middle_is_not_called_truncated(write):
  message = refusal(readers.read_prompts, write(b'{"prompt": "b\n' + GOOD))
  assert message == (
    "rows.jsonl:1: not JSON (Unterminated string starting at, column 12);"
    " wanted one object a line"
  )


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt"])
@pytest.mark.parametrize("reader", [readers.read_prompts, readers.read_texts])
def test_a_byte_that_is_not_utf8_has_line_and_column(reader, name, write):
  path = write('{"text": "é'.encode() + b'\xff"}\n', name)
  assert refusal(reader, path).startswith(f"{name}:1: byte 0xff at column 12 ")


def test_the_column_does_not_count_the_byte_order_mark(write):
  path = write(b"\xef\xbb\xbfa\xff\n", "rows.txt")
  message = refusal(readers.read_prompts, path)
  assert message.startswith("rows.txt:1: byte 0xff at column 2 ")


@pytest.mark.parametrize(
  "value, name",
  [
    ('["a"]', "a list"),
    ("3", "a number"),
    ("1.5", "a number"),
    ('"a"', "a string"),
    ("null", "null"),
    ("true", "a boolean"),
  ],
)
def test_refuses_a_row_that_is_no_object(value, name, write):
  message = refusal(readers.read_prompts, write(GOOD + value.encode()))
  assert message.startswith(f"rows.jsonl:2: {name}; wanted one object a line")


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": ' + "1" * 5000])
def test_refuses_json_beyond_the_parser(line, write):
  message = refusal(readers.read_prompts, write(line + "}\n"))
  assert message.startswith("rows.jsonl:1: not usable JSON (")


# Refused: a field.


@pytest.mark.parametrize("field", ["promt", "Prompt", "prompts"])
@pytest.mark.parametrize("reader", READERS)
def test_a_misspelt_field_has_a_suggestion(reader, field, write):
  message = refusal(
    reader, write([{field: "a", "chosen": "c", "rejected": "r"}])
  )
  assert message == (
    f"rows.jsonl:1: '{field}': not a field's name. Did you mean 'prompt'?"
  )


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_a_misspelt_response_has_a_suggestion(field, write):
  row = pair()
  row[field + "s"] = row.pop(field)
  message = refusal(readers.read_pairs, write([pair(), row]))
  assert message.startswith(f"rows.jsonl:2: '{field}s': not a field's name.")
  assert message.endswith(f"Did you mean '{field}'?")


def test_a_misspelt_text_has_a_suggestion(write):
  message = refusal(readers.read_texts, write([{"txt": "a"}]))
  assert message.endswith("Did you mean 'text'?")


def test_a_relative_of_a_field_is_no_misspelling(write):
  """HH-like rows with a `prompt_id` and no prompt are transcripts."""
  row = {"prompt_id": 1, "chosen": "\n\nAssistant: a"}
  row["rejected"] = "\n\nAssistant: b"
  assert readers.read_pairs(write([row]))[0][0].chosen == " a"
  row = {"prompt": "p", "response": "r", "texts": 1}
  assert readers.read_texts(write([row]))[0] == [("p", "r")]


def test_a_missing_field_lists_those_there_are(write):
  message = refusal(readers.read_prompts, write([{"question": "a", "x": 1}]))
  assert message == (
    "rows.jsonl:1: prompt: missing; the row has 'question', 'x'"
  )
  assert refusal(readers.read_prompts, write([{}])).endswith("has no field")


@pytest.mark.parametrize(
  "value, name",
  [
    (3, "a number"),
    (None, "null"),
    ({"a": 1}, "an object"),
    (True, "a boolean"),
  ],
)
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_refuses_a_field_of_another_type(field, value, name, write):
  message = refusal(readers.read_pairs, write([pair(), pair(**{field: value})]))
  assert message == f"rows.jsonl:2: {field}: {name}; wanted a string"


@pytest.mark.parametrize("value", ["", " \n\t\u3000"])
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_refuses_an_empty_or_white_field(field, value, write):
  rows = [pair(str(i)) for i in range(100)] + [pair(**{field: value})]
  message = refusal(readers.read_pairs, write(rows))
  assert message.startswith(f"rows.jsonl:101: {field}: empty or white;")


def test_refuses_half_a_character(write):
  message = refusal(readers.read_prompts, write(b'{"prompt": "a\\ud83d"}\n'))
  assert message.startswith(r"rows.jsonl:1: prompt: '\ud83d', half a character")


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_refuses_a_text_beside_a_prompt_or_response(field, write):
  message = refusal(readers.read_texts, write([{"text": "t", field: "a"}]))
  assert message.startswith(f"rows.jsonl:1: text: found beside '{field}';")


def test_refuses_transcripts_of_two_conversations(write):
  rows = [
    {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
    {"chosen": "\n\nHuman: a\n\nAssistant: a", "rejected": "b\n\nAssistant: a"},
  ]
  assert refusal(readers.read_pairs, write(rows)).startswith(
    "rows.jsonl:2: prompt: missing, and chosen and rejected share no beginning"
  )


@pytest.mark.parametrize(
  "row, found",
  [
    ('{"prompt": "a", "prompt": "b"}', "'prompt' stands twice in one object"),
    ('{"prompt": "a", "meta": {"x": 1, "x": 2}}', "'x' stands twice"),
    ('{"prompt": "a", "score": NaN}', "NaN is no number of JSON's"),
    ('{"prompt": "a", "score": -Infinity}', "-Infinity is no number"),
  ],
)
def test_refuses_what_json_has_not_in_any_column(row, found, tmp_path):
  """Python's reader keeps the last of two values, and takes NaN."""
  path = tmp_path / "rows.jsonl"
  path.write_text(f'{{"prompt": "ok"}}\n{row}\n')
  with pytest.raises(UserError, match=r"rows\.jsonl:2: not usable") as e:
    readers.read_prompts(path)
  assert found in str(e.value)


def test_a_compressed_file_is_named_for_what_it_is(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(gzip.compress(b'{"prompt": "a"}'))
  with pytest.raises(UserError, match="compressed by gzip; unpack it"):
    readers.read_prompts(path)


# Real files.


def real(name):
  path = DATA / name
  if not path.exists():
    pytest.skip(f"no {name} beside the project")
  return path


def test_real_preferences():
  path = real("hh_rlhf.jsonl")
  pairs, counts = readers.read_pairs(path)
  assert str(counts) == "1,496 pairs; 4 with an empty reply left out"
  rows = [json.loads(line) for line in path.read_text().split("\n") if line]
  whole = {(row["chosen"], row["rejected"]) for row in rows}
  for prompt, chosen, rejected in pairs:
    assert prompt.endswith("\n\nAssistant:")
    assert (prompt + chosen, prompt + rejected) in whole
    assert "\n\nHuman:" not in chosen + rejected


def test_real_stories():
  texts, _ = readers.read_texts(real("tinystories.txt"))
  written = real("tinystories.txt").read_text()
  assert len(texts) == 1097
  assert all(text == text.strip() and text in written for _, text in texts[:50])
  prompts, _ = readers.read_prompts(real("story_prompts.jsonl"))
  assert prompts[0] == "One day, a little girl"


# Conversations.

USER, ANSWER = ("user", "hi"), ("assistant", "yes")


def messages(*pairs):
  return [{"role": role, "content": content} for role, content in pairs]


def test_prompts_are_conversations(write):
  rows = [
    {"messages": messages(USER)},
    {"prompt": messages(("system", "be brief"), USER), "answer": "x"},
    {"conversations": [{"from": "human", "value": "hi"}]},
    {"prompt": "hi"},
  ]
  prompts, counts = readers.read_prompts(write(rows))
  assert prompts == [
    chat.Chat((USER,)),
    chat.Chat((("system", "be brief"), USER)),
    chat.Chat((USER,)),
    "hi",
  ]
  assert counts.duplicates == 1
  answered = {"messages": messages(USER, ANSWER)}
  with pytest.raises(UserError, match="the last message is an assistant's"):
    readers.read_prompts(write([answered]))


def test_each_answer_of_a_conversation_is_a_text(write):
  row = {"messages": messages(USER, ANSWER, ("user", "so?"), ANSWER)}
  texts, _ = readers.read_texts(write([row]))
  assert texts == [
    (chat.Chat((USER,)), "yes"),
    (chat.Chat((USER, ANSWER, ("user", "so?"))), "yes"),
  ]
  with pytest.raises(
    UserError, match="no message of an assistant that answers"
  ):
    readers.read_texts(write([{"messages": messages(ANSWER, USER)}]))


@pytest.mark.parametrize(
  "row",
  [
    {
      "chosen": messages(USER, ANSWER),
      "rejected": messages(USER, ("assistant", "no")),
    },
    {
      "prompt": messages(USER),
      "chosen": messages(ANSWER),
      "rejected": messages(("assistant", "no")),
    },
    {
      "prompt": "hi",
      "chosen": messages(USER, ANSWER),
      "rejected": messages(USER, ("assistant", "no")),
    },
    {"prompt": messages(USER), "chosen": "yes", "rejected": "no"},
  ],
)
def test_pairs_of_messages(row, write):
  """With the prompt in both, beside them, or as a text."""
  pairs, _ = readers.read_pairs(write([row]))
  assert pairs == [(chat.Chat((USER,)), "yes", "no")]


@pytest.mark.parametrize(
  "row, message",
  [
    ({"chosen": messages(USER), "rejected": messages(USER)}, "an assistant's"),
    ({"chosen": messages(USER, ANSWER), "rejected": "no"}, "not a list"),
    (
      {
        "chosen": messages(USER, ANSWER),
        "rejected": messages(("user", "ho"), ANSWER),
      },
      "not those of chosen",
    ),
    (
      {
        "prompt": "ho",
        "chosen": messages(USER, ANSWER),
        "rejected": messages(USER, ANSWER),
      },
      "do not begin with those of the prompt",
    ),
    (
      {"prompt": "a", "chosen": ["b"], "rejected": "c"},
      "message 1: not an obj",
    ),
  ],
)
def test_pairs_of_messages_that_are_none(row, message, write):
  with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*{message}"):
    readers.read_pairs(write([row]))


def test_a_json_file_is_a_list_of_rows(tmp_path):
  path = tmp_path / "rows.json"
  path.write_text(json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=1))
  assert readers.read_prompts(path)[0] == ["a", "b"]
  path.write_text('[{"prompt": "a"}, {"prompt": ""}]')
  with pytest.raises(UserError, match=r"rows\.json: row 2: prompt: empty"):
    readers.read_prompts(path)
  path.write_text('{"prompt": "a"}')
  with pytest.raises(UserError, match="an object; wanted a list of rows"):
    readers.read_prompts(path)
