"""Conversations: their messages, and the ids that a model reads of them.

A prompt may be a conversation in place of a text. The tokenizer's chat template
writes it, which `transformers` renders in a sandbox, and the turn of the answer
is begun. What the template writes after an answer is where a response ends:
texts to learn from end so, and a rollout stops there.

Left out: tools and messages whose content is not a text.
"""

from typing import Any, NamedTuple

import transformers

from rlhf_jax import errors

Tokenizer = transformers.PreTrainedTokenizerBase

_ROLES = {  # Names of published files → those that templates know.
  "system": "system",
  "user": "user",
  "human": "user",
  "assistant": "assistant",
  "gpt": "assistant",
  "tool": "tool",
}
# Asked of a template, to see what it writes behind an answer.
_ANSWER = "Xanswerx"


class Chat(NamedTuple):
  """The messages of a conversation, each a role and a text."""

  messages: tuple[tuple[str, str], ...]

  @property
  def answered(self) -> bool:
    """Whether the last message is an assistant's."""
    return self.messages[-1][0] == "assistant"


def read(where: str, field: str, value: Any) -> Chat:
  """The conversation in a row's field.

  Messages are `{"role": …, "content": …}`, or ShareGPT's `{"from": …,
  "value": …}`.

  Raises:
    UserError: With the place, the message and what is wanted.
  """
  if not value:
    raise errors.UserError(f"{where}: {field}: no message; wanted at least one")
  messages = []
  for number, message in enumerate(value, start=1):
    place = f"{where}: {field}: message {number}"
    if not isinstance(message, dict):
      raise errors.UserError(f"{place}: not an object; wanted role and content")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if role not in _ROLES:
      raise errors.UserError(
        f"{place}: role {role!r}; wanted one of {', '.join(_ROLES)}"
      )
    if not isinstance(content, str) or not content.strip():
      raise errors.UserError(f"{place}: content: not a text; wanted one")
    messages.append((_ROLES[role], content))
  return Chat(tuple(messages))


def prompt_ids(tokenizer: Tokenizer, chat: Chat) -> list[int]:
  """The conversation, and the beginning of the answer's turn.

  Raises:
    UserError: The tokenizer has no template, or it cannot render this, or a
      message holds a special token, which would be read as one.
  """
  return _ids(tokenizer, chat, begin_answer=True)


def answer_ids(tokenizer: Tokenizer, chat: Chat, answer: str) -> list[int]:
  """What the template makes of the answer, without the end of its turn.

  Where it does not go on from `prompt_ids` (it leaves out, say, an empty
  thought that it begins a turn with), the ids of the answer's text.
  """
  begun = prompt_ids(tokenizer, chat)
  answered = Chat((*chat.messages, ("assistant", answer)))
  whole = _ids(tokenizer, answered, begin_answer=False)
  if whole[: len(begun)] != begun:
    return tokenizer(answer, add_special_tokens=False)["input_ids"]
  found = whole[len(begun) :]
  if (end := end_of_turn(tokenizer)) in found:
    return found[: len(found) - 1 - found[::-1].index(end)]
  return found


def end_of_turn(tokenizer: Tokenizer) -> int | None:
  """The special token that the template writes after an answer, if any."""
  if not tokenizer.chat_template:
    return None
  messages = [
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": _ANSWER},
  ]
  try:
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
  except Exception:  # What a template raises has any type.
    return None
  _, _, behind = text.rpartition(_ANSWER)
  special = set(tokenizer.added_tokens_decoder)
  ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
  return next((id_ for id_ in ids if id_ in special), None)


def special_in(tokenizer: Tokenizer, text: str) -> str | None:
  """A special token that is spelled in the text, if there is one."""
  added = tokenizer.added_tokens_decoder.values()
  tokens = (token.content for token in added if token.special)
  return next((token for token in tokens if token in text), None)


def _ids(tokenizer, chat, *, begin_answer) -> list[int]:
  if not tokenizer.chat_template:
    raise errors.UserError(
      "config.data.template: the data has conversations, and the tokenizer has "
      "no chat template; set a file with one, or give the prompts as texts"
    )
  for _, content in chat.messages:
    if token := special_in(tokenizer, content):
      raise errors.UserError(
        f"message {content!r:.60}: {token!r} in it would be read as the "
        "special token; remove it"
      )
  messages = [
    {"role": role, "content": content} for role, content in chat.messages
  ]
  try:
    found: Any = tokenizer.apply_chat_template(
      messages, add_generation_prompt=begin_answer, return_dict=False
    )
  except Exception as error:  # What a template raises has any type.
    reason = " ".join(str(error).split())
    roles = ", ".join(role for role, _ in chat.messages)
    raise errors.UserError(
      f"config.data.template: it cannot write messages of {roles}: {reason}"
    ) from error
  return list(found)
