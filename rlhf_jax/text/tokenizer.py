"""Text ⇄ ids through a Hugging Face tokenizer, from local files only.

A prompt is plain text: what looks like a special token in it is spelled out,
never a turn, and BOS is put in front once where the tokenizer wants one. A
response goes on where its prompt ends.

A conversation is written by the tokenizer's template (`text.chat`). Left out:
code that comes with a tokenizer.
"""

from collections.abc import Iterator
import hashlib
import json
import os
import pathlib
from typing import Any

import transformers

from rlhf_jax import errors
from rlhf_jax.models import hf_files
from rlhf_jax.text import chat

Tokenizer = transformers.PreTrainedTokenizerBase
Prompt = str | chat.Chat

# Put before a text to see its ids as a continuation: for almost any text, one
# of them is not joined to it. (A space would be lost after the line break.)
_ANCHORS = (".", "a", "\n")
_OF_THIS_MACHINE = ("name_or_path", "is_local", "local_files_only", "backend")
_ONLY_TRANSFORMERS_5 = ("TokenizersBackend",)
_WINDOW = 16  # Ids that `pieces` decodes at once, where it can.


def load(directory: str | os.PathLike[str]) -> Tokenizer:
  """Reads `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`.

  Raises:
    UserError: If the directory holds no tokenizer that runs without code of
      its own or packages that we do not have.
  """
  directory = pathlib.Path(directory)
  names = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
  if not any((directory / name).is_file() for name in names):
    raise errors.UserError(
      f"{directory}: no tokenizer; a directory with tokenizer.json, or with "
      "vocab.json and merges.txt, is wanted"
    )
  described = any((directory / name).is_file() for name in names[:2])
  kind = transformers.AutoTokenizer if described else transformers.GPT2Tokenizer
  try:
    return kind.from_pretrained(
      directory, local_files_only=True, trust_remote_code=False
    )
  except Exception as error:  # The libraries raise bare Exceptions too.
    reason = " ".join(str(error).split())
    message = f"{directory}: the tokenizer cannot be read: {reason}"
    raise errors.UserError(message) from error


def save(tokenizer: Tokenizer, directory: str | os.PathLike[str]) -> None:
  """Writes the tokenizer's files, for other readers and other machines.

  transformers 5 names a class that no other reader has, and where the
  tokenizer came from on this machine.
  """
  tokenizer.save_pretrained(directory)
  path = pathlib.Path(directory) / "tokenizer_config.json"
  content = hf_files.read_json(path)
  for name in _OF_THIS_MACHINE:
    content.pop(name, None)
  if content.get("tokenizer_class") in _ONLY_TRANSFORMERS_5:
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
  hf_files.write_json(path, content)


def check(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
  """Requires a row of the embedding for every id.

  JAX would clamp a larger id to the last row without a word.

  Args:
    tokenizer: Of the texts.
    vocab_size: Rows of the embedding.
    where: The tokenizer's directory, for the message.

  Raises:
    UserError: Names the largest id.
  """
  largest = max(tokenizer.get_vocab().values())
  if largest >= vocab_size:
    raise errors.UserError(
      f"{where}: the tokenizer has ids up to {largest}; at most "
      f"{vocab_size - 1} is wanted, as the model's embedding has {vocab_size} "
      "rows: use the model's own tokenizer"
    )


def stop_ids(
  directory: str | os.PathLike[str], tokenizer: Tokenizer
) -> tuple[int, ...]:
  """The ids that a model directory declares to end a text.

  A union of what the chat template ends a turn with and the eos ids of the
  tokenizer, `generation_config.json` and `config.json`: they often differ, and
  stand in this order, for texts to learn from are ended with the first. A model
  may end on yet another id.

  Raises:
    UserError: If a file's eos is neither an id nor a list of ids.
  """
  own: Any = tokenizer.eos_token_id  # Its id may be typed as texts.
  first = chat.end_of_turn(tokenizer), own
  ids: list[int] = [id_ for id_ in first if id_ is not None]
  for name in ("generation_config.json", "config.json"):
    path = pathlib.Path(directory) / name
    if not path.is_file():
      continue
    found = hf_files.read_json(path).get("eos_token_id")
    eos = found if isinstance(found, list) else [found]
    eos = [id_ for id_ in eos if id_ is not None]
    if any(type(id_) is not int or id_ < 0 for id_ in eos):
      raise errors.UserError(
        f"{path}: eos_token_id: {found!r}; an id or a list of ids is wanted"
      )
    ids += eos
  return tuple(dict.fromkeys(ids))


def set_template(tokenizer: Tokenizer, template: str) -> None:
  """Sets the chat template: "auto" is its own, "none" is none, else a file.

  Raises:
    UserError: The file cannot be read.
  """
  if template == "auto":
    return
  if template == "none":
    tokenizer.chat_template = None
    return
  try:
    text = pathlib.Path(template).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
      f"config.data.template: {template}: {error}; wanted 'auto', 'none' or a "
      "file with a template"
    ) from error
  tokenizer.chat_template = text


