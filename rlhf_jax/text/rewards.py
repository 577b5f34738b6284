"""Rewards that read text: named `module:function`, called from the step.

    def reward(prompts: list[str], responses: list[str]) -> list[float]

The compiled step hands over token ids and waits. What comes back is checked;
what is wrong with it is kept until the step has ended (`raise_if_failed`),
because an exception must not cross the compiled code.
"""

from collections.abc import Callable, Sequence
import importlib
import numbers
import re
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_jax import errors, types
from rlhf_jax.text import tokenizer as tokenizer_lib

TextFunction = Callable[[list[str], list[str]], Sequence[float]]

_LARGEST = float(np.finfo(np.float32).max)


def load_function(name: str) -> Callable:
  """The function that `module:function` names.

  Raises:
    UserError: No such module or function, or it cannot be called.
  """
  module_name, _, function_name = name.partition(":")
  where = f"config.reward.function: {name!r}"
  try:
    module = importlib.import_module(module_name)
  except (Exception, SystemExit) as error:  # A user's module may do all.
    raise errors.UserError(
      f"{where}: importing {module_name!r} failed: "
      f"{type(error).__name__}: {error}; wanted module:function"
    ) from error
  if not callable(function := vars(module).get(function_name)):
    names = sorted(n for n, f in vars(module).items() if callable(f))
    raise errors.UserError(
      f"{where}: {module_name} has no function {function_name!r}; "
      f"it has {', '.join(names[:10]) or 'none'}"
    )
  return function


def check_traced(name: str, function: Callable) -> None:
  """Traces a JAX reward on two responses of three tokens.

  Raises:
    UserError: It raises, or returns anything but one number a response.
  """
  tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
  mask = jax.ShapeDtypeStruct((2, 3), jnp.bool_)
  wanted = "wanted a function of (tokens [B, T], mask [B, T]) to scores [B]"
  try:
    scores = jax.eval_shape(function, tokens, mask)
  except Exception as error:  # A user's function may raise anything.
    raise errors.UserError(
      f"{name}: raised {type(error).__name__}: {error}; {wanted}"
    ) from error
  if not isinstance(scores, jax.ShapeDtypeStruct) or scores.shape != (2,):
    raise errors.UserError(f"{name}: returned {scores} for B = 2; {wanted}")


class TextReward:
  """Makes a function of text one of token ids, as `rewards.from_host` wants."""

  def __init__(
    self,
    name: str,
    function: TextFunction,
    tokenizer: PreTrainedTokenizerBase,
    *,
    special_tokens: bool = False,
  ):
    """With `special_tokens` the texts have theirs, as the end of a turn."""
    self._special_tokens = special_tokens
    self._name = name
    self._function = function
    self._tokenizer = tokenizer
    self._failure: errors.UserError | None = None
    self._one_at_a_time = threading.Lock()

  def __call__(self, sequences: types.Sequences, step: int) -> np.ndarray:
    """Scores `[B]`, float32; all NaN where the function failed."""
    prompts = [
      self._decode(row[len(row) - length :])
      for row, length in zip(sequences.prompt_tokens, sequences.prompt_lengths)
    ]
    responses = [
      self._decode(row[:length])
      for row, length in zip(
        sequences.response_tokens, sequences.response_lengths
      )
    ]
    try:
      # A sweep's devices call it from threads of their own.
      with self._one_at_a_time:
        scores = self._function(prompts, responses)
      return self._checked(scores, prompts)
    except errors.UserError as failure:
      self._failure = failure
    except (Exception, SystemExit) as error:  # A user's function may do all.
      reason = " ".join(str(error).split())
      self._failure = errors.UserError(
        f"{self._name}: step {step}: raised {type(error).__name__}: {reason}; "
        f"the batch began with the prompt {prompts[0]!r}"
      )
      self._failure.__cause__ = error
    return np.full(len(prompts), np.nan, np.float32)

  def raise_if_failed(self) -> None:
    """Raises what went wrong in the step that has just ended, if anything."""
    if self._failure is not None:
      raise self._failure

  def _decode(self, ids: np.ndarray) -> str:
    return tokenizer_lib.decode(
      self._tokenizer, ids.tolist(), special_tokens=self._special_tokens
    )

  def _checked(self, scores: Any, prompts: list[str]) -> np.ndarray:
    def refuse(found: str):
      raise errors.UserError(
        f"{self._name}: returned {found}; wanted a list of {len(prompts)} "
        "finite numbers (float32), one per response"
      )

    try:
      scores = list(scores)
    except TypeError:
      refuse(f"a {type(scores).__name__}")
    if len(scores) != len(prompts):
      refuse(f"{len(scores)} scores")
    for row, (score, prompt) in enumerate(zip(scores, prompts)):
      if not isinstance(score, numbers.Real) or isinstance(score, bool):
        refuse(f"a {type(score).__name__} for row {row} ({prompt!r})")
      if not abs(float(score)) <= _LARGEST:  # NaN is not, either.
        refuse(f"{score} for row {row} ({prompt!r})")
    return np.array(scores, np.float32)


_HAPPY = re.compile(
  r"\b(happy|happily|smil(e|es|ed|ing)|laugh(s|ed|ing)?|lov(e|es|ed|ely)|joy"
  r"|fun|play(s|ed|ing)?|friends?|hug(s|ged)?|kind|good|great|nice|beautiful"
  r"|excited|proud|glad|thank(s|ed)?|shar(e|es|ed|ing))\b"
)


def happy_words(prompts: list[str], responses: list[str]) -> list[float]:
  """Happy words per response, up to 10: a reward that is easy to see work."""
  del prompts
  count = lambda text: sum(1 for _ in _HAPPY.finditer(text.lower()))
  return [min(float(count(response)), 10.0) for response in responses]
