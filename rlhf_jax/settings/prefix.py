"""The text in front of every prompt, `config.rollout.prefix`, as ids."""

from typing import NamedTuple

from ml_collections import ConfigDict

from rlhf_jax import errors
from rlhf_jax.steps import anchor
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.text import tokenizer as tokenizer_lib


class Prefix(NamedTuple):
  """The ids, and how many of a prompt stand before them (BOS, or none)."""

  ids: list[int]
  begin: int

  @property
  def place(self) -> anchor.Prefix:
    """Where it stands in every prompt."""
    return anchor.Prefix(len(self.ids), self.begin)

  def in_front_of(self, prompt: list[int], prompt_length: int) -> list[int]:
    """BOS, the prefix, and as many of the prompt's last ids as there is room.

    Unlike a prompt alone, one that is too long keeps its BOS.
    """
    room = prompt_length - len(self.ids) - self.begin
    return prompt[: self.begin] + self.ids + prompt[self.begin :][-room:]


def of(
  config: ConfigDict, pretrained: pretrained_lib.Pretrained
) -> Prefix | None:
  """The prefix in the policy's ids; None where there is none.

  Raises:
    UserError: It has no ids, or leaves no room for a prompt.
  """
  text, length = config.rollout.prefix, config.rollout.prompt_length
  if not text:
    return None
  begin = len(tokenizer_lib.encode_prompt(pretrained.tokenizer, ""))
  try:
    ids = tokenizer_lib.encode_prompt(pretrained.tokenizer, text)[begin:]
  except errors.UserError as error:
    raise errors.UserError(f"config.rollout.prefix: {error}") from error
  if not ids:
    raise errors.UserError(
      f"config.rollout.prefix: {text!r} has no tokens; wanted a text, or ''"
    )
  if length <= begin + len(ids):
    raise errors.UserError(
      f"config.rollout.prompt_length: {length}; wanted more than"
      f" {begin + len(ids)}, the tokens of rollout.prefix (and BOS, if the"
      " tokenizer has one); the prompt is to follow"
    )
  return Prefix(ids, begin)