def encode_prompt(tokenizer: Tokenizer, text: Prompt) -> list[int]:
  """BOS once, where the tokenizer adds one, and the text; never an EOS.

  A conversation is as the template writes it, the answer's turn begun.
  """
  if isinstance(text, chat.Chat):
    return chat.prompt_ids(tokenizer, text)
  return _bos(tokenizer) + _encode(tokenizer, text)


def encode_pair(
  tokenizer: Tokenizer, prompt: Prompt, response: str
) -> tuple[list[int], list[int]]:
  """A prompt as `encode_prompt` has it, and ids that continue it.

  Together they decode to what the joint text's ids do. They are the joint
  text's own unless one of those spans the border: no rollout from this prompt
  could produce such a token.

  Raises:
    UserError: If no ids of the response continue the prompt to the joint text.
  """
  prompt_ids = encode_prompt(tokenizer, prompt)
  if isinstance(prompt, chat.Chat):
    return prompt_ids, chat.answer_ids(tokenizer, prompt, response)
  joint_ids = encode_prompt(tokenizer, prompt + response)
  if joint_ids[: len(prompt_ids)] == prompt_ids:
    return prompt_ids, joint_ids[len(prompt_ids) :]
  wanted = decode(tokenizer, joint_ids)
  for response_ids in _continuations(tokenizer, response):
    if decode(tokenizer, prompt_ids + response_ids) == wanted:
      return prompt_ids, response_ids
  raise errors.UserError(
    f"response {response!r}: no ids continue the prompt {prompt!r} to "
    f"{wanted!r}; move the border between the two to a space"
  )


def decode(
  tokenizer: Tokenizer, ids: list[int], *, special_tokens: bool = False
) -> str:
  """The text, without special tokens (or with) and cosmetic clean-up."""
  text = tokenizer.decode(
    ids,
    skip_special_tokens=not special_tokens,
    clean_up_tokenization_spaces=False,
  )
  assert isinstance(text, str)  # A list of texts would need a list of lists.
  return text


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
  """What each id adds to the text.

  An id alone may lose its space, and of a character that is spelled in several
  ids the last one has all.
  """
  found, done = [], ""
  begin = whole = 0
  for end in range(1, len(ids) + 1):
    raw = decode(tokenizer, ids[begin:end])
    text = raw.rstrip("\N{REPLACEMENT CHARACTER}")
    # Bytes of a character that is not whole yet spoil those before them.
    piece = text[len(done) :] if text.startswith(done) else ""
    found.append(piece)
    done += piece
    if text == raw and end - begin >= _WINDOW:
      # Only the ids since the last whole character but one are decoded again,
      # or the time would grow as the square of the ids.
      begin, whole = whole, end
      done = decode(tokenizer, ids[begin:end])
    elif text == raw:
      whole = end
  return found


def fingerprint(tokenizer: Tokenizer) -> str:
  """sha256 of the vocabulary: equal where ids mean the same tokens."""
  vocabulary = sorted(tokenizer.get_vocab().items())
  return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def _encode(tokenizer, text: str) -> list[int]:
  """Ids of plain text; special tokens in it are spelled out."""
  try:
    encoding = tokenizer(
      text, add_special_tokens=False, split_special_tokens=True
    )
  except Exception as error:  # What `tokenizers` raises has no other type.
    raise errors.UserError(
      f"text {text!r}: the tokenizer cannot encode it: {error}; use only what "
      "its vocabulary spells"
    ) from error
  return encoding["input_ids"]


def _continuations(tokenizer, text: str) -> Iterator[list[int]]:
  """The text's ids after each anchor whose own ids it leaves alone."""
  for anchor in _ANCHORS:
    start = _encode(tokenizer, anchor)
    ids = _encode(tokenizer, anchor + text)
    if ids[: len(start)] == start:
      yield ids[len(start) :]


def _bos(tokenizer) -> list[int]:
  """BOS, if the tokenizer's own template begins with it."""
  first = tokenizer("", add_special_tokens=True)["input_ids"][:1]
  return first if first == [tokenizer.bos_token_id] else []
